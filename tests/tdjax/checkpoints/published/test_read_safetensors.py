"""safetensors files, shard indices and folders of shards: values, wrong headers, truncation."""

import json
import math
import random
import struct

import ml_dtypes
import numpy as np
import pytest

from tdjax.checkpoints.published.files import open_source
from tdjax.errors import CheckpointError


def raw(path, header, data=b"", length=None):
    """A file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype="F32", shape=(2,), span=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(span)}


def test_every_dtype_as_the_library_writes_it(tmp_path, write_safetensors):
    dtypes = [
        "float64",
        "float32",
        "float16",
        "int64",
        "int32",
        "int16",
        "int8",
        "uint64",
        "uint32",
        "uint16",
        "uint8",
        "bool",
    ]
    values = np.arange(12).reshape(3, 4)
    tensors = {name: values.astype(name) for name in dtypes} | {
        "bfloat16": values.astype(ml_dtypes.bfloat16),
        "scalar": np.float32(3),
    }
    source = open_source(write_safetensors(tmp_path / "t.safetensors", tensors, {"format": "pt"}))
    assert source.metadata == {"format": "pt"}
    for name, want in tensors.items():
        got = source.tensors[name].read()
        assert (got.dtype, got.shape) == (
            want.dtype,
            want.shape,
        ) and got.tobytes() == want.tobytes(), name


def test_eight_bit_floats(tmp_path):
    values = np.arange(8).astype(ml_dtypes.float8_e4m3fn)
    source = open_source(
        raw(tmp_path / "t.safetensors", {"a": entry("F8_E4M3", (8,))}, values.tobytes())
    )
    np.testing.assert_array_equal(source.tensors["a"].read().astype(np.float32), np.arange(8))


@pytest.mark.parametrize(
    "header, message",
    [
        ({"a": entry(span=(0, 12))}, "has 12 bytes"),
        ({"a": entry(span=(4, 12))}, "begins at 4, expected 0"),
        ({"a": entry(span=(0, 8)), "b": entry(span=(4, 12))}, "overlap"),
        ({"a": entry(span=(8, 0))}, "has -8 bytes"),
        ({"a": entry(shape=(4,), span=(0, 16))}, "truncated"),
        ({"a": entry(shape=(1,), span=(0, 4))}, "longer than its header says"),
        ({"a": entry(shape=(-2,))}, "malformed"),
        ({"a": entry(shape=(2.0,))}, "malformed"),
        ({"a": entry(shape=(2**40, 2**40))}, "has 8 bytes"),
        ({"a": entry(dtype="Q4")}, "dtype Q4"),
        ({"a": entry(dtype=3)}, "malformed"),
        ({"a": {"dtype": "F32"}}, "malformed"),
        ({"a": 3}, "malformed"),
        ([1, 2], "damaged header|neither"),
        (b'{"a": 1, "a": 2}', "key is there twice"),
        (b"{" * 100000, "damaged header"),
        (b'{"\xff": 1}', "damaged header"),
        (b'{"a": ' + b"[" * 100000 + b"}", "damaged header"),
    ],
)
def test_wrong_headers(tmp_path, header, message):
    with pytest.raises(CheckpointError, match=message) as e:
        open_source(raw(tmp_path / "t.safetensors", header, b"\0" * 8))
    assert "t.safetensors" in str(e.value)


def test_header_longer_than_the_file(tmp_path):
    for length in (10**6, 2**63, 2**64 - 1):
        with pytest.raises(CheckpointError, match="truncated or not a safetensors file"):
            open_source(raw(tmp_path / "t.safetensors", {"a": entry()}, b"\0" * 8, length))


def test_truncation_and_changed_bytes(tmp_path, write_safetensors):
    tensors = {f"blocks.{i}": np.full((3, 5), i, np.float32) for i in range(4)}
    whole = write_safetensors(tmp_path / "t.safetensors", tensors).read_bytes()
    damaged, rng = tmp_path / "damaged.safetensors", random.Random(0)
    for length in range(len(whole)):
        damaged.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            open_source(damaged)
    for _ in range(400):
        data = bytearray(whole)
        data[rng.randrange(len(data))] = rng.randrange(256)
        damaged.write_bytes(data)
        try:
            for t in open_source(damaged).tensors.values():
                assert t.nbytes <= len(whole)
                t.read()
        except CheckpointError as e:
            assert "damaged.safetensors" in str(e)


def test_a_file_that_shrinks_while_it_is_read(tmp_path, write_safetensors):
    path = write_safetensors(tmp_path / "t.safetensors", {"a": np.ones(100, np.float32)})
    tensor = open_source(path).tensors["a"]
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(CheckpointError, match="ends in the middle"):
        tensor.read()


# Shards
# --------------------------------------------------------------------------------------------------


def shards(folder, write, index=True, stem="model"):
    """Two shards and their index."""
    folder.mkdir(exist_ok=True)
    parts = [
        {"a": np.full((2, 3), 1.0, np.float32), "b": np.arange(4)},
        {"c": np.full(5, 3, np.int8)},
    ]
    table = {}
    for i, part in enumerate(parts):
        name = f"{stem}-{i + 1:05d}-of-00002.safetensors"
        write(folder / name, part)
        table |= dict.fromkeys(part, name)
    if index:
        (folder / f"{stem}.safetensors.index.json").write_text(
            json.dumps({"metadata": {"total_size": 1}, "weight_map": table})
        )
    return {k: v for part in parts for k, v in part.items()}


@pytest.mark.parametrize("index", [True, False])
def test_sharded(tmp_path, write_safetensors, index):
    tensors = shards(tmp_path / "m", write_safetensors, index)
    paths = [tmp_path / "m"] + [tmp_path / "m" / "model.safetensors.index.json"] * index
    for path in paths:
        source = open_source(path)
        assert len(source.files) == 2 and source.nbytes == sum(t.nbytes for t in tensors.values())
        for key, want in tensors.items():
            np.testing.assert_array_equal(source.tensors[key].read(), want)


def test_hash_of_one_file_and_of_shards(tmp_path, write_safetensors):
    import hashlib

    shards(tmp_path / "m", write_safetensors)
    source, seen = open_source(tmp_path / "m"), []
    lines = "".join(
        f"{hashlib.sha256(f.read_bytes()).hexdigest()}  {f.name}\n" for f in source.files
    )
    assert source.sha256(seen.append) == hashlib.sha256(lines.encode()).hexdigest()
    assert sum(seen) == sum(f.stat().st_size for f in source.files)
    one = open_source(source.files[0])
    assert one.sha256() == hashlib.sha256(source.files[0].read_bytes()).hexdigest()


def test_wrong_indices(tmp_path, write_safetensors):
    folder = tmp_path / "m"
    shards(folder, write_safetensors)
    index = folder / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    first = "model-00001-of-00002.safetensors"
    for change, message in (
        (
            {"weight_map": good["weight_map"] | {"a": "../../secret.safetensors"}},
            "shards lie beside their index",
        ),
        (
            {"weight_map": good["weight_map"] | {"a": "/etc/passwd"}},
            "shards lie beside their index",
        ),
        ({"weight_map": good["weight_map"] | {"z": first}}, "differ in 1 keys"),
        (
            {"weight_map": {k: v for k, v in good["weight_map"].items() if k != "a"}},
            "differ in 1 keys",
        ),
        (
            {"weight_map": good["weight_map"] | {"z": "model-00003.safetensors"}},
            "lacks 1 of 3 shards",
        ),
        ({"weight_map": [1]}, "not a shard index"),
        ({}, "not a shard index"),
    ):
        index.write_text(json.dumps(change))
        with pytest.raises(CheckpointError, match=message):
            open_source(folder)
    index.write_text("{")
    with pytest.raises(CheckpointError, match="not a shard index"):
        open_source(folder)


def test_wrong_folders(tmp_path, write_safetensors):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"holds no \.safetensors, \.pth or \.gguf file"):
        open_source(tmp_path / "empty")
    shards(tmp_path / "part", write_safetensors, index=False)
    (tmp_path / "part" / "model-00002-of-00002.safetensors").unlink()
    write_safetensors(tmp_path / "part" / "model-00003-of-00003.safetensors", {"x": np.ones(2)})
    with pytest.raises(CheckpointError, match="some are missing"):
        open_source(tmp_path / "part")
    shards(tmp_path / "two", write_safetensors)
    shards(tmp_path / "two", write_safetensors, stem="other")
    with pytest.raises(CheckpointError, match="2 shard indices"):
        open_source(tmp_path / "two")
    (tmp_path / "several").mkdir()
    for name in "ab":
        write_safetensors(tmp_path / "several" / f"{name}.safetensors", {"x": np.ones(2)})
    with pytest.raises(CheckpointError, match="2 files"):
        open_source(tmp_path / "several")


def test_sizes_are_told_without_reading(tmp_path, write_safetensors):
    source = open_source(
        write_safetensors(tmp_path / "t.safetensors", {"a": np.ones((3, 4), np.float16)})
    )
    tensor = source.tensors["a"]
    assert (tensor.shape, tensor.size, tensor.nbytes) == ((3, 4), 12, math.prod((3, 4)) * 2)
