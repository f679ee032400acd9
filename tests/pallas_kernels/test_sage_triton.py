"""The int8 kernels, interpreted, against their reference and against float attention."""

from functools import partial

import described
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import put
from tolerances import assert_close

import pallas_kernels.sage_attention as op
from pallas_kernels import sparse_attention
from pallas_kernels.flash_attention import workloads as dense_shapes
from pallas_kernels.online_softmax import BOUND
from pallas_kernels.sage_attention import triton
from pallas_kernels.sparse_attention import workloads as sparse_shapes

SLA = sparse_attention.sparse_linear_attention


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def qkv(b=1, l=300, h=1, k=16, dtype=jnp.float32):
    return tuple(put(normal(seed, b, l, h, k), dtype) for seed in range(3))


def proj(k):
    return put(normal(3, k, k) / 8), put(normal(4, k))


def both(function, *args, **sizes):
    """The kernels' result and the reference's."""
    run = jax.jit(lambda *args, impl: function(*args, impl=impl, **sizes), static_argnames="impl")
    return run(*args, impl="interpret"), run(*args, impl="reference")


# lengths modulo the block of keys: 1 and 56
@pytest.mark.slow
@pytest.mark.parametrize("l, block_q, block_k", [(257, 64, 128), (312, 64, 64)])
def test_sparse_equals_the_reference(l, block_q, block_k):
    q, k, v = qkv(b=2, l=l, h=2)
    sizes = {"block_q": block_q, "block_k": block_k}
    mapped = jax.jit(partial(sparse_attention.block_map, topk=0.5, **sizes))
    blocks = np.array(mapped(q, k))
    blocks[:, :, 0, -1] = -(-l // block_k) - 1  # the tail block is among them
    o, expected = both(op.sage_sparse_attention, q, k, v, blocks, **sizes)
    assert_close(o, expected, "float32")


@pytest.mark.slow
def test_dense_needs_no_list():
    q, k, v = qkv(l=200)
    o, expected = both(op.sage_attention, q, k[:, :70], v[:, :70])
    assert_close(o, expected, "float32")


@pytest.mark.parametrize("l", [1, 65])
def test_keys_without_variation_do_not_leak_past_the_end(l):
    """Their scale is the least there is; scores that are not there must still count as minus
    infinity."""
    q, k, v = qkv(l=l)
    o = jax.jit(partial(op.sage_attention, impl="interpret"))(q, jnp.ones_like(k), v)
    assert_close(o, jnp.broadcast_to(v.mean(1, keepdims=True), v.shape), "float32")


@pytest.mark.slow
def test_with_linear_branch():
    q, k, v = qkv(l=200)
    o, expected = both(op.sage_sparse_linear_attention, q, k, v, *proj(16), topk=0.5)
    assert_close(o, expected, "float32")


@pytest.mark.parametrize("function", [op.sage_sparse_linear_attention, SLA])
@pytest.mark.parametrize("keys", [40, 200, 256])  # less than a block, a cut one, whole blocks
def test_tokens_that_only_fill_up_change_nothing(function, keys):
    """Beyond `keys` the keys are zeros, and the values and queries anything."""
    q, k, v = qkv(l=384, h=2)
    k = k.at[:, keys:].set(0)
    run = lambda impl, *x: function(*x, *proj(16), topk=0.5, keys=keys, impl=impl)
    fewer = lambda q, *x: function(
        q, *(x[:, :keys] for x in x), *proj(16), topk=0.5, impl="interpret"
    )
    o, reference, alone = jax.jit(
        lambda *x: (run("interpret", *x), run("reference", *x), fewer(*x))
    )(q, k, v)
    np.testing.assert_array_equal(o, alone)
    assert_close(o, reference, "float32")


@pytest.mark.slow
@pytest.mark.parametrize("l", [320, 300])
def test_bounded_and_running_maximum_give_the_same(l):
    """Scores are bounded in some blocks of queries only: those after token 128 are long."""
    q, k, v = qkv(l=l, k=32)
    q = q.at[:, 128:].multiply(6.0)
    bound = triton.operands(q, k, k.mean(1), 64, 64, interpret=True)[0][2]
    assert (np.asarray(bound <= BOUND)[0, 0] == (np.arange(5) < 2)).all()
    o, expected = both(op.sage_attention, q, k, v, block_q=64, block_k=64)
    assert_close(o, expected, "float32")


@pytest.mark.slow
def test_bounds_hold():
    """No score is larger than the bound of its block of queries, and a block of equal tokens comes
    close to it."""
    q, k = put(normal(0, 1, 100, 2, 32)), put(normal(1, 1, 130, 2, 32))
    q = q.at[:, 64:].set(q[:, 64:65])
    k = jnp.concatenate([k, -2 * q[:, 64:65].repeat(40, 1)], 1)
    (values, scale, bound), (keys, key_scale) = triton.operands(
        q, k, jnp.zeros((1, 2, 32)), 64, 64, interpret=True
    )
    rows = lambda scale, l: np.repeat(np.asarray(scale, np.float64), 64, 2)[:, :, :l].swapaxes(
        1, 2
    )[..., None]
    wide = lambda x, scale: np.asarray(x, np.float64) * rows(scale, x.shape[1])
    scores = (
        np.abs(np.einsum("blhk,bshk->bhls", wide(values, scale), wide(keys, key_scale)))
        * np.log2(np.e)
        / 32**0.5
    )
    largest = np.stack([scores[:, :, i : i + 64].max((2, 3)) for i in (0, 64)], 2)
    assert (largest <= np.asarray(bound)).all() and (
        largest[..., 1] >= 0.9 * np.asarray(bound)[..., 1]
    ).all()


@pytest.mark.slow
def test_published_accuracy_in_bfloat16():
    """Against float64 attention over all keys: the bounds published for int8 scores."""
    q, k, v = qkv(l=500, k=64, dtype=jnp.bfloat16)
    o = np.asarray(jax.jit(partial(op.sage_attention, impl="interpret"))(q, k, v), np.float64)
    q, k, v = (np.asarray(x, np.float64)[0, :, 0] for x in (q, k, v))
    p = np.exp(q @ k.T / 8)
    expected = (p @ v / p.sum(1, keepdims=True)).ravel()
    o = o.ravel()
    assert o @ expected / np.sqrt(o @ o * (expected @ expected)) >= 0.9998
    assert np.abs(o - expected).sum() / np.abs(expected).sum() <= 0.021


@pytest.mark.slow
def test_cuda_kernel_of_the_publishers(golden):
    """Theirs has e4m3 values and bfloat16 pooled scores, so query blocks are compared one by one,
    loosely."""
    g = golden("sla_cuda")
    q, k, v = (put(g[name], jnp.bfloat16) for name in "qkv")
    weights = put(g["proj_w"].T), put(g["proj_b"])
    run = lambda *a: op.sage_sparse_linear_attention(
        *a, topk=0.2, block_q=64, block_k=128, impl="interpret"
    )
    o = np.asarray(jax.jit(run)(q, k, v, *weights), np.float32)
    size = lambda x: np.array(
        [np.abs(x[0, i : i + 64]).sum((0, 2)) for i in range(0, 2000, 64)]
    )  # [q_blocks h]
    relative = size(o - g["out_sagesla_sm90"]) / size(g["out_sagesla_sm90"])
    assert (relative < 0.05).mean() >= 0.8, relative
    assert np.median(relative) < 0.035


@pytest.mark.parametrize(
    "function, loads",
    [
        (op.sage_attention, dense_shapes.WORKLOADS),
        (op.sage_sparse_linear_attention, sparse_shapes.WORKLOADS),
    ],
)
def test_real_shapes_lower_for_cuda(function, loads):
    args = jax.eval_shape(loads["wan1.3b_480p"].make, jax.random.key(0))
    run = partial(function, impl="triton", **({"topk": 0.1} if len(args) > 3 else {}))
    assert "attend_kernel" in described.lower(described.trace(jax.jit(run), *args)).as_text()


def test_it_is_forward_only():
    q, k, v = qkv(l=100)
    with pytest.raises(
        NotImplementedError,
        match='int8 scores is forward only.*Train with attention "sla" or "dense"',
    ):
        jax.grad(
            lambda q: op.sage_sparse_linear_attention(
                q, k, v, *proj(16), topk=0.5, impl="interpret"
            ).sum()
        )(q)
