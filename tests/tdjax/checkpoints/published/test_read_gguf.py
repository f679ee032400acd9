"""GGUF files, written by the format's own library: transformers and umT5, every type of block."""

import dataclasses
import struct

import gguf
import numpy as np
import pytest

from tdjax.checkpoints import orbax
from tdjax.checkpoints.published.checkpoint import open_checkpoint
from tdjax.checkpoints.published.files import open_source
from tdjax.checkpoints.published.read_gguf import BLOCKS, read_gguf, vocabulary
from tdjax.errors import CheckpointError
from tdjax.precision import FLOAT32

Type = gguf.GGMLQuantizationType
UMT5 = {  # names of transformers -> of llama.cpp
    "shared": "token_embd",
    "encoder.final_layer_norm": "enc.output_norm",
    "layer.0.layer_norm": "attn_norm",
    "layer.0.SelfAttention.relative_attention_bias": "attn_rel_b",
    "layer.0.SelfAttention": "attn",
    "layer.1.layer_norm": "ffn_norm",
    "layer.1.DenseReluDense.wi_0": "ffn_gate",
    "layer.1.DenseReluDense.wi_1": "ffn_up",
    "layer.1.DenseReluDense.wo": "ffn_down",
}


def write(path, tensors, arch="wan", kinds=None, metadata=None):
    """A file of the library's writer. kinds: {key: type of its blocks}; others as they are."""
    writer = gguf.GGUFWriter(path, arch)
    for name, shape in (metadata or {}).items():
        put = writer.add_string if isinstance(shape, str) else writer.add_array
        put(f"comfy.gguf.orig_shape.{name}", shape)
    for key, value in tensors.items():
        kind = (kinds or {}).get(key)
        if kind is None:
            writer.add_tensor(key, np.ascontiguousarray(value))
        elif value.dtype == np.uint8:
            writer.add_tensor(key, value, raw_dtype=kind)
        else:
            writer.add_tensor(key, gguf.quants.quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def leaves_of(path, **known):
    file = open_checkpoint(path, **known)
    module = file.load(dataclasses.replace(file.config, policy=FLOAT32))
    return orbax.named_leaves(module)


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(np.asarray(a[name]), np.asarray(b[name]), err_msg=name)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_transformer(tmp_path, states, write_safetensors, prefix):
    """The patch embedding has five axes, or four and its shape in the metadata."""
    state = states("diffusers")
    plain = write_safetensors(tmp_path / "plain.safetensors", state)
    patch = "patch_embedding.weight"
    flat = {prefix + k: v for k, v in state.items()}
    flat[prefix + patch] = state[patch].reshape(state[patch].shape[0], -1)
    metadata = {prefix + patch: state[patch].shape}
    path = write(tmp_path / "model.gguf", flat, metadata=metadata)
    same(leaves_of(path, heads=4), leaves_of(plain, heads=4))


def test_umt5(tmp_path, states, write_safetensors):
    state = states("transformers")
    renamed = {}
    for key, value in state.items():
        name = key.removesuffix(".weight").replace("encoder.block.", "enc.blk.")
        for theirs, ours in UMT5.items():
            name = name.replace(theirs, ours)
        renamed[name.replace("attn.", "attn_") + ".weight"] = value
    path = write(tmp_path / "umt5.gguf", renamed, arch="t5encoder")
    plain = write_safetensors(tmp_path / "plain.safetensors", state)
    same(leaves_of(path), leaves_of(plain))


def test_the_file_in_a_folder(tmp_path):
    path = write(tmp_path / "model-Q8_0.gguf", {"a": np.ones((2, 32), np.float32)})
    assert open_source(tmp_path).files == (path,)
    with pytest.raises(CheckpointError, match="it holds: model-Q8_0.gguf"):
        open_source(tmp_path / "model-Q4_0.gguf")


def half(raw):
    return raw.view(np.float16).astype(np.float64)


def q8_0(raw):  # [n 34]: fp16 scale, 32 int8
    return half(raw[:, :2]) * raw[:, 2:].view(np.int8)


def q4_0(raw):  # [n 18]: fp16 scale, 32 of 4 bits, low halves first
    q = np.concatenate([raw[:, 2:] & 15, raw[:, 2:] >> 4], 1).astype(np.float64)
    return half(raw[:, :2]) * (q - 8)


def q4_k(raw):  # [n 144]: scale and minimum, 8 pairs of 6 bits for groups of 32, 256 of 4 bits
    top, low = half(raw[:, :2]), half(raw[:, 2:4])
    packed, q = raw[:, 4:16].astype(np.int64), raw[:, 16:].reshape(-1, 4, 32)
    first, last = packed[:, :8] & 63, (packed[:, 8:] & 15, packed[:, 8:] >> 4)
    scale = np.concatenate([first[:, :4], last[0] | ((packed[:, :4] >> 6) << 4)], 1)
    least = np.concatenate([first[:, 4:], last[1] | ((packed[:, 4:8] >> 6) << 4)], 1)
    values = np.stack([q & 15, q >> 4], 2).reshape(-1, 8, 32).astype(np.float64)
    return ((top * scale)[..., None] * values - (low * least)[..., None]).reshape(len(raw), -1)


def q6_k(raw):  # [n 210]: 128 low halves, 64 of two bits, 16 int8 scales, fp16
    low, high = raw[:, :128].reshape(-1, 2, 64), raw[:, 128:192].reshape(-1, 2, 32)
    scale, top = raw[:, 192:208].view(np.int8).astype(np.float64), half(raw[:, 208:])
    low = np.concatenate([low & 15, low >> 4], 2).reshape(-1, 2, 4, 32)
    high = np.stack([(high >> shift) & 3 for shift in (0, 2, 4, 6)], 2)
    q = (low | (high << 4)).reshape(-1, 16, 16).astype(np.float64) - 32
    return (top[..., None] * scale[..., None] * q).reshape(len(raw), -1)


ORACLES = {"Q8_0": q8_0, "Q4_0": q4_0, "Q4_K": q4_k, "Q6_K": q6_k}


def blocks(kind, count, seed=0):
    """Random blocks [count bytes] whose scales are finite and small."""
    size = gguf.GGML_QUANT_SIZES[Type[kind]][1]
    raw = np.random.default_rng(seed).integers(0, 256, (count, size)).astype(np.uint8)
    scale = np.full((count, 1), 0.01, np.float16).view(np.uint8)
    at = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,)}.get(kind, (0,))
    at = (0, 2) if kind in ("Q4_K", "Q5_K", "Q4_1", "Q5_1") else at
    for place in at:
        raw[:, place : place + 2] = scale
    return raw


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks(tmp_path, kind):
    """Each tensor is read at its own place; four kinds against their published layout in
    float64."""
    raw = {"a": blocks(kind, 6), "b": blocks(kind, 4, 1)}
    rows = {key: value.reshape(2, -1) for key, value in raw.items()}
    path = write(tmp_path / "x.gguf", rows, kinds=dict.fromkeys(rows, Type[kind]))
    tensors, metadata = read_gguf(path)
    assert metadata["general.architecture"] == "wan"
    for key, value in raw.items():
        got, (per_block, _) = tensors[key].read(), gguf.GGML_QUANT_SIZES[Type[kind]]
        assert got.shape == tensors[key].shape == (2, len(value) // 2 * per_block)
        assert got.dtype == np.float32 and np.isfinite(got).all()
        expected = gguf.quants.dequantize(value, Type[kind]).reshape(got.shape)
        np.testing.assert_array_equal(got, expected)
        if kind in ORACLES:
            np.testing.assert_allclose(
                got, ORACLES[kind](value).reshape(got.shape), rtol=1e-6, atol=1e-7
            )


# Of the largest value of a block: half a step of 127; with 16 steps below zero and 15 above (8 and
# 7), the value opposite to the largest is cut by a whole one.
STEPS = {"Q8_0": 0.5 / 127, "Q5_0": 1 / 16, "Q4_0": 1 / 8}


@pytest.mark.parametrize("kind", STEPS)
def test_rounding(tmp_path, kind):
    key, rng = "blocks.0.ffn.0.weight", np.random.default_rng(0)
    value = rng.normal(size=(64, 96)).astype(np.float32)
    path = write(tmp_path / "x.gguf", {key: value}, kinds={key: Type[kind]})
    got = read_gguf(path)[0][key].read()
    largest = np.abs(value.reshape(-1, 32)).max(1)
    error = np.abs(got - value).reshape(-1, 32).max(1)
    fp16 = 2.0**-11  # the scale's own rounding
    assert (error <= (STEPS[kind] + fp16) * largest).all()


def test_bfloat16(tmp_path):
    values = np.random.default_rng(0).normal(size=(3, 32)).astype(np.float32)
    path = write(tmp_path / "x.gguf", {"a": values}, kinds={"a": Type.BF16})
    got = read_gguf(path)[0]["a"].read()
    np.testing.assert_allclose(got.astype(np.float32), values, rtol=2**-8)


def test_other_networks_and_types_are_named(tmp_path):
    path = write(tmp_path / "x.gguf", {"a": np.zeros((2, 32), np.float32)}, arch="llama")
    with pytest.raises(CheckpointError, match="the network 'llama'"):
        open_checkpoint(path)
    raw = {"a": np.zeros((2, gguf.GGML_QUANT_SIZES[Type.IQ4_NL][1]), np.uint8)}
    path = write(tmp_path / "y.gguf", raw, kinds={"a": Type.IQ4_NL})
    with pytest.raises(CheckpointError, match="'a' is of type IQ4_NL\nread are .*Q8_0"):
        read_gguf(path)


def header(count=0, pairs=b"", number=0, tensors=b""):
    return b"GGUF" + struct.pack("<IQQ", 3, count, number) + pairs + tensors


def text(value: bytes):
    return struct.pack("<Q", len(value)) + value


HUGE = 2**62
DAMAGED = {
    "promises": header(count=HUGE),
    "promises ": header(number=HUGE),
    "promises  ": header(
        number=1, pairs=text(b"a") + struct.pack("<IIQ", 9, 8, HUGE), tensors=bytes(64)
    ),
    "promises   ": header(
        number=1, pairs=text(b"a") + struct.pack("<IIQ", 9, 4, HUGE), tensors=bytes(64)
    ),
    "inside its header": header(number=1, pairs=struct.pack("<Q", HUGE) + bytes(64)),
    "metadata has type 77": header(
        number=1, pairs=text(b"a") + struct.pack("<I", 77), tensors=bytes(64)
    ),
    "list of type 9": header(
        number=1, pairs=text(b"a") + struct.pack("<IIQ", 9, 9, 1), tensors=bytes(64)
    ),
    "not text": header(number=1, pairs=text(b"\xff\xfe") + bytes(64)),
    "has 9 axes": header(count=1, tensors=text(b"a") + struct.pack("<I", 9) + bytes(96)),
    "truncated": header(count=1, tensors=text(b"a") + struct.pack("<IQQIQ", 2, 2**31, 2**31, 0, 0)),
    "another version": b"GGUF" + struct.pack("<IQQ", 9, 0, 0),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_damaged_files(tmp_path, what):
    path = tmp_path / "x.gguf"
    path.write_bytes(DAMAGED[what])
    with pytest.raises(CheckpointError, match=what.strip()):
        read_gguf(path)


def test_files_that_end_early(tmp_path):
    path = write(tmp_path / "x.gguf", {"a": np.ones((4, 32), np.float32)})
    data = path.read_bytes()
    for end in range(0, len(data), 7):
        path.write_bytes(data[:end])
        with pytest.raises(CheckpointError):
            read_gguf(path)


@pytest.mark.parametrize("given", ["2, 32", ["2", "32"], [-2, -32], [2.0, 32.0], [2, 33], [1] * 9])
def test_shapes_in_the_metadata_that_are_none(tmp_path, given):
    path = write(tmp_path / "x.gguf", {"a": np.ones((2, 32), np.float32)}, metadata={"a": given})
    with pytest.raises(CheckpointError, match=r"'a' has shape \[2, 32\]\nits metadata says"):
        read_gguf(path)


def test_blocks_of_a_tensor_without_axes(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(header(count=1, tensors=text(b"a") + struct.pack("<IIQ", 0, 8, 0) + bytes(99)))
    with pytest.raises(CheckpointError, match="has rows of 1\nQ8_0 has blocks of 32"):
        read_gguf(path)


PIECES = {"tokens": ["a", "b"], "scores": [-1.0, -2.0], "token_type": [1, 1]}


@pytest.mark.parametrize(
    "odd",
    [
        {"tokens": [1, 2]},
        {"tokens": ["a"]},
        {"scores": [1, 2]},
        {"token_type": [1.0, float("nan")]},
        {"precompiled_charsmap": "abc"},
        {"precompiled_charsmap": ["abc"]},
    ],
)
def test_tokenizers_whose_parts_do_not_fit(tmp_path, odd):
    def made(parts):
        writer = gguf.GGUFWriter(tmp_path / "x.gguf", "t5encoder")
        writer.add_tokenizer_model("t5")
        for name, values in parts.items():
            put = writer.add_string if isinstance(values, str) else writer.add_array
            put(f"tokenizer.ggml.{name}", values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return tmp_path / "x.gguf"

    assert vocabulary(made(PIECES))["pieces"] == [("a", -1.0, 1), ("b", -2.0, 1)]
    with pytest.raises(CheckpointError, match="holds no tokenizer of umT5\nits tokens"):
        vocabulary(made(PIECES | odd))
