"""Torch files read without torch: values, hostile contents, damage."""

import argparse
import collections
import datetime
import json
import os
import pathlib
import pickle
import random
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from tdjax.checkpoints.published import torch_pickle
from tdjax.checkpoints.published.files import open_source
from tdjax.errors import CheckpointError

BF16 = np.dtype(ml_dtypes.bfloat16)


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


def as_numpy(torch, t):
    t = t.detach()
    if t.dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2):
        bits = (
            t.contiguous().view(torch.int16 if t.dtype == torch.bfloat16 else torch.uint8).numpy()
        )
        return bits.view(
            {torch.bfloat16: BF16, torch.float8_e4m3fn: ml_dtypes.float8_e4m3fn}.get(
                t.dtype, ml_dtypes.float8_e5m2
            )
        )
    return t.numpy()


def same(torch, path, tensors):
    """Every tensor of the file has the dtype, shape and bits that torch has."""
    source = open_source(path)
    assert source.tensors.keys() == tensors.keys()
    for key, t in tensors.items():
        got, want = source.tensors[key].read(), as_numpy(torch, t)
        assert (got.dtype, got.shape) == (want.dtype, want.shape), key
        assert got.flags.c_contiguous and got.flags.writeable
        assert got.tobytes() == np.ascontiguousarray(want).tobytes(), key
    return source


def test_every_dtype(torch, tmp_path):
    names = ["bfloat16", "float16", "float32", "float64", "float8_e4m3fn", "float8_e5m2", "bool"]
    names += ["int8", "uint8", "int16", "int32", "int64", "uint16", "uint32", "uint64"]
    values = torch.arange(12).reshape(3, 4)
    tensors = {name: values.to(getattr(torch, name)) for name in names}
    torch.save(tensors, tmp_path / "t.pth")
    same(torch, tmp_path / "t.pth", tensors)


def test_strides_offsets_and_shared_storage(torch, tmp_path):
    base = torch.arange(120.0).reshape(4, 5, 6).to(torch.bfloat16)
    tensors = {
        "whole": base,
        "transposed": base.permute(2, 0, 1),
        "offset": base[1:, 2:, 3:],
        "steps": base[::2, ::3, 1::2],
        "column": base[:, 0, 0],
        "scalar": base[3, 4, 5],
        "empty": base[:0],
        "expanded": torch.ones(1, 3).expand(4, 3),
        "flat_transposed": base.reshape(20, 6).t(),
    }
    torch.save(tensors, tmp_path / "t.pth")
    source = same(torch, tmp_path / "t.pth", tensors)
    for name, tensor in source.tensors.items():
        if tensor.shape and tensor.size:
            np.testing.assert_array_equal(tensor.rows(1, 3).read(), tensor.read()[1:3], name)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_parameters_modules_and_levels(torch, tmp_path, protocol):
    module = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.LayerNorm(5))
    marked = torch.nn.Parameter(torch.ones(2))
    marked.note = "an attribute of a parameter"
    for saved, tensors, ignored in (
        (module.state_dict(), module.state_dict(), ()),
        ({"state_dict": module.state_dict(), "step": 3}, module.state_dict(), ()),
        (
            {"model": {"state_dict": dict(module.named_parameters())}},
            dict(module.named_parameters()),
            (),
        ),
        (
            {
                "a": marked,
                "step": 5,
                "lr": 1e-4,
                "size": torch.Size([1, 2]),
                "kind": torch.bfloat16,
            },
            {"a": marked},
            ("step", "lr", "size", "kind"),
        ),
    ):
        torch.save(saved, tmp_path / "t.pth", pickle_protocol=protocol)
        assert same(torch, tmp_path / "t.pth", tensors).ignored == ignored


def test_prefixes_are_stripped_and_counted(torch, tmp_path):
    ones = torch.ones(2)
    keys = [
        "net.blocks.0._checkpoint_wrapped_module.a",
        "net.blocks.1._checkpoint_wrapped_module.a",
        "module.net.b",
        "model.diffusion_model.c",
    ]
    torch.save(dict.fromkeys(keys, ones), tmp_path / "t.pth")
    source = open_source(tmp_path / "t.pth")
    assert set(source.tensors) == {"blocks.0.a", "blocks.1.a", "b", "c"}
    assert source.stripped == {
        "net.": 3,
        "_checkpoint_wrapped_module.": 2,
        "module.": 1,
        "model.diffusion_model.": 1,
    }
    torch.save({"net.a": ones, "a": ones}, tmp_path / "t.pth")
    with pytest.raises(CheckpointError, match="'a' under two prefixes"):
        open_source(tmp_path / "t.pth")


def test_reads_leave_nothing_mapped(torch, tmp_path):
    torch.save({"a": torch.ones(2**18)}, tmp_path / "t.pth")
    values = open_source(tmp_path / "t.pth").tensors["a"].read()
    assert "t.pth" not in Path("/proc/self/maps").read_text()
    (tmp_path / "t.pth").unlink()
    assert values.sum() == 2**18


@pytest.mark.parametrize(
    "saved, message",
    [
        ([1, 2], "holds no dict of tensors"),
        ({}, "an empty dict"),
        ({"optimizer": {"lr": 1}}, "found: optimizer"),
        ("tensor", "one tensor without a name"),
    ],
)
def test_files_without_a_state_dict(torch, tmp_path, saved, message):
    torch.save(torch.ones(2) if saved == "tensor" else saved, tmp_path / "t.pth")
    with pytest.raises(CheckpointError, match=message):
        open_source(tmp_path / "t.pth")


def objects():
    return {
        "namespace": argparse.Namespace(lr=1e-4),
        "path": pathlib.PurePosixPath("/x"),
        "set": {1, 2},
        "frozen": frozenset([1]),
        "date": datetime.datetime(2026, 1, 1),
        "scalar": np.float64(3),
        "array": np.ones(2),
        "counter": collections.Counter("aab"),
        "tuples": {(1, 2): 3},
        "complex": 1j,
        "nested": [{"a": {"b": {1}}}],
    }


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("name", objects())
def test_objects_beside_the_weights_are_left_unread(torch, tmp_path, protocol, name):
    weights = {"a": torch.ones(2), "b": torch.zeros(3)}
    saved = {name: objects()[name], "state_dict": weights, "step": 3}
    torch.save(saved, tmp_path / "t.pth", pickle_protocol=protocol)
    source = same(torch, tmp_path / "t.pth", weights)
    assert (source.level, source.ignored) == ("state_dict", (name,))
    torch.save(weights | {"odd": objects()["set"]}, tmp_path / "t.pth", pickle_protocol=protocol)
    with pytest.raises(CheckpointError, match="not a plain file of tensors.*set"):
        open_source(tmp_path / "t.pth")


@pytest.mark.parametrize(
    "layout, level",
    [
        (lambda w, t: {"model": w, "global_step": t}, "model"),
        (lambda w, t: {"global_step": t, "model": w, "rng": t}, "model"),
        (lambda w, t: {"generator_ema": w, "step": 1000}, "generator_ema"),
        (lambda w, t: {"generator": w, "generator_ema": w, "critic": {**w, "c": t}}, "generator"),
        (lambda w, t: {"model": {"step": t, "module": w}, "lr": t}, "model.module"),
        (lambda w, t: {"student": w, "optimizer": {"state": {0: {"m": t}}}}, "student"),
        (lambda w, t: w | {"step": 3}, ""),
        (lambda w, t: w | {"model": {"x": t}}, ""),
    ],
)
def test_the_weights_are_found_among_other_tensors(torch, tmp_path, layout, level):
    weights = {name: torch.full((2,), float(i)) for i, name in enumerate("abcd")}
    torch.save(layout(weights, torch.tensor(1000)), tmp_path / "t.pth")
    assert same(torch, tmp_path / "t.pth", weights).level == level


def test_two_sets_of_weights_that_nothing_tells_apart(torch, tmp_path):
    weights = {name: torch.ones(2) for name in "abcd"}
    torch.save({"student": weights, "critic": dict(weights)}, tmp_path / "t.pth")
    with pytest.raises(CheckpointError, match="several sets of tensors: student, critic"):
        open_source(tmp_path / "t.pth")


@pytest.mark.parametrize("where", ["data/0", "data/1", "data.pkl", "byteorder"])
def test_a_changed_bit_of_an_entry_is_found_when_it_is_read(torch, tmp_path, where):
    """By tensors that are a whole entry, that share one, and by rows of a table."""
    shared = torch.arange(64.0)
    path = tmp_path / "t.pth"
    torch.save({"whole": torch.ones(8, 4), "part": shared[5:20], "turned": shared[:6]}, path)
    read_all(path)
    with zipfile.ZipFile(path) as z:
        info = next(i for i in z.infolist() if i.filename.endswith(f"/{where}"))
    data = bytearray(path.read_bytes())
    name, extra = data[info.header_offset + 26], data[info.header_offset + 28]
    extra += 256 * data[info.header_offset + 29]
    data[info.header_offset + 30 + name + extra + info.file_size - 1] ^= 4
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=f"checksum of its entry '.*{where}'"):
        read_all(path)
    if where == "data/0":
        tensor = open_source(path).tensors["whole"]
        with pytest.raises(CheckpointError, match="checksum"):
            tensor.rows(1, 2).read()


def test_files_saved_without_checksums(torch, tmp_path):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.ones(8)}, tmp_path / "t.pth")
    finally:
        torch.serialization.set_crc32_options(before)
    same(torch, tmp_path / "t.pth", {"a": torch.ones(8)})


def test_shards_of_torch(torch, tmp_path):
    weights = {name: torch.full((2,), float(i)) for i, name in enumerate("abcd")}
    names = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    torch.save({k: weights[k] for k in "ab"}, tmp_path / names[0])
    torch.save({k: weights[k] for k in "cd"}, tmp_path / names[1])
    same(torch, tmp_path, weights)
    table = {k: names[k in "cd"] for k in weights}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": table}))
    same(torch, tmp_path, weights)


@pytest.mark.parametrize(
    "files, message",
    [
        ([".metadata", "__0_0.distcp"], "torch.distributed.*\n.*\n.*format_utils dcp_to_torch"),
        (["__0_0.distcp"], "torch.distributed"),
        (["zero_to_fp32.py", "latest"], "DeepSpeed.*\n.*\n.*zero_to_fp32.py"),
        (["global_step5/mp_rank_00_model_states.pt"], "DeepSpeed"),
    ],
)
def test_what_trainers_spread_over_files_is_named(tmp_path, files, message):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"PK")
    with pytest.raises(CheckpointError, match=message):
        open_source(tmp_path)


# Hostile files
# --------------------------------------------------------------------------------------------------


class Attack:
    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize(
    "function, name",
    [
        (os.system, r"(posix|nt)\.system"),
        (eval, "(builtins|__builtin__).eval"),
        (os.mkdir, r"(posix|nt)\.mkdir"),
    ],
)
def test_code_is_refused_by_name_and_not_run(tmp_path, write_pickle, protocol, function, name):
    marker = tmp_path / "executed"
    args = {
        os.system: f"touch {marker}",
        eval: f"open({str(marker)!r}, 'w')",
        os.mkdir: str(marker),
    }[function]
    data = pickle.dumps({"a": Attack(function, args)}, protocol=protocol)
    path = write_pickle(tmp_path / "evil.pth", data)
    with pytest.raises(
        CheckpointError, match=name if protocol > 1 else "pickle opcode|" + name
    ) as e:
        open_source(path)
    assert str(path) in str(e.value) and "nothing in it was executed" in str(e.value)
    assert not marker.exists()


def test_every_other_class_is_refused_by_its_full_name(tmp_path, write_pickle, torch_pickle_bytes):
    named = torch_pickle_bytes.Named
    for module, name in (
        ("argparse", "Namespace"),
        ("numpy.core.multiarray", "scalar"),
        ("torch.nn.modules.linear", "Linear"),
        ("torch._utils", "_rebuild_qtensor"),
        ("torch", "load"),
        ("torch", "ComplexFloatStorage"),
        ("collections", "defaultdict"),
        ("functools", "partial"),
        ("torch.storage", "_load_from_bytes"),
    ):
        path = write_pickle(
            tmp_path / "odd.pth", torch_pickle_bytes({"a": named(module, name, ())})
        )
        with pytest.raises(CheckpointError, match=f"{module}.{name}".replace(".", r"\.")):
            open_source(path)


def tensor_call(named, *, shape=(2,), stride=(1,), offset=0, count=2, key="0", kind="FloatStorage"):
    storage = ("storage", named("torch", kind, None), key, "cpu", count)
    return named("torch._utils", "_rebuild_tensor_v2", (storage, offset, shape, stride, False, {}))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"shape": (3,)}, "needs 12 bytes of storage '0', which has 8"),
        ({"offset": 1}, "needs 12 bytes"),
        ({"stride": (2,)}, "needs 12 bytes"),
        ({"offset": 2**60}, "needs"),
        ({"shape": (-1,)}, r"shape is \(-1,\)"),
        ({"shape": ("2",)}, "shape is"),
        ({"shape": (True,)}, "shape is"),
        ({"shape": (1,) * 65, "stride": (1,) * 65}, "shape is"),
        ({"stride": ()}, "strides"),
        ({"shape": (2**20, 2**20), "stride": (0, 0)}, "repetition of 8 bytes"),
        ({"count": 3, "shape": (3,)}, "should have 12 bytes and has 8"),
        ({"key": "1"}, "'archive/data/1' is missing"),
        ({"key": "../../../etc/passwd"}, "is missing"),
        ({"count": -2}, "size is"),
    ],
)
def test_views_outside_their_storage(tmp_path, write_pickle, torch_pickle_bytes, change, message):
    good = write_pickle(
        tmp_path / "good.pth",
        torch_pickle_bytes({"a": tensor_call(torch_pickle_bytes.Named)}),
        {"0": b"\0" * 8},
    )
    assert open_source(good).tensors["a"].read().shape == (2,)
    bad = write_pickle(
        tmp_path / "bad.pth",
        torch_pickle_bytes({"a": tensor_call(torch_pickle_bytes.Named, **change)}),
        {"0": b"\0" * 8},
    )
    with pytest.raises(CheckpointError, match=message):
        open_source(bad)


def test_pickles_that_would_take_for_ever(tmp_path, write_pickle):
    doubled = (
        b"\x80\x02)" + b"q\x00h\x00\x86" * 100
    )  # tuples of tuples: 2^100 items if anybody walks them
    for data in (
        doubled + b".",
        b"\x80\x02}(" + doubled[2:] + b"K\x01u.",  # as the key of a dict
        b"\x80\x02}q\x00h\x00X\x01\x00\x00\x00ah\x00s.",  # a dict that holds itself
        b"\x80\x02" + b"(" * 10000 + b".",
        b"\x80\x02cx\n" + b"y" * 2**20 + b"\n(h\x00" + b"\x93" * 99 + b".",
        b"\x80\x02\x8b\x00\x00\x10\x00" + b"\x7f" * 2**20 + b"\x85.",  # a number of a megabyte
        b"\x80\x02r\xff\xff\xff\xff.",  # a memo index of four thousand million
        b"\x80\x02X\xff\xff\xff\x7fa.",  # a string that says it has two gigabytes
        b"",
        b"\x80\x02",
        b".",
        b"}.",
    ):
        with pytest.raises(CheckpointError):
            open_source(write_pickle(tmp_path / "t.pth", data))


def test_pickles_of_more_steps_than_any_model_has(tmp_path, write_pickle, monkeypatch):
    monkeypatch.setattr(torch_pickle, "OPCODES", 1000)
    with pytest.raises(CheckpointError, match="more than 1000 steps"):
        open_source(write_pickle(tmp_path / "t.pth", b"\x80\x02" + b"N0" * 600 + b"."))


def test_archives(tmp_path, write_pickle, torch_pickle_bytes):
    data = torch_pickle_bytes({"a": tensor_call(torch_pickle_bytes.Named)})
    cases = [
        ({"compression": zipfile.ZIP_DEFLATED}, "compressed"),
        ({"extra": [("../evil", "x")]}, "leads outside"),
        ({"extra": [("/etc/evil", "x")]}, "leads outside"),
        ({"extra": [("archive\\..\\evil", "x")]}, "leads outside"),
        ({"extra": [("other/data.pkl", b".")]}, "not a torch file"),
        ({"extra": [("archive/constants.pkl", b".")]}, "TorchScript"),
    ]
    for options, message in cases:
        with pytest.raises(CheckpointError, match=message):
            open_source(write_pickle(tmp_path / "t.pth", data, {"0": b"\0" * 8}, **options))
    with zipfile.ZipFile(tmp_path / "t.pth", "w") as z:
        z.writestr("archive/data.pkl", data)
        z.writestr("archive/byteorder", "big")
    with pytest.raises(CheckpointError, match="big-endian"):
        open_source(tmp_path / "t.pth")
    with zipfile.ZipFile(tmp_path / "t.pth", "w") as z:
        z.writestr("x.npy", b"")
    with pytest.raises(CheckpointError, match="numpy archive"):
        open_source(tmp_path / "t.pth")


def test_other_formats_are_named(torch, tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "pickle.pth").write_bytes(pickle.dumps({"a": 1}, protocol=2))
    (tmp_path / "web.pth").write_bytes(b"<!DOCTYPE html><html>")
    (tmp_path / "hub.pth").write_bytes(b"<!doctype html>\n<html class='x'>")
    (tmp_path / "lfs.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "noise.pth").write_bytes(bytes(range(60, 160)))
    for name, message in {
        "old.pth": "before 1.6",
        "pickle.pth": "bare pickle",
        "web.pth": "web page",
        "hub.pth": "web page",
        "lfs.safetensors": "git-lfs pointer",
        "empty.pth": "is empty",
        "noise.pth": "neither a torch zip file, a safetensors file nor",
        "absent.pth": "does not exist",
    }.items():
        with pytest.raises(CheckpointError, match=message):
            open_source(tmp_path / name)


# Damage
# --------------------------------------------------------------------------------------------------


def read_all(path):
    for tensor in open_source(path).tensors.values():
        tensor.read()


def test_truncation_anywhere_is_a_checkpoint_error(torch, tmp_path):
    torch.save(
        {f"blocks.{i}.weight": torch.full((7, 5), float(i)) for i in range(6)}, tmp_path / "t.pth"
    )
    whole = (tmp_path / "t.pth").read_bytes()
    cut = tmp_path / "cut.pth"
    for length in [*range(80), *range(80, len(whole), 23), len(whole) - 1]:
        cut.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            read_all(cut)
    with pytest.raises(CheckpointError, match="truncated"):
        read_all(cut)


def test_changed_bytes_never_raise_anything_else(torch, tmp_path):
    torch.save(
        {f"blocks.{i}.weight": torch.full((3, 2), float(i)).t() for i in range(3)},
        tmp_path / "t.pth",
    )
    whole = (tmp_path / "t.pth").read_bytes()
    changed, rng, refused = tmp_path / "changed.pth", random.Random(0), 0
    for _ in range(600):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 1, 4))):
            data[rng.randrange(len(data))] = rng.randrange(256)
        changed.write_bytes(data)
        try:
            read_all(changed)
        except CheckpointError as e:
            refused += 1
            assert "changed.pth" in str(e)
    assert refused > 100
