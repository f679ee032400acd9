"""The transformer with kernels, interpreted against its reference form and lowered at real size."""

import dataclasses
import re
from collections import Counter

import described
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import put

from tdjax.config import DiTConfig, SLAConfig
from tdjax.models.abstract import as_shapes
from tdjax.models.wan_dit import DiT, with_linear
from tdjax.precision import FLOAT32

CFG = DiTConfig(
    dim=128,
    heads=2,
    ffn_dim=256,
    layers=2,
    in_channels=4,
    out_channels=4,
    freq_dim=16,
    text_dim=6,
    text_len=8,
    attention="sla",
    sla=SLAConfig(topk=0.67, block_q=64, block_k=64),
    policy=FLOAT32,
)
run = jax.jit(lambda model, *args: model(*args))


def floats(**changes):
    """A float model whose every leaf is random."""
    draw = np.random.default_rng(0).normal
    abstract = as_shapes(DiT, dataclasses.replace(CFG, **changes))
    width = lambda leaf: leaf.shape[-2] ** 0.5 if leaf.ndim > 1 and leaf.shape[-2] > 6 else 3
    return jax.tree.map(lambda leaf: put(draw(size=leaf.shape) / width(leaf), leaf.dtype), abstract)


def with_impl(model, impl):
    """The same weights under another `impl`."""
    abstract = as_shapes(DiT, dataclasses.replace(model.cfg, impl=impl))
    return jax.tree.unflatten(jax.tree.structure(abstract), jax.tree.leaves(model))


def normal(seed, *shape):
    return put(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def inputs(b=1):
    """160 tokens: three blocks, the last one half full."""
    return (
        normal(0, b, 2, 16, 20, 4),
        put(np.linspace(977.0, 104.0, b), jnp.float32),
        normal(1, b, 8, 6),
    )


def relative(actual, expected):
    return np.linalg.norm(np.asarray(actual, np.float64) - expected) / np.linalg.norm(expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "attention, linear", [("sla", "float"), ("sagesla", "int8_channel"), ("dense", "fp8")]
)
def test_kernels_give_the_reference(attention, linear):
    """float32 between the ops. Last bits move values of 8 bits over edges, two blocks deep; sagesla
    rounds scores to int8 besides."""
    model = with_linear(floats(attention=attention), linear)
    expected = np.asarray(run(with_impl(model, "reference"), *inputs()), np.float64)
    actual = run(with_impl(model, "interpret"), *inputs())
    assert relative(actual, expected) < (1e-5 if linear == "float" else 1e-2)


# What a step launches: row ops, then attention, then products. Sparse attention pools nothing: its
# means come with the rotation.
ROWS = {"norm_kernel": 3, "rows_kernel": 2}
SPARSE = {"summaries_kernel": 1, "choose_kernel": 1, "attend_kernel": 1, "forward_kernel": 1}
LAUNCHED = {
    ("dense", "float"): ROWS | {"forward_kernel": 2},
    ("sla", "int8"): ROWS | SPARSE | {"quantize_kernel": 7, "block_kernel": 10},
    ("sagesla", "int8_channel"): (
        ROWS | SPARSE | {"quantize_kernel": 4 + 2, "row_kernel": 10}
    ),  # two: queries and keys
    ("sla", "fp8"): ROWS | SPARSE | {"quantize_kernel": 4},
}


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="older versions describe no GPU")
@pytest.mark.parametrize("impl", ["auto", "mosaic"])
def test_mosaic_lowers_for_hopper(impl):
    """Ten products, two passes over tokens and the loop of attention; Triton's for the rest."""
    arg = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    cfg = DiTConfig(attention="sagesla", linear="int8_channel", impl=impl)
    model = as_shapes(DiT, cfg)
    args = arg(1, 21, 60, 104, 16), arg(1), arg(1, 512, 4096)
    text = described.lower(described.trace(run, model, *args)).as_text()
    called = Counter(re.findall(r"custom_call @([\w.$]+)", text))
    assert called == {"mosaic_gpu_v2": 10 + 2 + 1, "__gpu$xla.gpu.triton": 10}


@pytest.mark.slow
@pytest.mark.parametrize("attention, linear", LAUNCHED)
def test_kernels_lower_for_cuda_at_real_size(attention, linear):
    """The 1.3B model at 480p, without a GPU: the fast path holds exactly the kernels that it
    should."""
    arg = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    cfg = DiTConfig(attention=attention, linear=linear, impl="triton")
    model = as_shapes(DiT, cfg)
    lowered = described.lower(
        described.trace(run, model, arg(1, 21, 60, 104, 16), arg(1), arg(1, 512, 4096))
    )
    assert lowered.out_info.shape == (1, 21, 60, 104, 16)
    assert (
        Counter(re.findall(r'name = "(\w+_kernel)"', lowered.as_text()))
        == LAUNCHED[attention, linear]
    )
