"""Which part of an array a program of the dense kernels sees: grid (blocks, h, b), arrays [b n h
k], statistics [b h n]."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.primitives import blocks, load


def block_of(x, size: int) -> pl.BlockSpec:  # x [b n h k] or [b h n]
    """The program's own `size` rows."""
    if x.ndim == 3:
        return pl.BlockSpec((None, None, size), lambda i, h, b: (b, h, i))
    return pl.BlockSpec((None, size, None, x.shape[3]), lambda i, h, b: (b, i, h, 0))


def whole(x, size: int) -> pl.BlockSpec:  # x [b n h k] or [b h n]
    """All rows of the program's head, in blocks of `size`: the last one may reach past the end."""
    if x.ndim == 3:
        return pl.BlockSpec(
            (None, None, blocks(x.shape[2], size) * size), lambda i, h, b: (b, h, 0)
        )
    return pl.BlockSpec(
        (None, blocks(x.shape[1], size) * size, None, x.shape[3]), lambda i, h, b: (b, 0, h, 0)
    )


def inside(i, size: int, length: int):  # -> bool [size] or None
    """Which rows of block `i` exist; None if every block is full."""
    return i * size + jnp.arange(size, dtype=jnp.int32) < length if length % size else None


def own(ref, mask):  # ref [size k] or [size]
    """The program's own rows, zeros where they do not exist."""
    return load(ref, mask if mask is None or ref.ndim == 1 else mask[:, None])


def sweep(step: Callable, carry, size: int, length: int):
    """carry = step(start, None, carry) for each full block of `length` rows, then step(start, mask
    [size], carry) for what is left."""
    full = length // size
    if full:
        carry = jax.lax.fori_loop(0, full, lambda j, carry: step(j * size, None, carry), carry)
    if length % size:
        carry = step(full * size, inside(full, size, length), carry)
    return carry


def rows(ref, start, size: int, mask):  # ref [n k] or [n]
    """`size` rows from `start`, zeros where `mask` is false."""
    return own(ref.at[pl.ds(start, size)], mask)
