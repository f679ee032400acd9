"""int8 queries and keys, and block-sparse attention of their scores, in plain JAX: the
specification."""

from __future__ import annotations

import jax.numpy as jnp

from pallas_kernels.blocking import blocked, unblocked
from pallas_kernels.gathering import bytes_per_block, flatten_keys, over_chunks, softmax_sum, take

FLOOR = 1e-7  # least amax of a block


def quantize_blocks(x):  # f32 [b h n m k] -> int8 of the same shape, f32 [b h n]
    """scale = amax/127, nearest even; the symmetric range -127..127."""
    scale = jnp.maximum(jnp.abs(x).max((3, 4)), FLOOR) / 127
    return jnp.round(x / scale[..., None, None]).astype(jnp.int8), scale


def quantize_keys(k, mean, *, block):
    """k - mean in float32, rounded by `quantize_blocks`; tokens past the end count as zeros. k [b l
    h k], mean f32 [b h k] -> int8 [b l h k], f32 [b h n]."""
    values, scale = quantize_blocks(blocked(k.astype(jnp.float32) - mean[:, None], block))
    return unblocked(values, k.shape[1]), scale


def sage_sparse_attention(q, k, v, blocks, block_q, block_k):
    """Scores are int32 products of int8 q and int8 k - mean(k), times their two block scales and
    1/sqrt(k). q k v [b l h k], blocks [b h q_blocks chosen].

    The mean is taken off in float32. It shifts all scores of a query alike, so the softmax does not
    see it.
    """
    k32 = k.astype(jnp.float32)
    queries, q_scale = quantize_blocks(blocked(q.astype(jnp.float32), block_q))
    smooth = k32 - k32.mean(1, keepdims=True)
    keys, k_scale = quantize_blocks(blocked(smooth, block_k))
    values = blocked(v, block_k)
    scale = q.shape[-1] ** -0.5

    def step(_, chunk):
        queries, q_scale, index = chunk
        near = take(keys, index)
        dots = jnp.einsum("bhcmk,bhctjk->bhcmtj", queries, near, preferred_element_type=jnp.int32)
        scales = scale * q_scale[..., None] * take(k_scale, index)  # [b h c t]
        s = dots.astype(jnp.float32) * scales[:, :, :, None, :, None]
        s = flatten_keys(s, index, block_k, k.shape[1])
        return None, softmax_sum(s, take(values, index))[0].astype(q.dtype)

    size = bytes_per_block(blocks.shape[-1], block_q, block_k, q.shape[-1], q.dtype.itemsize)
    _, o = over_chunks(step, None, (queries, q_scale, blocks), size)
    return unblocked(o, q.shape[1])
