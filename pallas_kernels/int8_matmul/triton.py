"""Kernels of the int8 products: 128 x 128 outputs to a program, k in steps of 128; scales by tile, or by row and column."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.int8_matmul.quantize import BLOCK, QTensor, tiles
from pallas_kernels.int8_matmul.rounding import divide, largest, narrow, rounded
from pallas_kernels.tiles import blocks, dot, fma, launch, load, store
from pallas_kernels.tuning import Tile

GROUP = 8  # tiles of rows that share a pass over the weight while it is in the cache


def quantize(x, *, tile: Tile, interpret: bool) -> QTensor:  # [m k] float
    """`quantize.quantize`: one program for a tile."""
    (m, k), shape = x.shape, tiles(x.shape)
    spec = pl.BlockSpec((BLOCK, BLOCK), lambda c, r: (r, c))
    out = jax.ShapeDtypeStruct((m, k), jnp.int8), jax.ShapeDtypeStruct(shape, jnp.float32)
    kernel = partial(quantize_kernel, shape=(m, k), interpret=interpret)
    specs = (spec, pl.BlockSpec((None, None), lambda c, r: (r, c)))
    return QTensor(*launch(kernel, out, shape[::-1], [spec], specs, warps=tile.warps, stages=tile.stages, interpret=interpret)(x))


def quantize_kernel(x_ref, values_ref, scale_ref, *, shape, interpret):  # x and values [128 128], scale []
    mask = inside(pl.program_id(1), pl.program_id(0), shape)
    x = load(x_ref, mask).astype(jnp.float32)
    amax = largest([x])
    factor = divide(jnp.full((1, 1), 128, jnp.float32), amax, interpret)
    store(values_ref, narrow(x * factor, jnp.int8, interpret), mask)
    store(scale_ref, amax * (1 / 128))


def block_product(x: QTensor, weight: QTensor, bias, out_dtype, *, tile: Tile, interpret: bool):  # [m k], [n k] -> [m n]
    """Sum over the blocks of k, in order, of float32(int32 dot) * (scale_x * scale_weight); rounded, and again with the bias."""
    bias = None if bias is None else bias.astype(out_dtype)
    return product(block_kernel, x, weight, bias, out_dtype, (None, x.scale.shape[1]), tile, interpret)


def row_product(x: QTensor, weight: QTensor, bias, out_dtype, *, tile: Tile, interpret: bool):  # [m k], [n k] -> [m n]
    """float32(int32 dot) * scale_x * scale_weight + bias, rounded once. Raises ValueError unless k is a multiple of 128."""
    k = x.values.shape[1]
    if k % BLOCK:
        raise ValueError(
            f'int8 product: k is {k}; the kernel takes multiples of {BLOCK}, nearest: {blocks(k, BLOCK) * BLOCK}; impl="xla" takes any'
        )
    return product(row_kernel, x, weight, bias, out_dtype, (BLOCK,), tile, interpret)


def product(kernel: Callable, x, weight, bias, out_dtype, scale_block, tile, interpret):
    """The launch that both kernels share; scale_block is the shape of the scales of 128 rows."""
    (m, k), n = x.values.shape, weight.values.shape[0]
    grid = blocks(m, BLOCK), blocks(n, BLOCK)
    place = partial(swizzled, grid=grid)
    args = [x.values, weight.values, x.scale, weight.scale]
    specs = []
    for shape in ((BLOCK, k), scale_block):
        rest = (0,) * (len(shape) - 1)
        specs += [pl.BlockSpec(shape, lambda p, side=side, rest=rest: (place(p)[side], *rest)) for side in (0, 1)]
    if bias is not None:
        args.append(bias)
        specs.append(pl.BlockSpec((BLOCK,), lambda p: (place(p)[1],)))
    return launch(
        partial(kernel, place=place, shape=(m, n), interpret=interpret),
        jax.ShapeDtypeStruct((m, n), out_dtype),
        (grid[0] * grid[1],),
        specs,
        pl.BlockSpec((BLOCK, BLOCK), place),
        warps=tile.warps,
        stages=tile.stages,
        interpret=interpret,
    )(*args)


def swizzled(p, grid):
    """Row and column of the p-th tile: GROUP tiles down, then one across."""
    rows, columns = grid
    first = p // (GROUP * columns) * GROUP
    height = jnp.minimum(rows - first, GROUP)
    p = p % (GROUP * columns)
    return first + p % height, p // height


def block_kernel(x_ref, w_ref, xs_ref, ws_ref, *rest, place, shape, interpret):  # x w [128 k], scales [k/128], bias [128]
    (i, j), (*bias, y_ref) = place(pl.program_id(0)), rest

    def step(c, total):
        part = tile_dot(x_ref, w_ref, c, (i, j), shape).astype(jnp.float32)
        return fma(part, xs_ref[c] * ws_ref[c], total, interpret)

    total = lax.fori_loop(0, xs_ref.shape[0], step, jnp.zeros((BLOCK, BLOCK), jnp.float32))
    if bias:
        total = rounded(total, y_ref.dtype, interpret) + vector(bias[0], j, shape[1])[None, :]
    store(y_ref, total.astype(y_ref.dtype), inside(i, j, shape))


def row_kernel(x_ref, w_ref, xs_ref, ws_ref, *rest, place, shape, interpret):  # x w [128 k], scales and bias [128]
    (i, j), (*bias, y_ref) = place(pl.program_id(0)), rest
    step = lambda c, total: total + tile_dot(x_ref, w_ref, c, (i, j), shape)
    total = lax.fori_loop(0, x_ref.shape[1] // BLOCK, step, jnp.zeros((BLOCK, BLOCK), jnp.int32))
    y = total.astype(jnp.float32) * vector(xs_ref, i, shape[0])[:, None] * vector(ws_ref, j, shape[1])[None, :]
    if bias:
        y = y + vector(bias[0], j, shape[1])[None, :]
    store(y_ref, y.astype(y_ref.dtype), inside(i, j, shape))


def tile_dot(x_ref, w_ref, c, place, shape):  # -> int32 [128 128]
    """The products over block c of k; rows past the end are zeros."""
    columns, (i, j), (m, n) = pl.ds(c * BLOCK, BLOCK), place, shape
    x, w = load(x_ref.at[:, columns], inside(i, None, (m, 0))), load(w_ref.at[:, columns], inside(j, None, (n, 0)))
    return dot(x, w, (1, 1), jnp.int32)


def vector(ref, i, size):  # [128] -> float32
    return load(ref, along(i, size)).astype(jnp.float32)


def along(i, size: int):  # -> bool [128] or None
    """Which of the 128 places of tile i exist; None if every tile is full."""
    return i * BLOCK + jnp.arange(BLOCK, dtype=jnp.int32) < size if size % BLOCK else None


def inside(i, j, shape):  # -> bool, broadcast against [128 128], or None
    """Which elements of tile (i, j) exist; None if every tile is full."""
    rows, columns = along(i, shape[0]), along(j, shape[1])
    if rows is None or columns is None:
        return rows[:, None] if rows is not None else columns[None, :] if columns is not None else None
    return rows[:, None] & columns[None, :]
