"""The product of 8-bit rows on Hopper, through Mosaic GPU: scales and bias in its epilogue.

A program stays on its multiprocessor and works through tiles of outputs. One warpgroup copies
slices of both operands into a ring of buffers; the others multiply them (wgmma), and scale, round
and store what they hold while the copies of the next tile are under way. A cluster is two programs
whose tiles lie below each other: each fetches half of the weight's slice and sends it to both.

Against the Triton kernel, whose outputs are 128 x 128, a tile of 128 x 256 reads a quarter less
from the cache for each product, and nothing waits between tiles.

What the outputs are added to is asked for before a tile's products begin, and waits in registers.
The last tile of rows begins as late as the output allows: it makes some rows again
that the one before it has made, and nothing needs to be filled up.

GELU and the quantisation of its rows are not part of the epilogue: the scale of a row is known
only when all its columns are, which belong to other programs. The kernel that does both reads
every element once, so there would be no traffic to save.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.int8_matmul.reference import added, in_groups
from pallas_kernels.mosaic import (
    SLICE,
    filled,
    product_refusal,
    programs,
    refuse,
    swizzled,
    unavailable,
)
from pallas_kernels.quantized import QTensor

__all__ = ["SMALL", "Tile", "WIDE", "row_product", "tile_for"]

WARPGROUPS = 2  # that multiply, one below the other
WARPGROUP = 128  # threads
ROWS = 64  # outputs of one warpgroup
HEIGHT = WARPGROUPS * ROWS
STRIPE = 64  # columns of the outputs in one store
SLOTS = 2  # stores of a warpgroup under way
GROUP = 8  # tiles of rows that share a pass over the weight while it is in the cache


@dataclasses.dataclass(frozen=True)
class Tile:
    """Sizes of the kernel.

    columns: of the outputs of one program, whose rows are 128; a multiple of two stripes.
    stages: slices of the operands in the ring.
    cluster: programs that share the slices of the weight.
    """

    columns: int
    stages: int
    cluster: int


WIDE = Tile(columns=256, stages=4, cluster=2)
SMALL = Tile(columns=128, stages=6, cluster=1)


def tile_for(m: int, n: int, programs: int) -> Tile:
    """Returns the tile for m x n outputs on so many programs: a small one where the other would
    leave multiprocessors without work."""
    if pl.cdiv(m, HEIGHT) * pl.cdiv(n, WIDE.columns) < programs:
        return SMALL
    return WIDE


def row_product(
    x: QTensor,
    weight: QTensor,
    bias,
    out_dtype,
    *,
    stream=None,
    gate=None,
    groups: int = 1,
    tile: Tile | None = None,
    interpret=False,
):  # [m k], [n k] -> [m n], or [groups m n/groups]
    """float(dot) * scale_x * scale_weight + bias, times gate [n] and added to stream [m n] if they
    are given, rounded once to out_dtype.

    Values [m k] and [n k] int8 with int32 sums, or float8_e4m3fn with float32 sums; scales float32
    [m] and [n]; bias [n] or None; a stream of out_dtype, in one group. Raises ValueError for
    shapes, dtypes, devices and versions of jax that the kernel does not take. See
    `reference.row_product` and `reference.fp8_product`.
    """
    op = "product of 8-bit rows"
    refuse(op, product_refusal(x.values, weight.values, out_dtype))
    refuse(op, unavailable())
    if stream is not None and weight.values.shape[0] % STRIPE:
        return added(
            row_product(x, weight, bias, out_dtype, tile=tile, interpret=interpret), stream, gate
        )
    (m, k), n, number = x.values.shape, weight.values.shape[0], programs(interpret)
    tile = tile or tile_for(m, n, number)
    tall = HEIGHT * tile.cluster
    values, w_scale = filled(x.values, 0), weight.scale
    rows = max(len(values), tall)
    plan = _Plan(
        tile=tile,
        steps=k // SLICE,
        rows=pl.cdiv(rows, tall),
        columns=pl.cdiv(n, tile.columns),
        clusters=max(number // tile.cluster, 1),
        last=rows - tall,
        accumulator=jnp.dtype(jnp.int32 if x.values.dtype == jnp.int8 else jnp.float32),
    )
    bias = jnp.zeros(n, jnp.float32) if bias is None else bias
    if gate is not None:
        w_scale, bias = (a.astype(jnp.float32) * gate for a in (w_scale, bias))
    # nothing is added to arrays that have whole tiles
    bias = jnp.pad(bias, (0, plan.columns * tile.columns - n))
    ins = [values, weight.values, _to(rows, x.scale), w_scale, bias]
    if stream is not None:
        ins.append(_to(rows, stream))
    whole = n % (groups * STRIPE) == 0  # no stripe lies in two groups
    shape = (len(values), n)
    if groups > 1 and whole:
        shape = (groups, len(values), n // groups)
    out = jax.ShapeDtypeStruct(shape, out_dtype)
    y = _launch(plan, values.dtype, out, len(ins), interpret)(*ins)[..., :m, :]
    return y if whole else in_groups(y, groups)


def _to(rows: int, x):
    """x with zeros after its last row, to so many rows."""
    return jnp.pad(x, ((0, rows - len(x)), *((0, 0),) * (x.ndim - 1)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
    """What is fixed when a kernel is compiled. steps: slices of k; rows and columns: tiles of the
    output, a cluster's counted as one; clusters: how many work at a time; last: the row of the
    output where the last of its tiles begins, with rows that the one before it has too."""

    tile: Tile
    steps: int
    rows: int
    columns: int
    clusters: int
    last: int
    accumulator: jnp.dtype

    @property
    def total(self) -> int:
        return self.rows * self.columns

    def place(self, t):
        """Returns row and column of the t-th tile: GROUP tiles down, then one across."""
        first = lax.div(t, GROUP * self.columns) * GROUP
        height = lax.min(self.rows - first, GROUP)
        t = lax.rem(t, GROUP * self.columns)
        return first + lax.rem(t, height), lax.div(t, height)


@dataclasses.dataclass(frozen=True)
class _Buffers:
    """Shared memory. x [stages 128 k] and w [stages columns k] are the ring, y [warpgroups slots 64
    stripe] outputs on their way, vectors [2 columns] the weight's scales and the bias of a tile; a
    barrier for each: full ones complete with the copies, empty ones when all have read."""

    x: object
    w: object
    y: object
    vectors: object
    full: object
    empty: object
    vectors_full: object
    vectors_empty: object


def _launch(plan: _Plan, dtype, out, inputs: int, interpret):
    """Returns the kernel as a function of values, values, scales, scales, bias of whole tiles and,
    if it takes so many inputs, a stream."""
    tile = plan.tile
    shared = lambda shape, dtype: plgpu.SMEM(shape, dtype, transforms=swizzled(shape[-1], dtype))
    ring = {"num_arrivals": WARPGROUPS, "num_barriers": tile.stages}
    if tile.cluster > 1:
        empty = plgpu.ClusterBarrier(collective_axes=("cluster",), **ring)
    else:
        empty = plgpu.Barrier(**ring)
    buffers = _Buffers(
        x=shared((tile.stages, HEIGHT, SLICE), dtype),
        w=shared((tile.stages, tile.columns, SLICE), dtype),
        y=shared((WARPGROUPS, SLOTS, ROWS, STRIPE), out.dtype),
        vectors=plgpu.SMEM((2, tile.columns), jnp.float32),
        full=plgpu.Barrier(num_arrivals=2, num_barriers=tile.stages),
        empty=empty,
        vectors_full=plgpu.Barrier(num_arrivals=2),
        vectors_empty=plgpu.Barrier(num_arrivals=WARPGROUPS),
    )

    def row_product(*refs):  # the name that a profile shows
        _kernel(plan, refs[:inputs], refs[inputs], _Buffers(*refs[inputs + 1 :]))

    return plgpu.kernel(
        row_product,
        out_type=out,
        scratch_types=[getattr(buffers, field.name) for field in dataclasses.fields(buffers)],
        grid=(plan.clusters,),
        grid_names=("grid",),
        cluster=(tile.cluster,),
        cluster_names=("cluster",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        # the barriers that Mosaic would add order what one warpgroup writes and another reads;
        # here each reads what it wrote itself, or waits for a barrier of its own
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )


def _kernel(plan: _Plan, ins, y, buffers: _Buffers):
    """One program: the warpgroups that multiply, and the one that copies."""
    warpgroup, tile = lax.axis_index("warpgroup"), plan.tile
    first = lax.axis_index("grid")
    mine = lax.div(plan.total - first + plan.clusters - 1, plan.clusters)

    def origin(i):
        """First row and column of this program's i-th tile."""
        row, column = plan.place(first + i * plan.clusters)
        top = lax.min(row * tile.cluster * HEIGHT, plan.last)
        return top + lax.axis_index("cluster") * HEIGHT, column * tile.columns

    read = ins[2], *ins[5:]
    pl.when(warpgroup < WARPGROUPS)(partial(_multiply, plan, mine, origin, read, y, buffers))
    pl.when(warpgroup == WARPGROUPS)(partial(_copy, plan, mine, origin, ins, buffers))


def _multiply(plan: _Plan, mine, origin, read, y, buffers: _Buffers):
    """A warpgroup that multiplies: its part of each tile, from the ring to memory. read: the scales
    of the rows, and perhaps the stream."""
    x_scale, *stream = read
    tile, stages, steps = plan.tile, plan.tile.stages, plan.steps
    plgpu.set_max_registers(240, action="increase")
    for stage in range(stages):
        plgpu.barrier_arrive(buffers.empty.at[stage])
    plgpu.barrier_arrive(buffers.vectors_empty)
    row = lax.axis_index("warpgroup") * ROWS

    @pl.loop(0, mine)
    def _(i):
        top, left = origin(i)
        here = pl.ds(top + row, ROWS)
        by_row = plgpu.Layout.WGMMA.reduce(1)
        scale = plgpu.load(x_scale.at[here], layout=by_row, optimized=False)
        columns = range(0, tile.columns, STRIPE) if stream else ()
        stripes = [_stripe(stream[0], here, left + c) for c in columns]

        def products(total):
            def step(j, _):
                t = i * steps + j
                stage = lax.rem(t, stages)
                plgpu.barrier_wait(buffers.full.at[stage])
                w = buffers.w.at[stage].transpose((1, 0))
                plgpu.wgmma(total, buffers.x.at[stage, pl.ds(row, ROWS)], w)
                plgpu.wgmma_wait(1)  # all but the last: one is always under way

                @pl.when(j > 0)
                def _():
                    plgpu.barrier_arrive(buffers.empty.at[lax.rem(t - 1, stages)])

            lax.fori_loop(0, steps, step, None)
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(buffers.empty.at[lax.rem(i * steps + steps - 1, stages)])
            return total[...]

        total = pl.run_scoped(products, plgpu.ACC((ROWS, tile.columns), plan.accumulator))
        plgpu.barrier_wait(buffers.vectors_full)
        _store(total, scale, stripes, y, here, left, buffers)
        plgpu.barrier_arrive(buffers.vectors_empty)

    plgpu.wait_smem_to_gmem(0)


def _stripe(stream, rows, column):
    """A stripe of the stream, read long before it is added. Past the last column it is the last,
    which is not stored."""
    columns = pl.ds(lax.min(column, stream.shape[1] - STRIPE), STRIPE)
    return plgpu.load(stream.at[rows, columns], layout=plgpu.Layout.WGMMA, optimized=False)


def _store(total, x_scale, stripes, y, rows, left, buffers: _Buffers):
    """The epilogue of a warpgroup's tile: total [64 columns] scaled, added to the stream's stripes
    if there are some, rounded and stored in stripes."""
    warpgroup = lax.axis_index("warpgroup")
    by_column, shape = plgpu.Layout.WGMMA.reduce(0), (ROWS, STRIPE)
    for number, c in enumerate(range(0, total.shape[1], STRIPE)):
        stripe, slot = pl.ds(c, STRIPE), number % SLOTS
        scale, bias = (
            lax.broadcast_in_dim(
                plgpu.load(buffers.vectors.at[vector, stripe], layout=by_column), shape, (1,)
            )
            for vector in (0, 1)
        )
        part = total[:, c : c + STRIPE].astype(jnp.float32)
        part = part * lax.broadcast_in_dim(x_scale, shape, (0,)) * scale + bias
        if stripes:
            part = part + stripes[number].astype(jnp.float32)
        plgpu.wait_smem_to_gmem(SLOTS - 1, wait_read_only=True)
        buffers.y[warpgroup, slot] = part.astype(y.dtype)
        plgpu.commit_smem()
        if len(y.shape) == 2:
            to = y.at[rows, pl.ds(left + c, STRIPE)]
        else:
            width = y.shape[2]
            to = y.at[lax.div(left + c, width), rows, pl.ds(lax.rem(left + c, width), STRIPE)]
        plgpu.copy_smem_to_gmem(buffers.y.at[warpgroup, slot], to)


def _copy(plan: _Plan, mine, origin, ins, buffers: _Buffers):
    """The warpgroup that copies: slices of the operands as buffers come free, and each tile's
    vectors. What lies past the end is not stored, so it may be anything."""
    tile, stages, steps = plan.tile, plan.tile.stages, plan.steps
    x, w, _, w_scale, bias, *_ = ins
    by_thread = plgpu.Layout.WG_STRIDED((tile.columns,), vec_size=tile.columns // WARPGROUP)
    shared = "cluster" if tile.cluster > 1 else None
    plgpu.set_max_registers(24, action="decrease")

    @pl.loop(0, mine)
    def _(i):
        top, left = origin(i)
        rows, columns = pl.ds(top, HEIGHT), pl.ds(left, tile.columns)

        def step(j, _):
            stage, at = lax.rem(i * steps + j, stages), pl.ds(j * SLICE, SLICE)
            full = buffers.full.at[stage]
            plgpu.barrier_wait(buffers.empty.at[stage])
            plgpu.copy_gmem_to_smem(x.at[rows, at], buffers.x.at[stage], full)
            plgpu.copy_gmem_to_smem(
                w.at[columns, at], buffers.w.at[stage], full, collective_axes=shared
            )

        part = plgpu.load(bias.at[columns], layout=by_thread, optimized=False)
        # a ring that is free again says that the last tile's vectors are read, too: nothing waits
        middle = min(stages, steps)
        lax.fori_loop(0, middle, step, None)
        plgpu.barrier_wait(buffers.vectors_empty)
        plgpu.copy_gmem_to_smem(w_scale.at[columns], buffers.vectors.at[0], buffers.vectors_full)
        buffers.vectors[1] = part.astype(jnp.float32)
        plgpu.commit_smem()
        plgpu.barrier_arrive(buffers.vectors_full)
        lax.fori_loop(middle, steps, step, None)

    # nothing may be on its way to a program of the cluster that has ended
    for stage in range(stages):
        plgpu.barrier_wait(buffers.empty.at[lax.rem(mine * steps + stage, stages)])
    plgpu.barrier_wait(buffers.vectors_empty)
