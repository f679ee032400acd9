"""Block-sparse attention with int8 scores in plain JAX: the specification."""

from __future__ import annotations

import jax.numpy as jnp

from pallas_kernels.sage_attention.quantize import quantize_blocks
from pallas_kernels.sparse_attention.reference import (
    blocked,
    bytes_per_block,
    flatten_keys,
    over_chunks,
    softmax_sum,
    take,
    unblocked,
)


def sage_sparse_attention(
    q, k, v, blocks, block_q, block_k
):  # q k v [b l h k], blocks [b h q_blocks chosen]
    """Scores are int32 products of int8 q and int8 k - mean(k), times their two block scales and
    1/sqrt(k).

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
        dots = jnp.einsum(
            "bhcmk,bhctjk->bhcmtj", queries, take(keys, index), preferred_element_type=jnp.int32
        )
        scales = scale * q_scale[..., None] * take(k_scale, index)  # [b h c t]
        s = dots.astype(jnp.float32) * scales[:, :, :, None, :, None]
        return None, softmax_sum(flatten_keys(s, index, block_k, k.shape[1]), take(values, index))[
            0
        ].astype(q.dtype)

    size = bytes_per_block(blocks.shape[-1], block_q, block_k, q.shape[-1], q.dtype.itemsize)
    _, o = over_chunks(step, None, (queries, q_scale, blocks), size)
    return unblocked(o, q.shape[1])
