"""Files of the layouts that people hold, made from their public descriptions and not by our writer:
opened, and compared with the same weights under Wan's own names."""

import dataclasses
import itertools
import json
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from tdjax.checkpoints import orbax
from tdjax.checkpoints.published.checkpoint import open_checkpoint
from tdjax.errors import CheckpointError
from tdjax.models.wan_dit import with_linear
from tdjax.precision import FLOAT32

F8 = ml_dtypes.float8_e4m3fn
F8_MAX = 448.0
BLOCK_LAYERS = [
    *(f"{a}_attn.{p}" for a in ("self", "cross") for p in "qkvo"),
    "ffn.0",
    "ffn.2",
]


@pytest.fixture(scope="module")
def weights(states):
    """Wan's own names, float32, one head of 128, two layers; numbers that bfloat16 holds."""
    rng, dim, ffn = np.random.default_rng(0), 128, 256
    shapes = {}
    for key, value in states("dit").items():
        layer = key.split(".")[1] if key.startswith("blocks.") else "0"
        if int(layer) < 2:
            shapes[key] = value.shape
    old = {states("dit")["blocks.0.self_attn.q.weight"].shape[0]: dim}
    old[states("dit")["blocks.0.ffn.0.weight"].shape[0]] = ffn
    old[states("dit")["time_projection.1.weight"].shape[0]] = 6 * dim
    made = {}
    for key, shape in shapes.items():
        shape = tuple(old.get(n, n) for n in shape)
        made[key] = rng.normal(0, 0.1, shape).astype(ml_dtypes.bfloat16).astype(np.float32)
    return made


@pytest.fixture
def opened(tmp_path, write_safetensors):
    """opened(state, metadata) -> Checkpoint of a file that holds it."""
    numbers = itertools.count()

    def open_(state, metadata=None, **known):
        path = tmp_path / f"model{next(numbers)}.safetensors"
        return open_checkpoint(write_safetensors(path, state, metadata), **known)

    return open_


def leaves_of(file, linear=None):
    config = dataclasses.replace(file.config, policy=FLOAT32)
    module = file.load(config)
    return orbax.named_leaves(module if linear is None else with_linear(module, linear))


def same(file, plain):
    a, b = leaves_of(file), leaves_of(plain)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(np.asarray(a[name]), np.asarray(b[name]), err_msg=name)


def in_blocks(key):
    return key.endswith(".weight") and any(f".{layer}.weight" in key for layer in BLOCK_LAYERS)


def matrices(state):
    return [k for k, v in state.items() if k.endswith(".weight") and v.ndim == 2]


def rounded(state, keys, dtype, scale_of):
    """(what is stored: {key: values}, {key: scale}, the float32 weights that these mean)."""
    values, scales, meant = {}, {}, dict(state)
    for key in keys:
        scale = scale_of(state[key]).astype(np.float32)
        quotient = state[key] / scale
        q = (np.round(quotient) if dtype == np.int8 else quotient).astype(dtype)
        values[key], scales[key] = q, scale
        meant[key] = q.astype(np.float32) * scale
    return values, scales, meant


by_tensor = lambda top: lambda w: np.abs(w).max() / top
by_row = lambda top: lambda w: np.maximum(np.abs(w).max(1, keepdims=True), 1e-5) / top


# -- wrappers, marks, gates ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prefix",
    [
        "diffusion_model.",
        "model.diffusion_model.",
        "model.",
        "net.",
        "module.",
        "_orig_mod.",
        "generator.",
        "generator_ema.",
        "model._orig_mod.",
        "generator_ema.model.",
    ],
)
def test_prefixes_of_wrappers(opened, weights, prefix):
    same(opened({prefix + k: v for k, v in weights.items()}), opened(weights))


def test_marks_are_left_out_with_a_note(opened, weights):
    marks = {
        "model_type.Wan2_1-T2V-14B": np.zeros(1, np.float32),
        "blocks.0.self_attn.q._extra_state": np.zeros(3, np.uint8),
    }
    file = opened(weights | marks)
    (note,) = file.notes
    assert "model_type.Wan2_1-T2V-14B" in note and "_extra_state" in note
    same(file, opened(weights))


def test_gates_of_sparse_attention_are_left_out_with_a_note(opened, weights):
    gates = {
        f"blocks.{i}.to_gate_compress.{part}": np.ones(shape, np.float32)
        for i in range(2)
        for part, shape in (("weight", (128, 128)), ("bias", (128,)))
    }
    file = opened(weights | gates)
    (note,) = file.notes
    assert "4 gates" in note and "to_gate_compress" in note
    same(file, opened(weights))


# -- 8 bits with scales ----------------------------------------------------------------------------


def comfy_old(state, keys):
    """`scale_weight` and the mark: float32 means e4m3fn."""
    values, scales, meant = rounded(state, keys, F8, by_tensor(F8_MAX))
    file = state | values | {k.replace(".weight", ".scale_weight"): s for k, s in scales.items()}
    file |= {k.replace(".weight", ".scale_input"): np.ones((), np.float32) for k in keys}
    return {"scaled_fp8": np.zeros(0, F8)} | file, meant, None


def comfy_new(state, keys, metadata=False):
    """`weight_scale`, and the format as bytes of JSON beside each layer or in the metadata."""
    values, scales, meant = rounded(state, keys, F8, by_tensor(F8_MAX))
    scales = {k.replace(".weight", ".weight_scale"): s for k, s in scales.items()}
    about = {"format": "float8_e4m3fn"}
    if metadata:
        layers = {k.removesuffix(".weight"): about for k in keys}
        return (
            state | values | scales,
            meant,
            {"_quantization_metadata": json.dumps({"layers": layers})},
        )
    text = np.frombuffer(json.dumps(about).encode(), np.uint8)
    marks = {k.replace(".weight", ".comfy_quant"): text for k in keys}
    return state | values | scales | marks, meant, None


def lightx2v(state, keys, dtype):
    top = {np.dtype(np.int8): 127.0, np.dtype(F8): F8_MAX}[np.dtype(dtype)]
    values, scales, meant = rounded(state, keys, dtype, by_row(top))
    scales = {k.replace(".weight", ".weight_scale"): s for k, s in scales.items()}
    return state | values | scales, meant, None


LAYOUTS = {
    "comfy, scale_weight": (comfy_old, "fp8"),
    "comfy, comfy_quant": (comfy_new, "fp8"),
    "comfy, metadata": (partial(comfy_new, metadata=True), "fp8"),
    "lightx2v float8": (partial(lightx2v, dtype=F8), "fp8"),
    "lightx2v int8": (partial(lightx2v, dtype=np.int8), "int8_channel"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_8_bits_are_kept_as_they_are(opened, weights, layout):
    """No weight is quantised anew, and dequantised they are what the file means, to a rounding."""
    make, kind = LAYOUTS[layout]
    keys = [key for key in weights if in_blocks(key)]
    assert len(keys) == 2 * len(BLOCK_LAYERS)
    state, meant, metadata = make(weights, keys)
    file = opened(state, metadata)
    assert file.config.linear == file.linear == kind and not file.notes
    stored = leaves_of(file)["blocks.self_attn.q.weight"]
    np.testing.assert_array_equal(
        np.asarray(stored[1]).astype(np.float32),
        state["blocks.1.self_attn.q.weight"].astype(np.float32),
    )
    floats, expected = leaves_of(file, "float"), leaves_of(opened(meant))
    for name in expected:
        np.testing.assert_array_equal(
            np.asarray(floats[name]), np.asarray(expected[name]), err_msg=name
        )


@pytest.mark.slow
def test_the_network_of_8_bits_is_that_of_the_same_numbers(opened, weights):
    """Kept in 8 bits, the network differs from its dequantised weights by the rounding of
    activations alone."""
    file = opened(lightx2v(weights, [k for k in weights if in_blocks(k)], np.int8)[0])
    module = file.load(dataclasses.replace(file.config, policy=FLOAT32))
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(1, 2, 4, 4, file.config.out_channels)), jnp.float32)
    text = jnp.asarray(rng.normal(size=(1, 8, file.config.text_dim)), jnp.float32)
    run = jax.jit(lambda m: m(x, jnp.full(1, 500.0), text))
    int8, floats = run(module), run(with_linear(module, "float"))
    error = np.linalg.norm(int8 - floats) / np.linalg.norm(floats)
    assert 0 < error < 2e-2  # int8 tokens: 1 / (127 sqrt(12)) of the largest, a few layers


def test_what_is_not_of_8_bits_throughout_is_dequantised(opened, weights):
    keys = [k for k in matrices(weights) if "blocks.0.ffn" not in k]
    state, meant, _ = comfy_old(weights, keys)
    file = opened(state)
    assert file.config.linear == "float"
    assert "18 of 20 linear layers" in file.notes[0]
    same(file, opened(meant))


def test_full_precision_is_honoured(opened, weights):
    keys = [key for key in weights if in_blocks(key)]
    state, meant, _ = comfy_old(weights, keys)
    file = opened(state | {"scaled_fp8": np.zeros(2, F8)})
    assert file.config.linear == "float" and "full precision" in file.notes[0]
    same(file, opened(meant))


def test_text_encoders_are_dequantised(opened, states):
    state = states("transformers")
    keys = [k for k in matrices(state) if "relative" not in k]
    file_state, meant, _ = comfy_old(state, keys)
    file = opened(file_state)
    assert file.kind == "text" and "dequantised" in file.notes[0]
    same(file, opened(meant))


@pytest.mark.parametrize("kind", ["int8", "tiles", "fp8"])
def test_a_lora_is_added_to_what_8_bits_mean(opened, weights, write_safetensors, tmp_path, kind):
    keys = [key for key in weights if in_blocks(key)]
    if kind == "tiles":
        state, meant = tiled(weights, keys)
    else:
        state, meant, _ = lightx2v(weights, keys, {"int8": np.int8, "fp8": F8}[kind])
    rng, key = np.random.default_rng(2), "blocks.1.ffn.0"
    down, up = rng.normal(size=(4, 128)), rng.normal(size=(256, 4))
    lora = {
        f"diffusion_model.{key}.lora_A.weight": down,
        f"diffusion_model.{key}.lora_B.weight": up,
    }
    lora = {k: v.astype(np.float32) for k, v in lora.items()}
    path = write_safetensors(tmp_path / "lora.safetensors", lora)
    file = opened(state, lora=((str(path), 0.5),))
    assert file.config.linear == "float" and file.linear != "float"
    expected = leaves_of(opened(meant))
    got = leaves_of(file)
    changed = meant[f"{key}.weight"] + 0.5 * up @ down
    np.testing.assert_allclose(got["blocks.up.kernel"][1], changed.T, rtol=1e-5, atol=1e-5)
    for name in expected.keys() - {"blocks.up.kernel"}:
        np.testing.assert_array_equal(np.asarray(got[name]), np.asarray(expected[name]))


def test_a_lora_on_plain_float8_is_not_rounded_away(opened, weights, write_safetensors, tmp_path):
    """A tenth of the values' own steps, as a LoRA usually is."""
    keys = [key for key in weights if in_blocks(key)]
    state = weights | {key: weights[key].astype(F8) for key in keys}
    rng, key = np.random.default_rng(2), "blocks.1.ffn.0"
    down, up = (rng.normal(0, 0.02, shape).astype(np.float32) for shape in ((4, 128), (256, 4)))
    lora = {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
    path = write_safetensors(tmp_path / "lora.safetensors", lora)
    got = opened(state, lora=((str(path), 1.0),)).tensors[f"{key}.weight"].read()
    base = state[f"{key}.weight"].astype(np.float32)
    np.testing.assert_allclose(got - base, up @ down, rtol=0, atol=1e-6)


def tiled(state, keys):
    """The official -quant files: int8 in tiles of 128 x 128."""
    file, meant = dict(state), dict(state)
    for key in keys:
        w = file.pop(key)
        rows, columns = (-(-n // 128) for n in w.shape)
        tiles = w.reshape(rows, 128, columns, 128)
        scale = (np.abs(tiles).max((1, 3)) / 127).astype(np.float32)
        q = np.round(tiles / scale[:, None, :, None]).astype(np.int8)
        meant[key] = (q.astype(np.float32) * scale[:, None, :, None]).reshape(w.shape)
        file[key.replace(".weight", ".int8_weight")] = q.reshape(w.shape)
        file[key.replace(".weight", ".scale")] = scale
    return file, meant


# -- formats that are not read ---------------------------------------------------------------------


def json_bytes(**fields):
    return np.frombuffer(json.dumps(fields).encode(), np.uint8)


LAYER = "blocks.0.ffn.0"
E8M0 = ml_dtypes.float8_e8m0fnu
REFUSED = {
    "NVFP4": {
        "weight": np.zeros((256, 64), np.uint8),
        "weight_scale": np.zeros((256, 8), F8),
        "weight_scale_2": np.ones((), np.float32),
    },
    "NVFP4 ": {
        "weight": np.zeros((256, 64), np.uint8),
        "weight_scale": np.zeros((256, 8), F8),
        "input_global_scale": np.ones((), np.float32),
    },
    "MXFP8": {
        "weight": np.zeros((256, 128), F8),
        "weight_scale": np.zeros((256, 4), np.uint8),
    },
    "convrot": {
        "weight": np.zeros((256, 128), np.int8),
        "weight_scale": np.ones((256, 1), np.float32),
        "comfy_quant": json_bytes(format="int8_tensorwise", convrot=True),
    },
    "4-bit": {
        "weight": np.zeros((256, 64), np.uint8),
        "weight_scale": np.ones((256, 1), np.float32),
        "comfy_quant": json_bytes(format="asym_w4a8_int8"),
    },
    "'q7'": {
        "weight": np.zeros((256, 64), np.uint8),
        "weight_scale": np.ones((256, 1), np.float32),
        "comfy_quant": json_bytes(format="q7"),
    },
    "damaged": {"comfy_quant": np.frombuffer(b"{", np.uint8)},
    "the scale of": {"weight": np.zeros((256, 128), F8), "weight_scale": np.ones(7, np.float32)},
    "no weight": {"weight": None, "weight_scale": np.ones((), np.float32)},
}


@pytest.mark.parametrize("what", REFUSED)
def test_other_formats_are_refused_by_name(opened, weights, what):
    parts = {f"{LAYER}.{part}": value for part, value in REFUSED[what].items()}
    state = {k: v for k, v in (weights | parts).items() if v is not None}
    with pytest.raises(CheckpointError, match=what.strip()) as error:
        opened(state)
    assert len(str(error.value).splitlines()) == 3 and LAYER in str(error.value)


PACKED = {
    "bitsandbytes": ("weight", "weight.absmax", "weight.quant_state.bitsandbytes__nf4"),
    "bitsandbytes ": ("weight", "SCB"),
    "quanto": ("weight._data", "weight._scale"),
    "torchao": ("_weight_qdata", "_weight_scale"),
    "SVDQuant": ("qweight", "wscales"),
}


@pytest.mark.parametrize("what", PACKED)
def test_weights_that_a_library_has_packed_are_refused_by_name(opened, weights, what):
    """As folders of diffusers hold them: the weight itself is bytes of another shape, or gone."""
    state = {k: v for k, v in weights.items() if k != f"{LAYER}.weight"}
    state |= {f"{LAYER}.{part}": np.zeros((16384, 1), np.uint8) for part in PACKED[what]}
    with pytest.raises(CheckpointError, match=f"holds .*{what.strip()}.*\n.*\n.*fp8_scaled"):
        opened(state)


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "model.diffusion_model."])
def test_formats_in_the_metadata_are_found_under_any_prefix(opened, weights, prefix):
    """A rotated weight looks like a plain one but for what the metadata says of it."""
    keys = [key for key in weights if in_blocks(key)]
    state, _, _ = lightx2v(weights, keys, np.int8)
    about = {"format": "int8_tensorwise", "convrot": True}
    layers = {prefix + key.removesuffix(".weight"): about for key in keys}
    table = {"_quantization_metadata": json.dumps({"layers": layers})}
    with pytest.raises(CheckpointError, match="rotated int8 weights"):
        opened({prefix + key: value for key, value in state.items()}, table)


@pytest.mark.parametrize("channels", [52, 24, 20])
def test_transformers_of_other_tasks_are_refused(opened, weights, channels):
    patch = np.zeros((128, channels * 4), np.float32)
    with pytest.raises(CheckpointError, match=f"reads {channels} channels"):
        opened(weights | {"patch_embedding.weight": patch})
