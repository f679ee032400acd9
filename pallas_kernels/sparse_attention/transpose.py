"""The block list turned round: for each key block the query blocks that chose it, as the gradient
of keys and values reads it.

One sort of whole numbers gives all heads' lists: the pair (head, key block, query block) is one
int32, so the sort needs no stability, its result is one and the same in every run, and its cost
follows the pairs that exist. The alternative, a map of zeros and ones with sums along its columns,
touches every possible pair, ten times as many at the usual share of 0.1, in several passes.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

__all__ = ["Columns", "transpose"]

LONG = 4  # a list is long if it has this many times the mean length


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Columns:
    """The key blocks of all heads in one row, c = head k_blocks + key block, their lists one after
    the other.

    queries: int32 [(b h q_blocks chosen)], query blocks, ascending within a list; those of c are
    queries[start[c] : start[c + 1]]. start: int32 [(b h k_blocks) + 1]. order: int32 [(b h
    k_blocks)], the order in which the c should be worked through.
    """

    queries: jax.Array
    start: jax.Array
    order: jax.Array


def transpose(blocks, k_blocks: int) -> Columns:
    """The lists of all key blocks, of lists int32 [b h q_blocks chosen] without repeats. Raises
    ValueError where a pair does not fit into an int32."""
    b, h, q_blocks, _ = blocks.shape
    columns = b * h * k_blocks
    if columns * q_blocks >= 2**31:
        raise ValueError(
            f"sparse_attention: the gradient numbers {b * h} heads x {k_blocks} key blocks x"
            f" {q_blocks} query blocks in 31 bits; allowed here: at most"
            f" {(2**31 - 1) // (k_blocks * q_blocks)} heads in one call; split the batch"
        )
    head = jnp.arange(b * h, dtype=jnp.int32).reshape(b, h, 1, 1)
    column = head * k_blocks + blocks
    pairs = lax.sort(
        (column * q_blocks + jnp.arange(q_blocks, dtype=jnp.int32)[:, None]).reshape(-1),
        is_stable=False,
    )
    # whole numbers: the order of additions does not matter
    length = jnp.zeros(columns, jnp.int32).at[column.reshape(-1)].add(1)
    start = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(length)])
    return Columns(pairs % q_blocks, start, balanced(length.reshape(b * h, k_blocks), q_blocks))


def balanced(length, q_blocks: int):
    """The order of all lists, from their lengths int32 [heads k_blocks]: a permutation of their
    numbers int32 [(heads k_blocks)].

    Head by head, because the queries of one head stay in the cache, and the longest list of a head
    first, so that short ones fill the gaps at its end. Long lists go before everything: one that
    starts in the last head would run on alone.
    """
    heads, k_blocks = length.shape
    long = length * k_blocks > LONG * length.sum(1, keepdims=True)
    rank = jnp.where(long, 0, 1 + jnp.arange(heads, dtype=jnp.int32)[:, None])
    return jnp.argsort((rank * (q_blocks + 1) + q_blocks - length).reshape(-1), stable=True).astype(
        jnp.int32
    )
