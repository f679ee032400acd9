"""The Mosaic GPU loop of attention, interpreted with threads, barriers and copies, against
the references. The interpreter multiplies no registers, so there weights go through shared memory,
and sums that fade are kept beside the accumulators."""

from functools import partial

import described
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import put
from tolerances import assert_close

from pallas_kernels import blocking, sage_sparse_linear_attention
from pallas_kernels import mosaic as shared
from pallas_kernels.mosaic import attention_refusal
from pallas_kernels.sage_attention import reference as sage_reference
from pallas_kernels.sage_attention.reference import quantize_blocks
from pallas_kernels.sparse_attention import reference

interpreted = pytest.mark.skipif(shared.unavailable() is not None, reason=str(shared.unavailable()))
STAGES = 2


def attend(*args, stages=STAGES, query_buffers=1, **options):
    """The kernel, interpreted; the module imports the backend, which older versions of jax lack."""
    from pallas_kernels.online_softmax_mosaic import Tile, attend

    tile = Tile(stages=stages, query_buffers=query_buffers)
    return attend(*args, tile=tile, interpret=True, **options)


def qkv(l, s, h=1, dtype=jnp.bfloat16):
    rng = np.random.default_rng(l + s)
    return tuple(put(rng.normal(size=(1, n, h, 128)), dtype) for n in (l, s, s))


def lists(l, s, h, chosen):
    """Random blocks; the last one, which may be cut, is in every other list."""
    n, m = -(-l // 128), -(-s // 64)
    rng = np.random.default_rng(chosen)
    made = np.stack([np.sort(rng.permutation(m)[:chosen]) for _ in range(h * n)])
    made = made.reshape(1, h, n, chosen)
    made[:, :, ::2, -1] = m - 1
    return put(made, jnp.int32)


def quantized(x, size, mean):
    values, scale = quantize_blocks(blocking.blocked(x.astype(jnp.float32) - mean, size))
    return blocking.unblocked(values, x.shape[1]), scale


def int8(q, k):
    """int8 queries and keys, and their scales."""
    mean = k.astype(jnp.float32).mean(1, keepdims=True)
    (q, q_scale), (k, k_scale) = quantized(q, 128, 0.0), quantized(k, 64, mean)
    return q, k, (jnp.repeat(q_scale, 2, 2), k_scale)  # a scale for each half of a block


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize("large, chosen", [(False, 1), (False, 3), (False, 4), (True, 3)])
def test_int8_scores_of_listed_blocks(large, chosen):
    """The last blocks are cut. Bounds decide for every 64 queries whether the maximum is looked
    for; where it is not, two blocks are a turn of the loop and the others stand outside."""
    q, k, v = qkv(200, 200)
    blocks = lists(200, 200, 1, chosen)
    q8, k8, scales = int8(q, k)
    bound = put([[[25.0, 60.0 if large else 25.0, 25.0, 25.0]]], jnp.float32)
    run = lambda: attend(q8, k8, v, blocks, scales=scales, bound=bound, plus=v)
    o = jax.jit(run)()
    expected = sage_reference.sage_sparse_attention(q, k, v, blocks, 128, 64)
    assert_close(o, expected + v, "bf16")


@interpreted
@pytest.mark.slow
def test_keys_that_only_fill_up_change_nothing():
    q, k, v = qkv(200, 320)
    blocks = lists(200, 200, 1, 3)
    q8, k8, (q_scale, k_scale) = int8(q, k)
    scales, bound = (q_scale, k_scale), jnp.full((1, 1, 4), 60.0)
    run = lambda k, v, **options: attend(q8, k, v, blocks, scales=scales, bound=bound, **options)
    o, expected = jax.jit(lambda: (run(k8, v, keys=200), run(k8[:, :200], v[:, :200])))()
    np.testing.assert_array_equal(o, expected)


@interpreted
@pytest.mark.slow
def test_int8_scores_of_every_block():
    """Dense attention, of other keys than queries."""
    q, k, v = qkv(130, 300)
    q8, k8, scales = int8(q, k)
    bound = jnp.full((1, 1, 4), 25.0)
    run = lambda: attend(q8, k8, v, None, scales=scales, bound=bound)
    every = jnp.broadcast_to(jnp.arange(5, dtype=jnp.int32), (1, 1, 2, 5))
    expected = sage_reference.sage_sparse_attention(q, k, v, every, 128, 64)
    assert_close(jax.jit(run)(), expected, "bf16")


@interpreted
@pytest.mark.slow
def test_float_scores_and_what_is_added():
    """One listed block."""
    q, k, v = qkv(140, 140)
    blocks = lists(140, 140, 1, 1)
    o = jax.jit(lambda: attend(q, k, v, blocks, plus=v, query_buffers=2))()
    expected, _ = reference.forward(q, k, v, blocks, 128, 64)
    assert_close(o, expected + v, "bf16")


@interpreted
@pytest.mark.slow
def test_less_than_one_block_of_keys_with_a_bound():
    q, k, v = qkv(70, 50)
    blocks = jnp.zeros((1, 1, 1, 1), jnp.int32)
    bound = jnp.full((1, 1, 2), 30.0)
    o = jax.jit(lambda: attend(q, k, v, blocks, bound=bound))()
    assert_close(o, reference.forward(q, k, v, blocks, 128, 64)[0], "bf16")


def test_what_it_takes():
    assert attention_refusal(128, 128, 64, jnp.bfloat16) is None
    assert attention_refusal(128, 64, 64, jnp.bfloat16) == "block_q is 64; allowed: 128"
    assert attention_refusal(64, 128, 64, jnp.bfloat16) == "head width is 64; allowed: 128"
    assert "values are float32" in attention_refusal(128, 128, 64, jnp.float32)


@interpreted
def test_errors_say_what_to_do():
    q, k, v = qkv(64, 64)
    with pytest.raises(ValueError, match='attention: head width.*\nimpl="auto"'):
        attend(q[..., :64], k[..., :64], v[..., :64], None)


@interpreted
def test_tokens_that_do_not_come_out_even_for_the_copy_engine():
    """The interpreter takes them; the compiler wants eights. All kernels of the op, with what they
    hand on to each other."""
    q = jax.ShapeDtypeStruct((1, 1111, 2, 128), jnp.bfloat16)
    proj = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((128, 128), (128,)))
    sizes = {"topk": 0.1, "block_q": 128, "block_k": 64, "impl": "mosaic"}
    run = jax.jit(partial(sage_sparse_linear_attention, **sizes))
    described.lower(described.trace(run, q, q, q, *proj))
