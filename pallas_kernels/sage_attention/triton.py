"""Attention with int8 scores as kernels: the loop of sparse_attention's forward kernel with another
scorer.

Queries are rounded by the pass that rounds keys. Rounded inside the attention kernel, a tile of
queries is an operand that Triton keeps in registers, and on Hopper ptxas (CUDA 13) then makes every
tensor instruction of the loop wait for the one before.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.primitives import LOG2E, dot, load
from pallas_kernels.qk_prep.triton import quantize_and_measure
from pallas_kernels.sparse_attention.block_map import block_map_and_mean
from pallas_kernels.sparse_attention.forward import attend, block, kernel_name
from pallas_kernels.sparse_attention.triton import summed
from pallas_kernels.tuning import tile


def sage_attention(
    q, k, v, block_q, block_k, *, interpret
):  # q [b l h k], k v [b s h k] -> [b l h k]
    """Dense attention: every key block in order, without a list."""
    return int8_attention(
        q, k, k.mean(1, dtype=jnp.float32), v, None, block_q, block_k, interpret=interpret
    )


def sage_sparse_attention(q, k, v, blocks, block_q, block_k, *, interpret):
    """See `reference.sage_sparse_attention`."""
    return int8_attention(
        q, k, k.mean(1, dtype=jnp.float32), v, blocks, block_q, block_k, interpret=interpret
    )


def sage_sparse_linear_attention(
    q, k, v, proj_kernel, proj_bias, means=None, *, chosen, block_q, block_k, interpret
):
    """The whole op: the pooling that gives the map also gives the mean key; the linear branch is
    part of the same kernel."""
    blocks, mean = block_map_and_mean(q, k, chosen, block_q, block_k, means, interpret=interpret)
    _, linear = summed(q, k, v, proj_kernel, proj_bias, interpret=interpret)
    return int8_attention(
        q, k, mean, v, blocks, block_q, block_k, linear=linear, interpret=interpret
    )


def int8_attention(
    q, k, mean, v, blocks, block_q, block_k, *, linear=None, interpret
):  # mean f32 [b h k]
    """`attend` with int8 scores."""
    given = operands(q, k, mean, block_q, block_k, interpret=interpret)
    at = tile(
        "sage_attention", "dense" if blocks is None and block_q > 64 else kernel_name(block_q)
    )
    return attend(
        int8_scores, *given, v, blocks, block_q, block_k, linear=linear, interpret=interpret, at=at
    )


def operands(q, k, mean, block_q, block_k, *, interpret):
    """What `int8_scores` reads of queries, which have no mean taken off, and of keys."""
    *queries, q_length = quantize_and_measure(
        q, jnp.zeros_like(mean), block=block_q, interpret=interpret
    )
    *keys, k_length = quantize_and_measure(k, mean, block=block_k, interpret=interpret)
    bound = (
        LOG2E * q.shape[-1] ** -0.5 * q_length * k_length.max(2, keepdims=True)
    )  # Cauchy-Schwarz
    return (*queries, bound), tuple(keys)


def int8_scores(
    plan, rows, queries, keys
):  # int8 [.. k], scales of its blocks f32, bounds of the scores of each block of queries
    """int32 products of int8 queries and keys; the factor holds both blocks' scales, 1/sqrt(k) and
    log2(e)."""
    q, here = load(queries[0], rows), pl.program_id(0)
    scale = LOG2E * q.shape[-1] ** -0.5 * queries[1][here]
    return (
        lambda j: (
            dot(q, block(keys[0], j, plan.block_k), (1, 1), jnp.int32),
            scale * keys[1][j],
        ),
        queries[2][here],
    )
