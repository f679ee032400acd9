"""Tokens in blocks, and the choice of key blocks, in plain JAX: what the attention ops over lists
of blocks share.

A query block keeps the key blocks of highest score; the score is the product of the mean query and
the mean smoothed key (SLA, arXiv 2509.24006; thu-ml/TurboDiffusion turbodiffusion/SLA/utils.py).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax

from pallas_kernels.primitives import EXACT, blocks

__all__ = [
    "block_map",
    "block_means",
    "blocked",
    "chosen_blocks",
    "counts",
    "dense_map",
    "pooled_scores",
    "scores_of_means",
    "token_mean",
    "unblocked",
]


def blocked(x, size: int):  # [b l h k] -> [b h n size k], zeros past the end
    """Tokens in blocks; the tail block is padded."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % size), (0, 0), (0, 0)))
    return rearrange(x, "b (n m) h k -> b h n m k", m=size)


def unblocked(x, length: int):  # [b h n m k] -> [b length h k]
    """The inverse of `blocked`."""
    return rearrange(x, "b h n m k -> b (n m) h k")[:, :length]


def counts(length: int, size: int):  # -> f32 [n]
    """Tokens in each block: `size`, and the rest in the last."""
    return jnp.minimum(size, length - size * jnp.arange(blocks(length, size))).astype(jnp.float32)


def block_means(x, size: int):  # [b l h k] -> f32 [b h n k]
    """The mean of each block of tokens; the tail block is averaged over its own length."""
    return blocked(x, size).sum(3, dtype=jnp.float32) / counts(x.shape[1], size)[:, None]


def token_mean(means, length: int, size: int):  # f32 [b h n k] -> f32 [b h k]
    """The mean over all tokens from the means of their blocks."""
    return jnp.einsum("bhnk,n->bhk", means, counts(length, size) / length, precision=EXACT)


def scores_of_means(queries, keys, mean):
    """`pooled_scores` from the means of blocks f32 [b h i k], [b h j k] and the mean key f32 [b h
    k] -> f32 [b h i j]: the mean of k - mean(k) over a block is the block's mean minus the mean."""
    return jnp.einsum("bhik,bhjk->bhij", queries, keys - mean[:, :, None], precision=EXACT)


def pooled_scores(q, k, block_q: int, block_k: int):  # [b l h k] -> f32 [b h q_blocks k_blocks]
    """Mean query of each block times mean of each block of k - mean(k); no scale, no softmax, all
    in float32."""
    mean = k.mean(1, dtype=jnp.float32)
    return scores_of_means(block_means(q, block_q), block_means(k, block_k), mean)


def chosen_blocks(length: int, topk: float, block_k: int) -> int:
    """Key blocks kept of `length` keys for each query block: the share of all blocks cut to a whole
    number, at least one."""
    number = blocks(length, block_k)
    return max(1, min(number, int(topk * number)))


def block_map(q, k, chosen: int, block_q: int, block_k: int, means=None):
    """The `chosen` key blocks of highest pooled score for each query block; ties go to the lowest
    index. No gradient.

    q k [b l h k] -> int32 [b h q_blocks chosen], ascending. means: those of the blocks of q and of
    k, where they are at hand.
    """
    if means is None:
        scores = pooled_scores(lax.stop_gradient(q), lax.stop_gradient(k), block_q, block_k)
    else:
        queries, keys = lax.stop_gradient(means)
        scores = scores_of_means(queries, keys, token_mean(keys, k.shape[1], block_k))
    return jnp.sort(lax.top_k(scores, chosen)[1], -1)


def dense_map(blocks, k_blocks: int):  # int32 [b h q_blocks chosen] -> int8 [b h q_blocks k_blocks]
    """The block list as a map of zeros and ones."""
    return jax.nn.one_hot(blocks, k_blocks, dtype=jnp.int8).sum(-2, dtype=jnp.int8)
