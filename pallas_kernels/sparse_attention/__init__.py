"""Sparse-linear attention: exact softmax over a few key blocks for each query block, a linear
branch over all keys.

Every `impl` is "auto", "reference", "triton" (compiled kernels) or "interpret" (the same kernels
interpreted, for tests); of the attention ops also "mosaic" (Hopper, head width 128, blocks of 128
queries and 64 keys; derivatives are Triton's). "auto" is those on Hopper and the Triton kernels on
other CUDA devices, for the dtypes and sizes that they take (`mosaic.attention_refusal`,
`online_softmax.refusal`), and the reference elsewhere.
"""

from __future__ import annotations

from functools import partial

from pallas_kernels import block_map as block_map_kernels
from pallas_kernels import blocking
from pallas_kernels.blocking import chosen_blocks, dense_map, pooled_scores
from pallas_kernels.checks import check_attention, check_block_list, check_means, counted_keys
from pallas_kernels.dispatch import implementations
from pallas_kernels.linear_branch import linear_attention
from pallas_kernels.mosaic import imported
from pallas_kernels.online_softmax import run
from pallas_kernels.sparse_attention import reference, triton

__all__ = [
    "IMPLEMENTATIONS",
    "block_map",
    "chosen_blocks",
    "dense_map",
    "linear_attention",
    "pooled_scores",
    "sparse_attention",
    "sparse_linear_attention",
]


def _sum_of_branches(q, k, v, proj_kernel, proj_bias, means=None, *, chosen, block_q, block_k):
    """The whole op from the references of its parts."""
    blocks = blocking.block_map(q, k, chosen, block_q, block_k, means)
    return reference.sparse_linear_attention(
        q, k, v, proj_kernel, proj_bias, blocks, block_q, block_k
    )


IMPLEMENTATIONS = {
    "sparse_linear_attention": implementations(
        _sum_of_branches,
        triton.sparse_linear_attention,
        mosaic=imported("sparse_attention", "sparse_linear_attention"),
    ),
    "sparse_attention": implementations(
        reference.sparse_attention,
        triton.sparse_attention,
        mosaic=imported("sparse_attention", "sparse_attention"),
    ),
    "block_map": implementations(blocking.block_map, block_map_kernels.block_map),
}

_run = partial(run, IMPLEMENTATIONS)


def sparse_linear_attention(
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
    """SLA (arXiv 2509.24006; thu-ml/TurboDiffusion turbodiffusion/SLA/core.py): q k v [b l h k],
    one floating dtype -> [b l h k].

    proj_kernel [k k] (i o) and proj_bias [k], float32, project the linear branch of every head.
    topk is the share of key blocks kept. The choice of blocks has no gradient; the linear branch
    sums over all keys, chosen or not.
    means: those of the blocks of q f32 [b h i k] and of k f32 [b h j k], as
    `qk_prep.rms_norm_rope_pool` gives; else computed here.
    keys: how many of k and v count, by default all; the k that follow them are zeros.
    Raises ValueError for other shapes, dtypes, numbers and names of `impl`.
    """
    check_attention(q, k, v)
    keys = counted_keys(k, keys)
    check_means(q, keys, means, block_q, block_k)
    chosen = chosen_blocks(keys, topk, block_k)
    k, v = k[:, :keys], v[:, :keys]
    sizes = {"chosen": chosen, "block_q": block_q, "block_k": block_k}
    args = q, k, v, proj_kernel, proj_bias, means
    return _run("sparse_linear_attention", impl, *args, **sizes)


def block_map(q, k, *, topk, block_q=128, block_k=64, impl="auto"):
    """The key blocks of highest pooled score for each block of queries; ties go to the lowest
    index.

    q k [b l h k] -> int32 [b h q_blocks chosen], ascending; `chosen` is `chosen_blocks` of the
    share topk. No gradient.
    """
    chosen = chosen_blocks(k.shape[1], topk, block_k)
    sizes = {"chosen": chosen, "block_q": block_q, "block_k": block_k}
    return _run("block_map", impl, q, k, **sizes)


def sparse_attention(q, k, v, blocks, *, block_q=128, block_k=64, impl="auto"):
    """Softmax attention of each query block over its list of key blocks [b h q_blocks chosen],
    ascending, no repeats.

    q k v [b l h k] -> [b l h k]. The last block may be shorter; keys past the end do not count.
    Differentiable with the list held constant. Raises ValueError for a list that is not int32, or
    not of these queries.
    """
    check_block_list(q, k, v, blocks, block_q)
    sizes = {"block_q": block_q, "block_k": block_k}
    return _run("sparse_attention", impl, q, k, v, blocks, **sizes)
