"""Attention with int8 scores: queries and keys quantised by block, softmax and values as in the
float ops. Forward only.

Every `impl` is "auto", "reference", "triton" (compiled kernels) or "interpret" (the same kernels
interpreted, for tests); of the attention ops also "mosaic" (Hopper, head width 128, blocks of 128
queries and 64 keys). "auto" is those on Hopper and the Triton kernels on other CUDA devices, for
the dtypes and sizes that they take, and the reference elsewhere.
"""

from __future__ import annotations

from functools import partial

import jax.numpy as jnp

from pallas_kernels.blocking import block_map, chosen_blocks
from pallas_kernels.checks import (
    check_attention,
    check_block_list,
    check_means,
    counted_keys,
    not_a_power_of_two,
)
from pallas_kernels.derivatives import forward_only
from pallas_kernels.dispatch import automatic, bound, choose, implementations
from pallas_kernels.linear_branch import linear_attention
from pallas_kernels.mosaic import imported
from pallas_kernels.online_softmax import run
from pallas_kernels.primitives import blocks as count
from pallas_kernels.sage_attention import reference, triton
from pallas_kernels.sage_attention.reference import quantize_blocks

__all__ = [
    "IMPLEMENTATIONS",
    "quantize_blocks",
    "quantize_keys",
    "sage_attention",
    "sage_sparse_attention",
    "sage_sparse_linear_attention",
]

NO_DERIVATIVE = (
    "attention with int8 scores is forward only: rounding to int8 has no useful derivative. "
    'Train with attention "sla" or "dense"; the weights are the same.'
)
NO_DERIVATIVE_OF_KEYS = "quantize_keys is forward only: rounding to int8 has no useful derivative."


def _every_block(q, k, v, block_q, block_k):
    """Dense attention from the reference of the sparse one."""
    (b, l, h, _), k_blocks = q.shape, count(k.shape[1], block_k)
    shape = (b, h, count(l, block_q), k_blocks)
    every = jnp.broadcast_to(jnp.arange(k_blocks, dtype=jnp.int32), shape)
    return reference.sage_sparse_attention(q, k, v, every, block_q, block_k)


def _sum_of_branches(
    q, k, v, proj_kernel, proj_bias, means=None, *, chosen, block_q, block_k, keys
):
    """The whole op from the references of its parts."""
    k, v = k[:, :keys], v[:, :keys]
    blocks = block_map(q, k, chosen, block_q, block_k, means)
    near = reference.sage_sparse_attention(q, k, v, blocks, block_q, block_k)
    return near + linear_attention(q, k, v, proj_kernel, proj_bias)


IMPLEMENTATIONS = {
    "sage_sparse_linear_attention": implementations(
        _sum_of_branches,
        triton.sage_sparse_linear_attention,
        mosaic=imported("sage_attention", "sage_sparse_linear_attention"),
    ),
    "sage_sparse_attention": implementations(
        reference.sage_sparse_attention,
        triton.sage_sparse_attention,
        mosaic=imported("sage_attention", "sage_sparse_attention"),
    ),
    "sage_attention": implementations(
        _every_block,
        triton.sage_attention,
        mosaic=imported("sage_attention", "sage_attention"),
    ),
    "quantize_keys": implementations(reference.quantize_keys, triton.quantize_keys),
}

_run = partial(run, IMPLEMENTATIONS)


def sage_sparse_linear_attention(
    q,
    k,
    v,
    proj_kernel,
    proj_bias,
    *,
    topk,
    block_q=128,
    block_k=64,
    means=None,
    keys=None,
    impl="auto",
):
    """`sparse_linear_attention` with int8 scores in its sparse branch: q k v [b l h k] -> [b l h
    k].

    The other arguments, and errors, are those of `sparse_linear_attention`; what follows the keys
    that count is neither copied nor cut off. A derivative raises NotImplementedError.
    """
    check_attention(q, k, v)
    keys = counted_keys(k, keys)
    check_means(q, keys, means, block_q, block_k)
    chosen = chosen_blocks(keys, topk, block_k)
    sizes = {"chosen": chosen, "block_q": block_q, "block_k": block_k, "keys": keys}
    op = partial(_run, "sage_sparse_linear_attention", impl, **sizes)
    return forward_only(op, NO_DERIVATIVE)(q, k, v, proj_kernel, proj_bias, means)


def sage_sparse_attention(q, k, v, blocks, *, block_q=128, block_k=64, impl="auto"):
    """`sparse_attention` with int8 scores: q k v [b l h k], blocks int32 [b h q_blocks chosen] ->
    [b l h k]."""
    check_block_list(q, k, v, blocks, block_q)
    op = partial(_run, "sage_sparse_attention", impl, block_q=block_q, block_k=block_k)
    return forward_only(op, NO_DERIVATIVE)(q, k, v, blocks)


def sage_attention(q, k, v, *, block_q=128, block_k=64, impl="auto"):
    """Dense attention with int8 scores (SageAttention, arXiv 2410.02367): q [b l h k], k v [b s h
    k] -> [b l h k]."""
    check_attention(q, k, v)
    op = partial(_run, "sage_attention", impl, block_q=block_q, block_k=block_k)
    return forward_only(op, NO_DERIVATIVE)(q, k, v)


def quantize_keys(k, mean, *, block: int, impl: str = "auto"):
    """k - mean in int8, and the scale of each block of each head: amax/127, nearest even
    (SageAttention, arXiv 2410.02367). k [b l h k], mean f32 [b h k] -> int8 [b l h k], f32 [b h n].

    Raises ValueError for other shapes, and for sizes that a kernel asked for by name does not take.
    """
    if k.ndim != 4 or mean.shape != (k.shape[0], *k.shape[2:]) or mean.dtype != jnp.float32:
        raise ValueError(
            f"quantize_keys: k {k.shape}, mean {mean.dtype} {mean.shape}; expected [b l h k] and"
            " float32 [b h k]"
        )
    table = bound(IMPLEMENTATIONS["quantize_keys"], block=block)
    auto = automatic(table, not_a_power_of_two(k.shape[3]) or not_a_power_of_two(block))
    return forward_only(choose("quantize_keys", impl, table, auto), NO_DERIVATIVE_OF_KEYS)(k, mean)
