"""Attention with int8 scores: queries and keys quantised by block, softmax and values as in the
float ops. Forward only.

Every `impl` is "auto", "reference", "triton" (compiled kernels) or "interpret" (the same kernels
interpreted, for tests). "auto" is the kernels on CUDA, for the dtypes and sizes that they take, and
the reference elsewhere.
"""

from __future__ import annotations

from functools import partial

import jax.numpy as jnp

from pallas_kernels.derivatives import forward_only
from pallas_kernels.flash_attention import check as check_attention
from pallas_kernels.sage_attention import reference, triton
from pallas_kernels.sage_attention.quantize import quantize_blocks
from pallas_kernels.sparse_attention import check as check_blocks
from pallas_kernels.sparse_attention import (
    check_means,
    chosen_blocks,
    linear_attention,
    plain_map,
    run,
    table,
)

__all__ = [
    "quantize_blocks",
    "sage_attention",
    "sage_sparse_attention",
    "sage_sparse_linear_attention",
]

NO_DERIVATIVE = (
    "attention with int8 scores is forward only: rounding to int8 has no useful derivative. "
    'Train with attention "sla" or "dense"; the weights are the same.'
)


def every_block(q, k, v, block_q, block_k):
    """Dense attention from the reference of the sparse one."""
    (b, l, h, _), k_blocks = q.shape, -(-k.shape[1] // block_k)
    every = jnp.broadcast_to(
        jnp.arange(k_blocks, dtype=jnp.int32), (b, h, -(-l // block_q), k_blocks)
    )
    return reference.sage_sparse_attention(q, k, v, every, block_q, block_k)


def sum_of_branches(q, k, v, proj_kernel, proj_bias, means=None, *, chosen, block_q, block_k):
    """The whole op from the references of its parts."""
    blocks = plain_map(q, k, chosen, block_q, block_k, means)
    return reference.sage_sparse_attention(q, k, v, blocks, block_q, block_k) + linear_attention(
        q, k, v, proj_kernel, proj_bias
    )


DENSE = table(every_block, triton.sage_attention)
SPARSE = table(reference.sage_sparse_attention, triton.sage_sparse_attention)
WHOLE = table(sum_of_branches, triton.sage_sparse_linear_attention)


def sage_sparse_linear_attention(
    q, k, v, proj_kernel, proj_bias, *, topk, block_q=128, block_k=64, means=None, impl="auto"
):
    """`sparse_linear_attention` with int8 scores in its sparse branch: q k v [b l h k] -> [b l h
    k].

    The other arguments, and errors, are those of `sparse_linear_attention`. A derivative raises
    NotImplementedError.
    """
    check_attention(q, k, v)
    check_means(q, k, means, block_q, block_k)
    sizes = {
        "chosen": chosen_blocks(k.shape[1], topk, block_k),
        "block_q": block_q,
        "block_k": block_k,
    }
    return forward_only(
        partial(run, "sage_sparse_linear_attention", impl, WHOLE, **sizes), NO_DERIVATIVE
    )(q, k, v, proj_kernel, proj_bias, means)


def sage_sparse_attention(
    q, k, v, blocks, *, block_q=128, block_k=64, impl="auto"
):  # q k v [b l h k] -> [b l h k]
    """`sparse_attention` with int8 scores; blocks int32 [b h q_blocks chosen]."""
    check_blocks(q, k, v, blocks, block_q)
    op = partial(run, "sage_sparse_attention", impl, SPARSE, block_q=block_q, block_k=block_k)
    return forward_only(op, NO_DERIVATIVE)(q, k, v, blocks)


def sage_attention(
    q, k, v, *, block_q=128, block_k=64, impl="auto"
):  # q k v [b l h k] -> [b l h k]
    """Dense attention with int8 scores (SageAttention, arXiv 2410.02367)."""
    check_attention(q, k, v)
    op = partial(run, "sage_attention", impl, DENSE, block_q=block_q, block_k=block_k)
    return forward_only(op, NO_DERIVATIVE)(q, k, v)
