from functools import partial

import described
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import put
from jaxprs import largest
from tolerances import assert_close

import pallas_kernels.sage_attention as op
import pallas_kernels.sparse_attention as float_op
from pallas_kernels import flash_attention
from pallas_kernels.sage_attention import quantize_blocks, workloads

SIZED = ("block_q", "block_k")
attention = jax.jit(flash_attention.attention)
block_map = jax.jit(float_op.block_map, static_argnames=("topk", *SIZED))
sparse_attention = jax.jit(float_op.sparse_attention, static_argnames=SIZED)
sparse_linear_attention = jax.jit(float_op.sparse_linear_attention, static_argnames="topk")
quantize_keys = jax.jit(op.quantize_keys, static_argnames=("block", "impl"))
sage_attention = jax.jit(op.sage_attention, static_argnames="impl")
sage_sparse_attention = jax.jit(op.sage_sparse_attention, static_argnames=SIZED)
sage_sparse_linear_attention = jax.jit(
    op.sage_sparse_linear_attention, static_argnames=("topk", *SIZED)
)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def qkv(b=1, l=500, h=2, k=64, dtype=jnp.float32):
    return tuple(put(normal(seed, b, l, h, k), dtype) for seed in range(3))


def agrees(actual, expected):
    """The published accuracy of int8 scores: cosine, and the sum of errors over the sum of
    values."""
    a, e = (np.asarray(x, np.float64).ravel() for x in (actual, expected))
    assert a @ e / np.sqrt(a @ a * (e @ e)) >= 0.9998
    assert np.abs(a - e).sum() / np.abs(e).sum() <= 0.021


def test_blocks_have_a_symmetric_scale():
    x = normal(0, 1, 2, 3, 8, 16)
    x[0, 0, 0] = 0
    values, scale = jax.jit(quantize_blocks)(x)
    assert values.dtype == jnp.int8 and scale.shape == (1, 2, 3)
    assert int(values.max()) == 127 or int(values.min()) == -127
    assert int(values.min()) >= -127 and float(scale[0, 0, 0]) > 0 and not values[0, 0, 0].any()
    values, scale, x = (np.asarray(a, np.float32) for a in (values, scale, x))
    assert (np.abs(values * scale[..., None, None] - x) <= 0.5001 * scale[..., None, None]).all()


def test_dense():
    q, k, v = qkv()
    agrees(sage_attention(q, k, v), attention(q, k, v))


def test_integers_are_exact():
    """Inputs on the int8 grid with a mean of zero lose nothing."""
    q, k = np.random.default_rng(0).integers(-126, 127, size=(2, 1, 64, 1, 16)).astype(np.float32)
    q[0, 0, 0, 0] = k[0, 0, 0, 0] = 127
    q, k = np.concatenate([q, q], 1) / 127, np.concatenate([k, -k], 1) / 64
    v = normal(0, *k.shape)
    assert_close(sage_attention(q, k, v), attention(q, k, v), "float32")


@pytest.mark.parametrize("block_q, block_k", [(128, 64), (64, 128)])
def test_sparse(block_q, block_k):
    q, k, v = qkv()
    sizes = {"block_q": block_q, "block_k": block_k}
    blocks = block_map(q, k, topk=0.4, **sizes)
    agrees(
        sage_sparse_attention(q, k, v, blocks, **sizes), sparse_attention(q, k, v, blocks, **sizes)
    )


def test_constant_keys_are_taken_off_before_rounding():
    q, k, v = qkv()
    assert_close(sage_attention(q, k + 100, v), sage_attention(q, k, v), "bf16")


@pytest.mark.slow
def test_with_linear_branch_in_bfloat16():
    q, k, v = qkv(dtype=jnp.bfloat16)
    proj = normal(3, 64, 64) / 8, np.ones(64, np.float32)
    o = sage_sparse_linear_attention(q, k, v, *proj, topk=0.4)
    assert o.dtype == jnp.bfloat16
    agrees(o, sparse_linear_attention(q, k, v, *proj, topk=0.4))


@pytest.mark.slow
def test_cuda_kernel_of_the_publishers(golden):
    """Theirs has e4m3 values and bfloat16 pooled scores, so query blocks are compared one by one,
    loosely."""
    g = golden("sla_cuda")
    q, k, v = (put(g[name], jnp.bfloat16) for name in "qkv")
    proj = put(g["proj_w"].T), put(g["proj_b"])
    o = np.asarray(
        sage_sparse_linear_attention(q, k, v, *proj, topk=0.2, block_q=64, block_k=128), np.float32
    )
    size = lambda x: np.array(
        [np.abs(x[0, i : i + 64]).sum((0, 2)) for i in range(0, 2000, 64)]
    )  # [q_blocks h]
    relative = size(o - g["out_sagesla_sm90"]) / size(g["out_sagesla_sm90"])
    assert (relative < 0.05).mean() >= 0.8, relative
    assert np.median(relative) < 0.035


@pytest.mark.slow
def test_lowers_for_cuda_at_real_size():
    x = jax.ShapeDtypeStruct((1, 32760, 12, 128), jnp.bfloat16)
    proj = jax.ShapeDtypeStruct((128, 128), jnp.float32), jax.ShapeDtypeStruct((128,), jnp.float32)
    described.lower(
        described.trace(
            jax.jit(lambda *a: sage_sparse_linear_attention(*a, topk=0.1)), x, x, x, *proj
        )
    )


def test_errors():
    q, k, v = qkv()
    with pytest.raises(ValueError, match=r"impl is 'cuda'; allowed: auto, reference"):
        sage_attention(q, k, v, impl="cuda")
    gradient = lambda: jax.grad(lambda q: sage_attention(q, k, v).sum())(q)
    tangent = lambda: jax.jvp(sage_attention, (q, k, v), (q, k, v))
    for differentiate in (gradient, tangent):
        with pytest.raises(
            NotImplementedError,
            match='int8 scores is forward only.*Train with attention "sla" or "dense"',
        ):
            differentiate()


@pytest.mark.slow
@pytest.mark.parametrize(
    "tail, block", [(0, 64), (1, 64), (16, 64), (56, 64), (80, 128), (120, 128)]
)
def test_keys(tail, block):
    k = put(normal(0, 2, block + tail, 2, 32) + 5, jnp.bfloat16)
    mean = k.mean(1, dtype=jnp.float32)
    values, scale = quantize_keys(k, mean, block=block, impl="interpret")
    expected, expected_scale = quantize_keys(k, mean, block=block, impl="reference")
    assert (
        values.dtype == jnp.int8
        and values.shape == k.shape
        and scale.shape == (2, 2, 2 if tail else 1)
    )
    assert_close(scale, expected_scale, "float32")
    smooth = np.asarray(k, np.float64) - np.asarray(mean, np.float64)[:, None]
    quotient = smooth / np.repeat(np.asarray(scale, np.float64), block, 2)[
        :, :, : k.shape[1], None
    ].swapaxes(1, 2)
    for rounded in (values, expected):  # the nearest whole number, or either one at a tie
        assert (np.abs(np.asarray(rounded) - quotient) <= 0.5 + 1e-4).all()
    assert np.abs(np.asarray(values)).max() == 127


def test_a_block_of_equal_keys_is_zero():
    k = jnp.full((1, 64, 1, 16), 3.0)
    values, scale = op.quantize_keys(k, jnp.full((1, 1, 16), 3.0), block=64, impl="interpret")
    assert not values.any() and float(scale[0, 0, 0]) > 0


@pytest.mark.slow
def test_a_nan_is_not_hidden():
    k = jnp.ones((1, 64, 1, 16)).at[0, 3, 0, 5].set(jnp.nan)
    for impl in ("reference", "interpret"):
        assert jnp.isnan(op.quantize_keys(k, jnp.zeros((1, 1, 16)), block=64, impl=impl)[1]).all()


@pytest.mark.parametrize("name", workloads.SHAPES)
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_keys_at_real_size(name, impl):
    """They trace, the reference lowers for CUDA, and no array is larger than the float32 form of
    the argument."""
    load = workloads.KEYS[name]
    args = jax.eval_shape(load.make, jax.random.key(0))
    assert 3 * args[0].size < load.bytes < 4.5 * args[0].size
    traced = jax.jit(partial(op.quantize_keys, block=64, impl=impl)).trace(*args)
    assert largest(traced.jaxpr.jaxpr) <= args[0].size * 4 * 1.01
    if impl == "reference":
        traced.lower(lowering_platforms=("cuda",))


def test_errors_of_keys():
    k = jnp.zeros((1, 8, 2, 16))
    with pytest.raises(
        ValueError,
        match=(
            r"quantize_keys: .*mean float32 \(1, 16\); expected \[b l h k\] and float32 \[b h k\]"
        ),
    ):
        op.quantize_keys(k, jnp.zeros((1, 16)), block=64)
    with pytest.raises(
        ValueError,
        match=(
            "quantize_keys: block is 24; the kernel takes powers of two; nearest: 16 and 32;"
            " impl='reference'"
        ),
    ):
        op.quantize_keys(k, jnp.zeros((1, 2, 16)), block=24, impl="interpret")
    with pytest.raises(NotImplementedError, match="quantize_keys is forward only"):
        jax.grad(lambda k: op.quantize_keys(k, jnp.zeros((1, 2, 16)), block=8)[1].sum())(k)
