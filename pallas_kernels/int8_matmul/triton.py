"""Kernels of the int8 products, k in steps of 128: with scales by row and column 128 x 128 outputs
to a program, with scales by tile 64 x 128, because the programs that share a multiprocessor then
hide the scaling of one behind the products of another.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.int8_matmul.quantize import BLOCK, tiles
from pallas_kernels.int8_matmul.reference import in_groups
from pallas_kernels.primitives import blocks, dot, fma, launch, load, store
from pallas_kernels.quantized import QTensor
from pallas_kernels.rounding import divide, largest, narrow, rounded
from pallas_kernels.tuning import tile

__all__ = ["block_product", "quantize", "row_product", "swizzled"]

HALF = BLOCK // 2
RANKS = 64  # of the factors beside a weight that are multiplied at a time
GROUP = 8  # tiles of rows that share a pass over the weight while it is in the cache


def quantize(x, *, interpret: bool) -> QTensor:  # [m k] float
    """`quantize.quantize`: one program for a tile."""
    (m, k), shape, at = x.shape, tiles(x.shape), tile("int8_matmul", "quantize")
    spec = pl.BlockSpec((BLOCK, BLOCK), lambda c, r: (r, c))
    out = jax.ShapeDtypeStruct((m, k), jnp.int8), jax.ShapeDtypeStruct(shape, jnp.float32)
    kernel = partial(quantize_kernel, shape=(m, k), interpret=interpret)
    specs = (spec, pl.BlockSpec((None, None), lambda c, r: (r, c)))
    run = launch(
        kernel,
        out,
        shape[::-1],
        [spec],
        specs,
        warps=at.warps,
        stages=at.stages,
        interpret=interpret,
    )
    return QTensor(*run(x))


def quantize_kernel(x_ref, values_ref, scale_ref, *, shape, interpret):
    """x and values [128 128], scale []."""
    mask = inside(pl.program_id(1), pl.program_id(0), shape, x_ref.shape)
    x = load(x_ref, mask).astype(jnp.float32)
    amax = largest([x])
    factor = divide(jnp.full((1, 1), 128, jnp.float32), amax, interpret)
    store(values_ref, narrow(x * factor, jnp.int8, interpret), mask)
    store(scale_ref, amax * (1 / 128))


def block_product(x: QTensor, weight: QTensor, bias, out_dtype, *, interpret: bool):
    """Values [m k], [n k] -> [m n]. Sum over the blocks of k, in order, of float32(int32 dot) *
    (scale_x * scale_weight); rounded, and again with the bias."""
    bias = None if bias is None else bias.astype(out_dtype)
    columns = x.scale.shape[1]
    scales = (
        pl.BlockSpec((None, columns), lambda i, j: (i * HALF // BLOCK, 0)),
        pl.BlockSpec((None, columns), lambda i, j: (j, 0)),
    )
    at = tile("int8_matmul", "block_product")
    return product(block_kernel, x, weight, bias, {}, out_dtype, HALF, scales, at, interpret)


def row_product(
    x: QTensor,
    weight: QTensor,
    bias,
    low_rank=None,
    stream=None,
    gate=None,
    *,
    out_dtype,
    groups=1,
    interpret: bool,
):
    """Values [m k], [n k] -> [m n], or [groups m n/groups]. float32(int32 dot) * scale_x *
    scale_weight, plus the product of low_rank (narrow [m r], up [n r]; r a power of two from 16),
    plus bias, times gate [n] and added to stream [m n], rounded once. Raises ValueError unless k is
    a multiple of 128."""
    k = x.values.shape[1]
    if k % BLOCK:
        raise ValueError(
            f"int8 product: k is {k}; the kernel takes multiples of {BLOCK}, nearest:"
            f' {blocks(k, BLOCK) * BLOCK}; impl="xla" takes any'
        )
    scales = pl.BlockSpec((BLOCK,), lambda i, j: (i,)), pl.BlockSpec((BLOCK,), lambda i, j: (j,))
    at = tile("int8_matmul", "row_product")
    more = {"low_rank": low_rank, "stream": stream, "gate": gate}
    out = partial(product, row_kernel, x, weight, bias, more, out_dtype, BLOCK, scales, at)
    if weight.values.shape[0] % (groups * BLOCK):  # a tile would lie in two groups
        return in_groups(out(interpret), groups)
    return out(interpret, groups)


def product(
    kernel: Callable, x, weight, bias, more, out_dtype, rows, scales, at, interpret, groups=1
):
    """The launch that both kernels share: outputs of `rows` x 128; index maps of the scales take
    the place (i, j) of a tile. more: by name, what one of the kernels takes besides. groups: of
    whole tiles of columns."""
    (m, k), n = x.values.shape, weight.values.shape[0]
    grid = blocks(m, rows), blocks(n, BLOCK)
    place = partial(swizzled, grid=grid)
    placed = lambda spec: pl.BlockSpec(spec.block_shape, lambda p: spec.index_map(*place(p)))
    given = {name: part for name, part in ({"bias": bias} | more).items() if part is not None}
    rank = given["low_rank"][0].shape[1] if "low_rank" in given else 0
    of_columns = pl.BlockSpec((BLOCK,), lambda i, j: (j,))
    of_given = {
        "bias": of_columns,
        "gate": of_columns,
        "stream": pl.BlockSpec((rows, BLOCK), lambda i, j: (i, j)),
        "low_rank": (
            pl.BlockSpec((rows, rank), lambda i, j: (i, 0)),
            pl.BlockSpec((BLOCK, rank), lambda i, j: (j, 0)),
        ),
    }
    specs = [
        pl.BlockSpec((rows, k), lambda i, j: (i, 0)),
        pl.BlockSpec((BLOCK, k), lambda i, j: (j, 0)),
        *scales,
        {name: of_given[name] for name in given},
    ]
    out, out_spec = (m, n), pl.BlockSpec((rows, BLOCK), place)
    if groups > 1:
        out, wide = (groups, m, n // groups), grid[1] // groups
        grouped = lambda i, j: (j // wide, i, j % wide)
        out_spec = placed(pl.BlockSpec((None, rows, BLOCK), grouped))
    return launch(
        partial(kernel, place=place, shape=(m, n), interpret=interpret),
        jax.ShapeDtypeStruct(out, out_dtype),
        (grid[0] * grid[1],),
        jax.tree.map(placed, specs),
        out_spec,
        warps=at.warps,
        stages=at.stages,
        interpret=interpret,
    )(x.values, weight.values, x.scale, weight.scale, given)


def swizzled(p, grid):
    """Row and column of the p-th tile: GROUP tiles down, then one across."""
    rows, columns = grid
    first = p // (GROUP * columns) * GROUP
    height = jnp.minimum(rows - first, GROUP)
    p = p % (GROUP * columns)
    return first + p % height, p // height


def block_kernel(x_ref, w_ref, xs_ref, ws_ref, given, y_ref, *, place, shape, interpret):
    """x [64 k], w [128 k], scales [k/128]; given: perhaps the bias [128]."""
    i, j = place(pl.program_id(0))

    def step(c, total):
        part = tile_dot(x_ref, w_ref, c, (i, j), shape).astype(jnp.float32)
        return fma(part, xs_ref[c] * ws_ref[c], total, interpret)

    total = lax.fori_loop(0, xs_ref.shape[0], step, jnp.zeros(y_ref.shape, jnp.float32))
    if "bias" in given:
        bias = vector(given["bias"], j, shape[1])[None, :]
        total = rounded(total, y_ref.dtype, interpret) + bias
    store(y_ref, total.astype(y_ref.dtype), inside(i, j, shape, y_ref.shape))


def row_kernel(x_ref, w_ref, xs_ref, ws_ref, given, y_ref, *, place, shape, interpret):
    """x w [128 k], scales [128]; what is given of bias and gate [128], stream [128 128], low_rank:
    narrow and up [128 r]."""
    i, j = place(pl.program_id(0))
    here = inside(i, j, shape, y_ref.shape)
    step = lambda c, total: total + tile_dot(x_ref, w_ref, c, (i, j), shape)
    total = lax.fori_loop(0, x_ref.shape[1] // BLOCK, step, jnp.zeros(y_ref.shape, jnp.int32))
    y = total.astype(jnp.float32) * vector(xs_ref, i, shape[0])[:, None]
    y = y * vector(ws_ref, j, shape[1])[None, :]
    if "low_rank" in given:
        factors, rank = given["low_rank"], given["low_rank"][0].shape[1]
        width = min(rank, RANKS)
        step = lambda c, y: y + tile_dot(*factors, c, (i, j), shape, width, jnp.float32)
        y = lax.fori_loop(0, rank // width, step, y)
    if "bias" in given:
        y = y + vector(given["bias"], j, shape[1])[None, :]
    if "gate" in given:
        y = y * vector(given["gate"], j, shape[1])[None, :]
    if "stream" in given:
        y = load(given["stream"], here).astype(jnp.float32) + y
    store(y_ref, y.astype(y_ref.dtype), here)


def tile_dot(x_ref, w_ref, c, place, shape, width=BLOCK, dtype=jnp.int32):  # -> [rows 128]
    """The products over block c of k, `width` wide; rows past the end are zeros."""
    columns = pl.ds(c * width, width)
    operands = []
    for ref, i, size in zip((x_ref, w_ref), place, shape, strict=True):
        rows = along(i, size, ref.shape[0])
        mask = None if rows is None else rows[:, None]
        operands.append(load(ref.at[:, columns], mask))
    return dot(*operands, (1, 1), dtype)


def vector(ref, i, size):  # -> float32
    return load(ref, along(i, size, ref.shape[0])).astype(jnp.float32)


def along(i, size: int, block: int):  # -> bool [block] or None
    """Which places of tile i exist; None if every tile is full."""
    return i * block + jnp.arange(block, dtype=jnp.int32) < size if size % block else None


def inside(i, j, shape, block):  # -> bool, broadcast against a tile of the shape `block`, or None
    """Which elements of tile (i, j) exist; None if every tile is full."""
    rows, columns = along(i, shape[0], block[0]), along(j, shape[1], block[1])
    if rows is None:
        return None if columns is None else columns[None, :]
    if columns is None:
        return rows[:, None]
    return rows[:, None] & columns[None, :]
