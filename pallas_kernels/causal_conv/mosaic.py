"""The convolution of pairs of frames on Hopper, through Mosaic GPU: a product whose gathered
operand is never in memory.

A program stays on its multiprocessor and works through tiles: 8 strips of some rows and 8 columns,
of a pair of frames, and 96 outputs. One warpgroup copies 32 channels of the pixels that a tile
sees, from which all nine taps in space are read, and the weights of three taps at a time; the
others multiply (wgmma). A cluster is two programs with pixels of their own: each fetches half of
the weights and sends it to both.

The two middle products are in both frames of the output. When they are complete the accumulators
become their sum and their difference, and the outer products go on from there: so no output is in
memory before it is one, and two accumulators are enough.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.causal_conv.triton import frame_pairs
from pallas_kernels.causal_conv.winograd import (
    OUTPUTS,
    SLAB,
    STRIPS,
    from_strips,
    in_strips,
    refusal,
    weights,
)
from pallas_kernels.mosaic import programs, refuse, swizzled, unavailable

__all__ = ["Tile", "causal_conv", "pair_products"]

COLUMNS = 8  # of pixels in a tile
ROWS = STRIPS * COLUMNS  # pixels of one product
STRIPES = OUTPUTS // SLAB  # of a tile's outputs, each stored by itself
TAPS = 3  # of a copy of weights: those of one row
CLUSTER = 2  # programs that share the weights
REGISTERS = 160  # of a multiplying thread


@dataclasses.dataclass(frozen=True)
class Tile:
    """Sizes of the kernel.

    warpgroups: that multiply, a row of pixels each.
    slabs, taps: copies of frames and of weights in their rings.
    """

    warpgroups: int
    slabs: int
    taps: int


TILE = Tile(warpgroups=3, slabs=3, taps=4)


def causal_conv(x, past, gain, kernel, bias, plus, *, interpret: bool):
    """`reference.causal_conv`. Raises ValueError for shapes, dtypes, devices and versions of jax
    that the kernels do not take."""
    op, b = "causal_conv", x.shape[0]
    refuse(op, refusal(x, past, kernel))
    refuse(op, unavailable())
    pairs, past = frame_pairs(in_strips(x), past, gain, interpret=interpret)
    if plus is not None:
        plus = rearrange(in_strips(plus), "b (t n) v p o -> (b t) n v p o", n=2)
    y = pair_products(
        rearrange(pairs, "b t ... -> (b t) ..."),
        weights(kernel, x.dtype),
        bias.astype(jnp.float32),
        plus,
        interpret=interpret,
    )
    return from_strips(rearrange(y, "(b t) n v p o -> b (t n) v p o", b=b)), past


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
    """What is fixed when a kernel is compiled. pairs, down, across: tiles of pixels; columns: tiles
    of outputs; slabs: of channels; clusters: how many work at a time; plus: whether anything is
    added to the outputs."""

    tile: Tile
    pairs: int
    down: int
    across: int
    columns: int
    slabs: int
    clusters: int
    plus: bool

    @property
    def pixels(self) -> int:
        return self.pairs * self.down * self.across

    @property
    def total(self) -> int:
        return pl.cdiv(self.pixels, CLUSTER) * self.columns

    def place(self, t):
        """Returns where this program's tile of the cluster's t-th lies."""
        tile = lax.div(t, self.columns) * CLUSTER + lax.axis_index("cluster")
        tile = lax.min(tile, self.pixels - 1)  # of an odd number the last one is made twice
        return _Place(
            pair=lax.div(tile, self.across * self.down),
            row=lax.rem(lax.div(tile, self.across), self.down) * self.tile.warpgroups,
            pixel=lax.rem(tile, self.across) * ROWS,
            column=lax.rem(t, self.columns),
        )


@dataclasses.dataclass(frozen=True)
class _Place:
    """A tile: its pair of frames, its first row in every strip, its first pixel in a row of eight
    strips, and its tile of outputs."""

    pair: object
    row: object
    pixel: object
    column: object

    def outputs(self, stripe):
        return pl.ds(self.column * OUTPUTS + stripe * SLAB, SLAB)


@dataclasses.dataclass(frozen=True)
class _Buffers:
    """Shared memory. x [slabs rows+2 80 32] and w [taps 288 32] are the rings, y [rows 2 stripes 64
    32] what is added and then the outputs on their way, bias [96]; a barrier for each: full ones
    complete with the copies, empty ones when all have read."""

    x: object
    w: object
    y: object
    bias: object
    x_full: object
    x_empty: object
    w_full: object
    w_empty: object
    y_full: object
    y_empty: object
    bias_full: object
    bias_empty: object


@partial(jax.jit, static_argnames=("tile", "interpret"))  # lowered once for all layers of a shape
def pair_products(x, weights, bias, plus=None, *, tile: Tile = TILE, interpret: bool = False):
    """Two frames of outputs from the combinations of four frames.

    x [n 4 i/32 v+2 8(w+2) 32] as `frame_pairs` makes it, weights [o/96 4 i/32 3 288 32] of
    `winograd.weights`, bias f32 [o], plus [n 2 v 8w o] or None -> [n 2 v 8w o].
    """
    n, _, slabs, v, pixels, _ = x.shape
    v, pixels, columns = v - 2, pixels - 2 * STRIPS, weights.shape[0]
    plan = _Plan(
        tile=tile,
        pairs=n,
        down=pl.cdiv(v, tile.warpgroups),
        across=pl.cdiv(pixels, ROWS),
        columns=columns,
        slabs=slabs,
        plus=plus is not None,
        clusters=max(programs(interpret) // CLUSTER, 1),
    )
    out = jax.ShapeDtypeStruct((n, 2, v, pixels, columns * OUTPUTS), x.dtype)
    given = (x, weights, bias) if plus is None else (x, weights, bias, plus)
    return _launch(plan, out, interpret)(*given)


def _launch(plan: _Plan, out, interpret: bool):
    """Returns the kernel as a function of frames, weights, bias and what is added, if anything
    is."""
    tile, inputs = plan.tile, 3 + plan.plus
    shared = lambda *shape: plgpu.SMEM(shape, out.dtype, transforms=swizzled(SLAB, out.dtype))
    empty = lambda **ring: plgpu.Barrier(num_arrivals=tile.warpgroups, **ring)
    buffers = _Buffers(
        x=shared(tile.slabs, tile.warpgroups + 2, ROWS + 2 * STRIPS, SLAB),
        w=shared(tile.taps, TAPS * OUTPUTS, SLAB),
        y=shared(tile.warpgroups, 2, STRIPES, ROWS, SLAB),
        bias=plgpu.SMEM((OUTPUTS,), jnp.float32),
        x_full=plgpu.Barrier(num_barriers=tile.slabs),
        x_empty=empty(num_barriers=tile.slabs),
        w_full=plgpu.Barrier(num_barriers=tile.taps),
        w_empty=plgpu.ClusterBarrier(
            collective_axes=("cluster",), num_arrivals=tile.warpgroups, num_barriers=tile.taps
        ),
        y_full=plgpu.Barrier(num_arrivals=2 * STRIPES * tile.warpgroups),
        y_empty=empty(),
        bias_full=plgpu.Barrier(),
        bias_empty=empty(),
    )

    def causal_conv(*refs):  # the name that a profile shows
        _kernel(plan, refs[:inputs], refs[inputs], _Buffers(*refs[inputs + 1 :]), interpret)

    return plgpu.kernel(
        causal_conv,
        out_type=out,
        scratch_types=[getattr(buffers, field.name) for field in dataclasses.fields(buffers)],
        grid=(plan.clusters,),
        grid_names=("grid",),
        cluster=(CLUSTER,),
        cluster_names=("cluster",),
        num_threads=tile.warpgroups + 1,
        thread_name="warpgroup",
        # the barriers that Mosaic would add order what one warpgroup writes and another reads;
        # here each reads what it wrote itself, or waits for a barrier of its own
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )


def _kernel(plan: _Plan, ins, y, buffers: _Buffers, interpret: bool):
    """One program: the warpgroups that multiply, and the one that copies."""
    warpgroup, count = lax.axis_index("warpgroup"), plan.tile.warpgroups
    first = lax.axis_index("grid")
    mine = lax.div(plan.total - first + plan.clusters - 1, plan.clusters)
    place = lambda i: plan.place(first + i * plan.clusters)
    pl.when(warpgroup < count)(partial(_multiply, plan, mine, place, y, buffers, interpret))
    pl.when(warpgroup == count)(partial(_copy, plan, mine, place, ins, buffers))


def _multiply(plan: _Plan, mine, place, y, buffers: _Buffers, interpret: bool):
    """A warpgroup that multiplies: its row of each tile, from the rings to memory."""
    slabs, taps = plan.tile.slabs, plan.tile.taps
    row = lax.axis_index("warpgroup")
    plgpu.set_max_registers(REGISTERS, action="increase")
    for ring, count in ((buffers.x_empty, slabs), (buffers.w_empty, taps)):
        for n in range(count):
            plgpu.barrier_arrive(ring.at[n])
    plgpu.barrier_arrive(buffers.bias_empty)
    if plan.plus:
        plgpu.barrier_arrive(buffers.y_empty)

    def release(empty, n, count):
        @pl.when(n >= 0)
        def _():
            plgpu.barrier_arrive(empty.at[lax.rem(n, count)])

    def add_product(first, total):
        """Adds one of the four products, whose slabs of channels are numbered from `first`."""

        def step(j, _):
            number, down = first + lax.div(j, 3), lax.rem(j, 3)
            copy = first * 3 + j
            x = buffers.x.at[lax.rem(number, slabs)]
            w = buffers.w.at[lax.rem(copy, taps)]

            @pl.when(down == 0)
            def _():
                plgpu.barrier_wait(buffers.x_full.at[lax.rem(number, slabs)])

            plgpu.barrier_wait(buffers.w_full.at[lax.rem(copy, taps)])
            for across in range(TAPS):
                pixels = x.at[row + down, pl.ds(across * STRIPS, ROWS)]
                outputs = w.at[pl.ds(across * OUTPUTS, OUTPUTS)].transpose((1, 0))
                plgpu.wgmma(total, pixels, outputs)
            plgpu.wgmma_wait(TAPS)  # all but these: some are always under way
            release(buffers.w_empty, copy - 1, taps)

            @pl.when(down == 0)
            def _():
                release(buffers.x_empty, number - 1, slabs)

        lax.fori_loop(0, 3 * plan.slabs, step, None)

    @pl.loop(0, mine)
    def _(i):
        at, first = place(i), 4 * i * plan.slabs

        def products(begin):
            def run(*totals):
                for n, total in enumerate(totals):
                    add_product(first + (begin + n) * plan.slabs, total)
                plgpu.wgmma_wait(0)
                return tuple(total[...] for total in totals)

            return run

        accumulators = [plgpu.ACC((ROWS, OUTPUTS), jnp.float32)] * 2
        total, difference = pl.run_scoped(products(0), *accumulators)
        middle = total + difference, total - difference
        if interpret:  # its accumulators begin with zeros
            outer = pl.run_scoped(products(2), *accumulators)
            totals = [a + b for a, b in zip(middle, outer, strict=True)]
        else:
            run = lambda totals: products(2)(*totals) and None
            totals = pl.run_state(run)(tuple(map(plgpu.ACC.init, middle)))
        plgpu.barrier_wait(buffers.bias_full)
        if plan.plus:
            plgpu.barrier_wait(buffers.y_full)
        else:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        _store(totals, row, plan.plus, buffers)
        plgpu.barrier_arrive(buffers.bias_empty)
        plgpu.commit_smem()

        @pl.when(at.row + row < y.shape[2])
        def _():
            @pl.loop(0, 2 * STRIPES)
            def _(n):
                frame, stripe = lax.div(n, STRIPES), lax.rem(n, STRIPES)
                to = y.at[at.pair, frame, at.row + row, pl.ds(at.pixel, ROWS), at.outputs(stripe)]
                plgpu.copy_smem_to_gmem(buffers.y.at[row, frame, stripe], to)

        if plan.plus:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_arrive(buffers.y_empty)

    last = 4 * mine * plan.slabs - 1
    release(buffers.x_empty, last, slabs)
    release(buffers.w_empty, 3 * last + 2, taps)
    plgpu.wait_smem_to_gmem(0)


def _store(totals, row, plus: bool, buffers: _Buffers):
    """The epilogue of a warpgroup's tile: bias and what is added, one rounding, shared memory."""
    by_column = plgpu.Layout.WGMMA.reduce(0)
    for stripe in range(STRIPES):
        bias = plgpu.load(buffers.bias.at[pl.ds(stripe * SLAB, SLAB)], layout=by_column)
        bias = lax.broadcast_in_dim(bias, (ROWS, SLAB), (1,))
        for frame, total in enumerate(totals):
            value = total[:, stripe * SLAB : (stripe + 1) * SLAB] + bias
            to = buffers.y.at[row, frame, stripe]
            if plus:
                value = value + plgpu.load(to, layout=plgpu.Layout.WGMMA).astype(jnp.float32)
            to[...] = value.astype(to.dtype)


def _copy(plan: _Plan, mine, place, ins, buffers: _Buffers):
    """The warpgroup that copies: slabs of frames and rows of taps as buffers come free, and each
    tile's bias and what is added to it."""
    x, w, bias, *plus = ins
    tile = plan.tile
    plgpu.set_max_registers(24, action="decrease")

    def copy_what_is_added(at):
        plgpu.barrier_wait(buffers.bias_empty)
        outputs = pl.ds(at.column * OUTPUTS, OUTPUTS)
        plgpu.copy_gmem_to_smem(bias.at[outputs], buffers.bias, buffers.bias_full)
        if not plus:
            return
        plgpu.barrier_wait(buffers.y_empty)
        (frames,) = plus

        @pl.loop(0, tile.warpgroups * 2 * STRIPES)
        def _(n):
            row, frame = lax.div(n, 2 * STRIPES), lax.rem(lax.div(n, STRIPES), 2)
            stripe = lax.rem(n, STRIPES)
            line = lax.min(at.row + row, frames.shape[2] - 1)  # below the last one: any
            pixels = pl.ds(at.pixel, ROWS)
            given = frames.at[at.pair, frame, line, pixels, at.outputs(stripe)]
            plgpu.copy_gmem_to_smem(given, buffers.y.at[row, frame, stripe], buffers.y_full)

    @pl.loop(0, mine)
    def _(i):
        at = place(i)
        rows, pixels = pl.ds(at.row, tile.warpgroups + 2), pl.ds(at.pixel, ROWS + 2 * STRIPS)

        def slab(j, _):
            number = 4 * i * plan.slabs + j
            n, channels = lax.div(j, plan.slabs), lax.rem(j, plan.slabs)
            product = jnp.where(n == 3, 3, lax.rem(n + 1, 3))  # 1, 2, 0, 3
            # by now what the tile before had of them has been used
            pl.when(j == plan.slabs)(partial(copy_what_is_added, at))
            to = lax.rem(number, tile.slabs)
            plgpu.barrier_wait(buffers.x_empty.at[to])
            plgpu.copy_gmem_to_smem(
                x.at[at.pair, product, channels, rows, pixels],
                buffers.x.at[to],
                buffers.x_full.at[to],
            )
            for down in range(3):
                to = lax.rem(3 * number + down, tile.taps)
                plgpu.barrier_wait(buffers.w_empty.at[to])
                plgpu.copy_gmem_to_smem(
                    w.at[at.column, product, channels, down],
                    buffers.w.at[to],
                    buffers.w_full.at[to],
                    collective_axes="cluster",
                )

        lax.fori_loop(0, 4 * plan.slabs, slab, None)

    # nothing may be on its way to a program of the cluster that has ended
    last = 4 * mine * plan.slabs
    for n in range(tile.slabs):
        plgpu.barrier_wait(buffers.x_empty.at[lax.rem(last + n, tile.slabs)])
    for n in range(tile.taps):
        plgpu.barrier_wait(buffers.w_empty.at[lax.rem(3 * last + n, tile.taps)])
    plgpu.barrier_wait(buffers.bias_empty)
    if plus:
        plgpu.barrier_wait(buffers.y_empty)
