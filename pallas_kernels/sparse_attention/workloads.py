"""Real shapes: self-attention of one layer, all heads, head width 128, a tenth of the key blocks
kept."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.workload import Workload

WIDTH, TOPK, BLOCK_Q, BLOCK_K = 128, 0.1, 128, 64
SHAPES = {"wan1.3b_480p": (32760, 12), "wan14b_720p": (75600, 40)}  # tokens, heads


def tokens(l: int, h: int, key):
    """q k v bfloat16 [1 l h k]."""
    return tuple(
        jax.random.normal(key, (1, l, h, WIDTH), jnp.bfloat16) for key in jax.random.split(key, 3)
    )


def _chosen(l: int) -> int:
    return int(TOPK * -(-l // BLOCK_K))


def _with_lists(l: int, h: int, key):
    """Arguments of `sparse_attention` and `sage_sparse_attention`: q k v, and random lists of key
    blocks."""
    key_tokens, key_lists = jax.random.split(key)
    scores = jax.random.uniform(key_lists, (1, h, -(-l // BLOCK_Q), -(-l // BLOCK_K)))
    return *tokens(l, h, key_tokens), jnp.sort(jax.lax.top_k(scores, _chosen(l))[1], -1)


def _with_projection(l: int, h: int, key):
    """Arguments of `sparse_linear_attention` and `sage_sparse_linear_attention` with topk 0.1."""
    key_tokens, key_proj = jax.random.split(key)
    return (
        *tokens(l, h, key_tokens),
        jax.random.normal(key_proj, (WIDTH, WIDTH)) / WIDTH**0.5,
        jnp.zeros(WIDTH),
    )


def sparse(l: int, h: int) -> float:
    """Operations of both products over the chosen blocks."""
    return 4.0 * h * WIDTH * -(-l // BLOCK_Q) * BLOCK_Q * _chosen(l) * BLOCK_K


def once(l: int, h: int) -> float:
    """Bytes of q, k, v and o."""
    return 8.0 * l * h * WIDTH


SPARSE = {
    name: Workload(partial(_with_lists, *at), flops=sparse(*at), bytes=once(*at))
    for name, at in SHAPES.items()
}


def part(l: int, h: int, flops: float) -> Workload:
    """A step of the whole op that reads two of q, k and v."""
    return Workload(partial(_with_projection, l, h), flops=flops, bytes=4.0 * l * h * WIDTH)


MAPS = {
    name: part(l, h, 2.0 * h * WIDTH * -(-l // BLOCK_Q) * -(-l // BLOCK_K))
    for name, (l, h) in SHAPES.items()
}
SUMMARIES = {name: part(l, h, 2.0 * l * h * WIDTH**2) for name, (l, h) in SHAPES.items()}
# the linear branch adds phi(k)^T v and phi(q) m; the map's scores are too few to count
WORKLOADS = {
    name: Workload(
        partial(_with_projection, l, h),
        flops=sparse(l, h) + 4.0 * l * h * WIDTH**2,
        bytes=once(l, h),
    )
    for name, (l, h) in SHAPES.items()
}
