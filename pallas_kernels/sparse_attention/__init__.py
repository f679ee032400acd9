"""Sparse-linear attention: exact softmax over a few key blocks for each query block, a linear
branch over all keys.

Every `impl` is "auto", "reference", "triton" (compiled kernels) or "interpret" (the same kernels
interpreted, for tests). "auto" is the kernels on CUDA, for the dtypes and sizes that they take
(`forward.refusal`), and the reference elsewhere.
"""

from __future__ import annotations

from functools import partial

import jax.numpy as jnp
from jax import lax

from pallas_kernels.dispatch import automatic, choose
from pallas_kernels.flash_attention import check as check_attention
from pallas_kernels.sparse_attention import block_map as block_map_kernels
from pallas_kernels.sparse_attention import reference, triton
from pallas_kernels.sparse_attention.forward import refusal
from pallas_kernels.sparse_attention.reference import dense_map, linear_attention, pooled_scores

__all__ = [
    "block_map",
    "chosen_blocks",
    "dense_map",
    "linear_attention",
    "pooled_scores",
    "sparse_attention",
    "sparse_linear_attention",
]


def table(reference, kernel):
    """The implementations of an op that has a reference and a kernel."""
    return {
        "reference": reference,
        "triton": partial(kernel, interpret=False),
        "interpret": partial(kernel, interpret=True),
    }


def plain_map(q, k, chosen, block_q, block_k, means):
    """`reference.block_map`, from the means of blocks where they are at hand."""
    if means is None:
        return reference.block_map(q, k, chosen, block_q, block_k)
    queries, keys = lax.stop_gradient(means)
    scores = block_map_kernels.pooled_scores(
        queries, keys, block_map_kernels.mean_of(keys, k.shape[1], block_k)
    )
    return jnp.sort(lax.top_k(scores, chosen)[1], -1)


def sum_of_branches(q, k, v, proj_kernel, proj_bias, means=None, *, chosen, block_q, block_k):
    """The whole op from the references of its parts."""
    blocks = plain_map(q, k, chosen, block_q, block_k, means)
    return reference.sparse_attention(q, k, v, blocks, block_q, block_k) + linear_attention(
        q, k, v, proj_kernel, proj_bias
    )


IMPLS = table(reference.sparse_attention, triton.sparse_attention)
MAPS = table(reference.block_map, block_map_kernels.block_map)
WHOLE = table(sum_of_branches, triton.sparse_linear_attention)


def run(name, impl, impls, q, *args, block_q, block_k, **sizes):
    """The implementation called `impl`, on its arguments; "auto" by the dtype and sizes of q and
    the blocks."""
    ready = {key: partial(f, block_q=block_q, block_k=block_k, **sizes) for key, f in impls.items()}
    auto = automatic(
        ready["triton"], ready["reference"], refusal(q.shape[-1], block_q, block_k, q.dtype)
    )
    return choose(name, impl, ready, auto)(q, *args)


def sparse_linear_attention(
    q, k, v, proj_kernel, proj_bias, *, topk, block_q=128, block_k=64, means=None, impl="auto"
):
    """SLA (arXiv 2509.24006; thu-ml/TurboDiffusion turbodiffusion/SLA/core.py): q k v [b l h k],
    one floating dtype -> [b l h k].

    proj_kernel [k k] (i o) and proj_bias [k], float32, project the linear branch of every head.
    topk is the share of key blocks kept. The choice of blocks has no gradient; the linear branch
    sums over all keys, chosen or not.
    means: those of the blocks of q f32 [b h i k] and of k f32 [b h j k], as
           `qk_prep.rms_norm_rope_pool` gives; else computed here.
    Raises ValueError for other shapes, dtypes and names of `impl`.
    """
    check_attention(q, k, v)
    check_means(q, k, means, block_q, block_k)
    sizes = {
        "chosen": chosen_blocks(k.shape[1], topk, block_k),
        "block_q": block_q,
        "block_k": block_k,
    }
    return run(
        "sparse_linear_attention", impl, WHOLE, q, k, v, proj_kernel, proj_bias, means, **sizes
    )


def chosen_blocks(length: int, topk: float, block_k: int) -> int:
    """Key blocks kept of `length` keys for each query block: the share of all blocks cut to a whole
    number, at least one."""
    blocks = -(-length // block_k)
    return max(1, min(blocks, int(topk * blocks)))


def block_map(
    q, k, *, topk, block_q=128, block_k=64, impl="auto"
):  # q k [b l h k] -> int32 [b h q_blocks chosen], ascending
    """The key blocks of highest pooled score for each block of queries; ties go to the lowest
    index.

    q k [b l h k] -> int32 [b h q_blocks chosen], ascending; `chosen` is `chosen_blocks` of the
    share topk. No gradient.
    """
    sizes = {
        "chosen": chosen_blocks(k.shape[1], topk, block_k),
        "block_q": block_q,
        "block_k": block_k,
    }
    return run("block_map", impl, MAPS, q, k, **sizes)


def sparse_attention(
    q, k, v, blocks, *, block_q=128, block_k=64, impl="auto"
):  # q k v [b l h k] -> [b l h k]
    """Softmax attention of each query block over its list of key blocks [b h q_blocks chosen],
    ascending, no repeats.

    q k v [b l h k] -> [b l h k]. The last block may be shorter; keys past the end do not count.
    Raises ValueError for a list that is not int32, or not of these queries. Differentiable with the
        list held constant.
    """
    check(q, k, v, blocks, block_q)
    return run("sparse_attention", impl, IMPLS, q, k, v, blocks, block_q=block_q, block_k=block_k)


def check(q, k, v, blocks, block_q):
    """Raise ValueError unless the block list fits the queries."""
    check_attention(q, k, v)
    expected = (q.shape[0], q.shape[2], -(-q.shape[1] // block_q))
    if blocks.ndim != 4 or blocks.shape[:3] != expected or blocks.dtype != jnp.int32:
        raise ValueError(
            f"sparse_attention: block list {blocks.dtype} {blocks.shape}; expected int32"
            f" {(*expected, 'chosen')}"
        )


def check_means(q, k, means, block_q, block_k):
    """Raise ValueError unless means, if any, are float32 [b h blocks k] of q and of k."""
    expected = [
        (x.shape[0], x.shape[2], -(-x.shape[1] // block), x.shape[3])
        for x, block in ((q, block_q), (k, block_k))
    ]
    if means is not None and (
        [m.shape for m in means] != expected or any(m.dtype != jnp.float32 for m in means)
    ):
        given = ", ".join(f"{m.dtype} {m.shape}" for m in means)
        raise ValueError(
            f"sparse_linear_attention: means {given}; expected float32 {expected[0]} and"
            f" {expected[1]}"
        )
