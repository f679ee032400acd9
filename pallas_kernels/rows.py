"""Kernels over rows: one program to a row, which it reads once and keeps in registers. Quantisation
with one scale for a row.

A row is split into parts of eight elements to a thread, then into smaller powers of two (8960 = 4 *
2048 + 512 + 256 with eight warps): no column is masked, and the parts have one layout from the
loads to the stores, of 8 bits too.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.primitives import launch, load, store
from pallas_kernels.quantized import QTensor
from pallas_kernels.rounding import largest, narrow, row_scale
from pallas_kernels.tuning import Tile

__all__ = ["load_parts", "quantize_rows", "split", "store_parts", "store_quantized"]


def quantize_rows(x, dtype=jnp.int8, *, tile: Tile, interpret: bool, before=None) -> QTensor:
    """`quantized.quantize_rows` of x [m k] float, or of before(x, interpret) in float32. x may be
    [g m k/g]: a row's columns in g groups, which come side by side."""
    *groups, m, width = x.shape
    k = math.prod(groups) * width
    row, scalar = pl.BlockSpec((None, k), lambda i: (i, 0)), pl.BlockSpec((None,), lambda i: (i,))
    out = jax.ShapeDtypeStruct((m, k), dtype), jax.ShapeDtypeStruct((m,), jnp.float32)
    run = launch(
        partial(quantize_kernel, warps=tile.warps, before=before, interpret=interpret),
        out,
        (m,),
        [pl.BlockSpec((*groups, None, width), lambda i: (0,) * len(groups) + (i, 0))],
        (row, scalar),
        warps=tile.warps,
        stages=tile.stages,
        interpret=interpret,
    )
    return QTensor(*run(x))


def quantize_kernel(x_ref, values_ref, scale_ref, *, warps, before, interpret):
    """x [k] or [g k/g], values [k], scale []."""
    width = x_ref.shape[-1]
    parts = split(width, warps)
    if len(x_ref.shape) == 1:
        xs = load_parts(x_ref, parts)
    else:
        groups = range(x_ref.shape[0])
        group = lambda g, part: load(x_ref.at[jnp.int32(g), part]).astype(jnp.float32)
        xs = [group(g, part) for g in groups for part in parts]
        parts = [pl.ds(g * width + part.start, part.size) for g in groups for part in parts]
    if before is not None:
        xs = [before(x, interpret) for x in xs]
    store_quantized(values_ref, scale_ref, xs, parts, interpret)


def split(width: int, warps: int) -> list:
    """Slices that cover the columns, widest first."""
    start, parts = 0, []
    while start < width:
        parts.append(pl.ds(start, min(8 * 32 * warps, 1 << (width - start).bit_length() - 1)))
        start += parts[-1].size
    return parts


def load_parts(ref, parts) -> list:  # -> float32
    return [load(ref.at[part]).astype(jnp.float32) for part in parts]


def store_parts(ref, xs, parts):
    for part, x in zip(parts, xs, strict=True):
        store(ref.at[part], x.astype(ref.dtype))


def store_quantized(values_ref, scale_ref, xs, parts, interpret):
    """A row quantised: float32 parts -> values [k], scale []."""
    factor, scale = row_scale(largest(xs), values_ref.dtype, interpret)
    store_parts(values_ref, [narrow(x * factor, values_ref.dtype, interpret) for x in xs], parts)
    store(scale_ref, scale)
