"""Attention with int8 scores on Hopper: the loop of `online_softmax_mosaic`, and the pass that
rounds queries and keys, which is Triton's."""

from __future__ import annotations

import jax.numpy as jnp

from pallas_kernels import linear_branch
from pallas_kernels.block_map import block_map_and_mean
from pallas_kernels.mosaic import attention_refusal, refuse, unavailable
from pallas_kernels.online_softmax_mosaic import attend
from pallas_kernels.sage_attention.triton import operands

__all__ = [
    "int8_attention",
    "sage_attention",
    "sage_sparse_attention",
    "sage_sparse_linear_attention",
]


def sage_attention(q, k, v, block_q, block_k):
    """Dense attention: every key block in order, without a list."""
    return sage_sparse_attention(q, k, v, None, block_q, block_k)


def sage_sparse_attention(q, k, v, blocks, block_q, block_k):
    """See `reference.sage_sparse_attention`. Raises ValueError for what the kernel does not
    take."""
    _check(v, block_q, block_k)
    given = operands(q, k, k.mean(1, dtype=jnp.float32), block_q, block_k, interpret=False)
    return int8_attention(*given, v, blocks)


def sage_sparse_linear_attention(
    q, k, v, proj_kernel, proj_bias, means=None, *, chosen, block_q, block_k
):
    """The whole op, as in `triton`. Raises ValueError for what the kernel does not take."""
    _check(v, block_q, block_k)
    blocks, mean = block_map_and_mean(q, k, chosen, block_q, block_k, means, interpret=False)
    _, linear = linear_branch.operands(q, k, v, proj_kernel, proj_bias, interpret=False)
    given = operands(q, k, mean, block_q, block_k, interpret=False)
    return int8_attention(*given, v, blocks, linear=linear)


def int8_attention(queries, keys, v, blocks, *, linear=None):
    """`attend` of what `operands` gives."""
    q, q_scale, bound = queries
    k, k_scale = keys
    return attend(q, k, v, blocks, scales=(q_scale, k_scale), bound=bound, linear=linear)


def _check(v, block_q, block_k):
    op = "attention with int8 scores"
    refuse(op, attention_refusal(v.shape[-1], block_q, block_k, v.dtype))
    refuse(op, unavailable())
