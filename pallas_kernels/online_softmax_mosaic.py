"""The loop of attention over lists of key blocks on Hopper, through Mosaic GPU.

The function of `online_softmax.attend`, for the sizes that the networks have; the linear branch
comes from `token_pass_mosaic.query_pass` and is added. A program stays on its multiprocessor and
works through blocks of queries: one warpgroup copies keys and values into rings of buffers, two
multiply, for 64 queries each. The scores of a block are begun together with the products of the
values of the block before, so the softmax of one lies beside the products of the other
(FlashAttention-3, arXiv 2407.08608).

With int8 scores and a small bound nothing is rescaled, so a block's scores are begun before the
softmax of the block before it, too. Otherwise the values' products are awaited after the softmax,
and two things keep ptxas from putting the products in a row: weights that are operands in registers
are rounded only when no product is under way, and the wait stands behind a branch, the wait for the
next keys, over which it is not moved.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic import (
    BLOCK_K,
    BLOCK_Q,
    ROUND,
    ROUND_BITS,
    WIDTH,
    attention_refusal,
    filled,
    programs,
    refuse,
    swizzled,
    unavailable,
)
from pallas_kernels.online_softmax import BOUND
from pallas_kernels.primitives import LOG2E

__all__ = ["Tile", "attend"]

HALF = BLOCK_Q // 2  # queries of a warpgroup


@dataclasses.dataclass(frozen=True)
class Tile:
    """Sizes of the kernel: blocks of keys, and of values, in the rings, and blocks of queries."""

    stages: int
    query_buffers: int


INT8 = Tile(stages=4, query_buffers=1)  # six, for which there is room, were slower on an H200
# as much of shared memory as there is
FLOATS = Tile(stages=3, query_buffers=2)


def attend(
    q,
    k,
    v,
    blocks,
    *,
    scales=None,
    bound=None,
    plus=None,
    keys: int | None = None,
    tile: Tile | None = None,
    interpret: bool = False,
):
    """Softmax attention of each block of 128 queries over its blocks of 64 keys -> o [b l h 128].

    q [b l h 128] and k [b s h 128] int8, or of v's dtype; v [b s h 128] bfloat16 or float16; blocks
    int32 [b h q_blocks chosen], ascending without repeats, or None for all of them.
    scales: of int8 queries and keys, float32 [b h 2*q_blocks], of every 64 queries, and [b h n], n
        at least the number of blocks of keys.
    bound: float32 [b h 2*q_blocks], at least the magnitude of the scores of 64 queries over
        1/sqrt(128), as logarithms to base 2; where it is at most `online_softmax.BOUND` no maximum
        is looked for. None: it is looked for everywhere.
    plus: [b l h 128] of v.dtype, added to o before it is rounded; None for zeros.
    keys: how many of s count, by default all.

    Raises ValueError for sizes, dtypes, devices and versions of jax that the kernel does not take.
    """
    op = "attention"
    refuse(op, attention_refusal(q.shape[-1], BLOCK_Q, BLOCK_K, v.dtype))
    refuse(op, unavailable())
    (b, l, h, _), length = q.shape, k.shape[1] if keys is None else keys
    n = pl.cdiv(l, BLOCK_Q)
    plan = _Plan(
        tile=tile or (INT8 if q.dtype == jnp.int8 else FLOATS),
        shape=(b, h, n),
        keys=length,
        chosen=pl.cdiv(length, BLOCK_K) if blocks is None else blocks.shape[-1],
        scores=q.dtype,
        values=v.dtype,
        listed=blocks is not None,
        bounded=bound is not None,
        adds=plus is not None,
        programs=programs(interpret),
        interpret=interpret,
    )
    q, k, v = (filled(x, 1) for x in (q, k, v))
    plus = None if plus is None else filled(plus, 1)
    ins = {"q": q, "k": k, "v": v, "blocks": blocks, "bound": bound, "plus": plus}
    if scales is not None:
        ins |= {"q_scale": scales[0] * (LOG2E * WIDTH**-0.5), "k_scale": scales[1]}
    ins = {name: x for name, x in ins.items() if x is not None}
    return _launch(plan, ins, jax.ShapeDtypeStruct(q.shape, v.dtype))[:, :l]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
    """What is fixed when a kernel is compiled. shape: batch, heads, blocks of queries; keys: how
    many; chosen: blocks of keys for each block of queries; scores, values: dtypes."""

    tile: Tile
    shape: tuple[int, int, int]
    keys: int
    chosen: int
    scores: jnp.dtype
    values: jnp.dtype
    listed: bool
    bounded: bool
    adds: bool
    programs: int
    interpret: bool

    @property
    def total(self) -> int:
        return math.prod(self.shape)

    @property
    def quantized(self) -> bool:
        return self.scores == jnp.int8

    @property
    def tail(self) -> int:
        """Keys of a last block that is cut; 0 if it is whole."""
        return self.keys % BLOCK_K

    @property
    def registers(self) -> bool:
        """Whether queries are operands in registers."""
        return self.quantized and not self.interpret

    def place(self, t):
        """Returns batch, head and block of queries of the t-th tile. Those of one head follow each
        other: its keys and values stay in the cache."""
        _, h, n = self.shape
        return lax.div(t, h * n), lax.rem(lax.div(t, n), h), lax.rem(t, n)


def _launch(plan: _Plan, ins: dict, out: jax.ShapeDtypeStruct):
    """The kernel on arrays by name."""
    tile = plan.tile
    shared = lambda *shape, dtype: plgpu.SMEM(shape, dtype, transforms=swizzled(shape[-1], dtype))
    ring = lambda arrivals, size: plgpu.Barrier(num_arrivals=arrivals, num_barriers=size)
    scratch = {
        "q_s": shared(tile.query_buffers, BLOCK_Q, WIDTH, dtype=plan.scores),
        "k_s": shared(tile.stages, BLOCK_K, WIDTH, dtype=plan.scores),
        "v_s": shared(tile.stages, BLOCK_K, WIDTH, dtype=plan.values),
        "o_s": shared(2, HALF, WIDTH, dtype=plan.values),
        "q_full": ring(1, tile.query_buffers),
        "q_empty": ring(2, tile.query_buffers),
        "k_full": ring(1, tile.stages),
        "k_empty": ring(2, tile.stages),
        "v_full": ring(1, tile.stages),
        "v_empty": ring(2, tile.stages),
    }
    if plan.adds:
        scratch |= {
            "plus_s": shared(BLOCK_Q, WIDTH, dtype=plan.values),
            "plus_full": ring(1, 1),
            "plus_empty": ring(2, 1),
        }
    if plan.interpret:
        scratch["operand_s"] = shared(2, HALF, WIDTH, dtype=plan.values)
    names = (*ins, "o")

    def attend_blocks(*refs, **buffers):
        _kernel(plan, SimpleNamespace(**dict(zip(names, refs, strict=True)), **buffers))

    return plgpu.kernel(
        attend_blocks,
        out_type=out,
        scratch_types=scratch,
        grid=(plan.programs,),
        grid_names=("grid",),
        num_threads=3,
        thread_name="warpgroup",
        # the barriers that Mosaic would add order what one warpgroup writes and another reads;
        # here each reads what it wrote itself, behind a commit, or waits for a barrier of its own
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
        ),
        interpret=plgpu.InterpretGPUParams() if plan.interpret else None,
    )(*ins.values())


def _kernel(plan: _Plan, refs) -> None:
    """One program: the two warpgroups that multiply, and the one that copies. Names of shared
    memory end in _s, of barriers in _full (copied) and _empty (read by all)."""
    warpgroup, first = lax.axis_index("warpgroup"), lax.axis_index("grid")
    mine = lax.div(plan.total - first + plan.programs - 1, plan.programs)
    place = lambda i: plan.place(first + i * plan.programs)
    pl.when(warpgroup < 2)(partial(_multiply, plan, mine, place, refs))
    pl.when(warpgroup == 2)(partial(_copy, plan, mine, place, refs))


def _copy(plan: _Plan, mine, place: Callable, refs) -> None:
    """The warpgroup that copies: queries, keys and values as buffers come free, and last what is
    added. Tokens past the end are zeros."""
    tile = plan.tile
    plgpu.set_max_registers(24, action="decrease")

    @pl.loop(0, mine)
    def _(i):
        b, h, n = place(i)
        queries, buffer = pl.ds(n * BLOCK_Q, BLOCK_Q), lax.rem(i, tile.query_buffers)
        plgpu.barrier_wait(refs.q_empty.at[buffer])
        plgpu.copy_gmem_to_smem(
            refs.q.at[b, queries, h], refs.q_s.at[buffer], refs.q_full.at[buffer]
        )

        def step(t, j):
            slot, tokens = lax.rem(i * plan.chosen + t, tile.stages), pl.ds(j * BLOCK_K, BLOCK_K)
            following = _number(plan, refs, (b, h, n), t + 1)  # read before the waits
            plgpu.barrier_wait(refs.k_empty.at[slot])
            plgpu.copy_gmem_to_smem(
                refs.k.at[b, tokens, h], refs.k_s.at[slot], refs.k_full.at[slot]
            )
            plgpu.barrier_wait(refs.v_empty.at[slot])
            plgpu.copy_gmem_to_smem(
                refs.v.at[b, tokens, h], refs.v_s.at[slot], refs.v_full.at[slot]
            )
            return following

        lax.fori_loop(0, plan.chosen, step, _number(plan, refs, (b, h, n), 0))
        if plan.adds:
            plgpu.barrier_wait(refs.plus_empty)
            plgpu.copy_gmem_to_smem(refs.plus.at[b, queries, h], refs.plus_s, refs.plus_full)

    # every barrier is waited for as often as it completes
    for stage in range(tile.stages):
        slot = lax.rem(mine * plan.chosen + stage, tile.stages)
        plgpu.barrier_wait(refs.k_empty.at[slot])
        plgpu.barrier_wait(refs.v_empty.at[slot])
    for buffer in range(tile.query_buffers):
        plgpu.barrier_wait(refs.q_empty.at[lax.rem(mine + buffer, tile.query_buffers)])
    if plan.adds:
        plgpu.barrier_wait(refs.plus_empty)


def _number(plan: _Plan, refs, at, t):
    """The number of the t-th block of keys of a block of queries; of the last one for t past the
    end."""
    t = lax.min(t, plan.chosen - 1) if not isinstance(t, int) else min(t, plan.chosen - 1)
    return refs.blocks[(*at, t)] if plan.listed else jnp.int32(t)


def _multiply(plan: _Plan, mine, place: Callable, refs) -> None:
    """A warpgroup that multiplies: half of each block of queries."""
    tile = plan.tile
    plgpu.set_max_registers(240, action="increase")
    for stage in range(tile.stages):
        plgpu.barrier_arrive(refs.k_empty.at[stage])
        plgpu.barrier_arrive(refs.v_empty.at[stage])
    for buffer in range(tile.query_buffers):
        plgpu.barrier_arrive(refs.q_empty.at[buffer])
    if plan.adds:
        plgpu.barrier_arrive(refs.plus_empty)

    @pl.loop(0, mine)
    def _(i):
        at = place(i)
        plgpu.barrier_wait(refs.q_full.at[lax.rem(i, tile.query_buffers)])
        run = partial(_attend_half, plan, i, at, refs)
        if plan.bounded:
            bound = refs.bound[_half(at)]
            pl.when(bound <= BOUND)(partial(run, bound))
            pl.when(bound > BOUND)(partial(run, None))
        else:
            run(None)

    plgpu.wait_smem_to_gmem(0)


def _half(at):
    """Batch, head and number of this warpgroup's 64 queries of a block."""
    b, h, n = at
    return b, h, 2 * n + lax.axis_index("warpgroup")


def _attend_half(plan: _Plan, i, at, refs, bound) -> None:
    """64 queries of the i-th tile, from shared memory to memory; bound: what the softmax subtracts,
    or None, where it looks for the maximum."""
    own = pl.ds(lax.axis_index("warpgroup") * HALF, HALF)
    buffer = lax.rem(i, plan.tile.query_buffers)
    queries = refs.q_s.at[buffer, own]
    if plan.registers:
        layout = plgpu.Layout.WGMMA_8BIT
        queries = plgpu.load(queries, layout=layout, optimized=False)
        plgpu.barrier_arrive(refs.q_empty.at[buffer])
    loop = _over_blocks_queued if plan.quantized and bound is not None else _over_blocks
    loop = partial(loop, plan, i, at, refs, queries, bound)
    o, total = pl.run_scoped(loop, plgpu.ACC((HALF, WIDTH)))
    o = o * _wide(1.0 / total.sum(axis=1), WIDTH)
    if not plan.registers:
        plgpu.barrier_arrive(refs.q_empty.at[buffer])
    if plan.adds:
        plgpu.barrier_wait(refs.plus_full)
        plus = plgpu.load(refs.plus_s.at[own], layout=plgpu.Layout.WGMMA)
        plgpu.barrier_arrive(refs.plus_empty)
        o = o + plus.astype(jnp.float32)
    _store(at, refs, o)


def _over_blocks(plan: _Plan, i, at, refs, queries, bound, o_sum):
    """The loop over the listed blocks. -> sums of exponentials times values f32 [64 128], and of
    exponentials f32 [64 8]."""
    chosen, running = plan.chosen, bound is None
    slot = lambda t: lax.rem(i * chosen + t, plan.tile.stages)
    begin_values = partial(_begin_values, plan, refs, o_sum)
    factor = partial(_factor, plan, at, refs)

    def softmax(x, scale, state, exists):
        """Weights f32 [64 64] of scores x; the sums and what is subtracted, with these; and the
        factor of earlier sums, or None."""
        total, top = state
        if not running:
            weights = jnp.exp2(x * scale - bound)
            weights = weights if exists is None else jnp.where(exists, weights, 0.0)
            return weights, total + _fold(weights), top, None
        x = x if exists is None else jnp.where(exists, x, -jnp.inf)
        new = jnp.maximum(top, x.max(axis=1) * scale)
        fade = jnp.exp2(top - new)
        weights = jnp.exp2(x * scale - _wide(new, BLOCK_K))
        return weights, total * _wide(fade, 8) + _fold(weights), new, fade

    def await_values(t, o, fade):
        """The products of block t - 1 with its values are there, and fade."""
        if plan.interpret:
            o = o * _wide(fade, WIDTH) if running else o
        elif running:
            o_sum[...] = plgpu.wgmma_accumulator_load(o_sum, wait_n=0) * _wide(fade, WIDTH)
        else:
            plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(refs.v_empty.at[slot(t - 1)])
        return o

    def step(t, carry, *, first=False, last=False):
        """The products of block t - 1 with its values and the scores of block t, together, then the
        softmax of block t."""
        p, total, top, o, scale, following = carry
        ahead = (scale, following)
        if plan.quantized and not last:  # read one step before it is needed
            ahead = (factor(following), _number(plan, refs, at, t + 2))

        def block(scores):
            plgpu.wgmma(scores, queries, refs.k_s.at[slot(t)].transpose((1, 0)))
            summed = o if first else begin_values(p, slot(t - 1), o)
            x = plgpu.wgmma_accumulator_load(scores, wait_n=0 if first else 1)
            plgpu.barrier_arrive(refs.k_empty.at[slot(t)])
            exists = _exists(plan, refs, at) if last else None
            weights, sums, new, fade = softmax(x.astype(jnp.float32), scale, (total, top), exists)
            weights, sums = lax.optimization_barrier((weights, sums))  # before the waits
            if not last:
                plgpu.barrier_wait(refs.k_full.at[slot(t + 1)])
            summed = summed if first else await_values(t, summed, fade)
            weights = lax.optimization_barrier(weights).astype(plan.values)
            return weights, sums, new, summed

        sums = plgpu.ACC((HALF, BLOCK_K), jnp.int32 if plan.quantized else jnp.float32)
        return (*pl.run_scoped(block, sums), *ahead)

    top = bound
    if running:
        least = jnp.full((HALF,), -jnp.inf, jnp.float32)
        top = plgpu.layout_cast(least, plgpu.Layout.WGMMA.reduce(1))
    o = jnp.zeros((HALF, WIDTH), jnp.float32) if plan.interpret else None
    block = _number(plan, refs, at, 0)
    carry = (None, _no_sums(), top, o, factor(block), _number(plan, refs, at, 1))
    plgpu.barrier_wait(refs.k_full.at[slot(0)])
    carry = step(0, carry, first=True, last=chosen == 1)
    if chosen > 1:
        carry = lax.fori_loop(1, chosen - 1, step, carry)
        carry = step(chosen - 1, carry, last=True)
    p, total, _, o, *_ = carry
    o = begin_values(p, slot(chosen - 1), o)
    o = o if plan.interpret else o_sum[...]
    plgpu.barrier_arrive(refs.v_empty.at[slot(chosen - 1)])
    return o, total


def _over_blocks_queued(plan: _Plan, i, at, refs, queries, bound, o_sum):
    """`_over_blocks` of int8 scores with a bound. Nothing is rescaled, so the scores of the next
    block are queued before the softmax of this one, and its products with values behind them.

    Scores are summed from the bits of a float on, and are that float plus the sums: no integer is
    converted. What is subtracted is rounded to half a unit of ROUND times the scale, at most 2^-9
    where the bound is `online_softmax.BOUND`, and the same for all scores of a block.
    """
    chosen = plan.chosen
    slot = lambda t: lax.rem(i * chosen + t, plan.tile.stages)
    factor = partial(_factor, plan, at, refs)

    def begin_scores(t, sums):
        plgpu.barrier_wait(refs.k_full.at[slot(t)])
        if not plan.interpret:  # which does not write to accumulators
            bits = jnp.full((HALF, BLOCK_K), ROUND_BITS, jnp.int32)
            sums[...] = plgpu.layout_cast(bits, plgpu.Layout.WGMMA)
        plgpu.wgmma(sums, queries, refs.k_s.at[slot(t)].transpose((1, 0)))

    def take_scores(t, sums, under_way):
        x = plgpu.wgmma_accumulator_load(sums, wait_n=under_way)
        plgpu.barrier_arrive(refs.k_empty.at[slot(t)])
        return x

    def weigh(t, x, total, o, scale, *, last=False):
        """The softmax of block t, and the begin of its products with values."""
        if plan.interpret:
            x = x.astype(jnp.float32) + ROUND
        else:
            x = lax.bitcast_convert_type(x, jnp.float32)
        weights = jnp.exp2(x * scale - (bound + ROUND * scale))
        exists = _exists(plan, refs, at) if last else None
        weights = weights if exists is None else jnp.where(exists, weights, 0.0)
        total = total + _fold(weights)
        weights, total = lax.optimization_barrier((weights, total))  # before the wait
        weights = lax.optimization_barrier(weights.astype(plan.values))
        return total, _begin_values(plan, refs, o_sum, weights, slot(t), o)

    def step(t, carry, *, first=False):
        x, total, o, scale, following = carry
        # read one step before it is needed
        ahead = factor(following), _number(plan, refs, at, t + 2)

        def block(sums):
            begin_scores(t + 1, sums)
            state = weigh(t, x, total, o, scale)
            coming = take_scores(t + 1, sums, 1)  # the products of block t may be under way
            if not first:
                plgpu.barrier_arrive(refs.v_empty.at[slot(t - 1)])
            return coming, *state

        return *pl.run_scoped(block, plgpu.ACC((HALF, BLOCK_K), jnp.int32)), *ahead

    def scores_of_first(sums):
        begin_scores(0, sums)
        return take_scores(0, sums, 0)

    o = jnp.zeros((HALF, WIDTH), jnp.float32) if plan.interpret else None
    block = _number(plan, refs, at, 0)
    x = pl.run_scoped(scores_of_first, plgpu.ACC((HALF, BLOCK_K), jnp.int32))
    carry = x, _no_sums(), o, factor(block), _number(plan, refs, at, 1)
    if chosen > 1:
        carry = step(0, carry, first=True)
        # Weights in registers must not be written while their products are under way. With one
        # step a turn ptxas does so, and does not say it; with two it keeps two sets of registers,
        # which the compile gate reads in the machine code.
        carry = _repeat(step, 1, chosen - 1, carry, by=2)
    x, total, o, scale, _ = carry
    total, o = weigh(chosen - 1, x, total, o, scale, last=True)
    o = o if plan.interpret else o_sum[...]
    if chosen > 1:
        plgpu.barrier_arrive(refs.v_empty.at[slot(chosen - 2)])
    plgpu.barrier_arrive(refs.v_empty.at[slot(chosen - 1)])
    return o, total


def _factor(plan: _Plan, at, refs, j):
    """What makes scores of the block of keys j logarithms to base 2."""
    if not plan.quantized:
        return LOG2E * WIDTH**-0.5
    return refs.q_scale[_half(at)] * refs.k_scale[(*at[:2], j)]


def _no_sums():  # f32 [64 8]
    return plgpu.layout_cast(jnp.zeros((HALF, 8), jnp.float32), plgpu.Layout.WGMMA)


def _begin_values(plan: _Plan, refs, o_sum, p, slot, o):
    """Begins the products of weights p with the values in a buffer; o is their sum under the
    interpreter, which neither multiplies registers nor writes to accumulators."""
    plgpu.barrier_wait(refs.v_full.at[slot])
    values = refs.v_s.at[slot]
    if not plan.interpret:
        plgpu.wgmma(o_sum, p, values)
        return None
    there = refs.operand_s.at[lax.axis_index("warpgroup"), :, pl.ds(0, BLOCK_K)]
    return o + _product(_through_memory(p, there), values)


def _repeat(step: Callable, start: int, end: int, carry, *, by: int):
    """lax.fori_loop of `by` steps at a time; what is left over comes last."""

    def several(i, carry):
        for ahead in range(by):
            carry = step(start + by * i + ahead, carry)
        return carry

    times, left = divmod(end - start, by)
    carry = lax.fori_loop(0, times, several, carry)
    for t in range(end - left, end):
        carry = step(t, carry)
    return carry


def _store(at, refs, o) -> None:
    """o [64 128] to memory; queries past the end are not written."""
    b, h, n = at
    warpgroup = lax.axis_index("warpgroup")
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    refs.o_s[warpgroup] = o.astype(refs.o.dtype)
    plgpu.commit_smem()
    rows = pl.ds(n * BLOCK_Q + warpgroup * HALF, HALF)
    plgpu.copy_smem_to_gmem(refs.o_s.at[warpgroup], refs.o.at[b, rows, h])


def _product(a, b):
    """a [m k], of registers or shared memory, times b [k n] in shared memory -> f32 [m n]."""

    def run(total):
        plgpu.wgmma(total, a, b)
        return total[...]

    return pl.run_scoped(run, plgpu.ACC((a.shape[0], b.shape[1])))


def _through_memory(x, there):
    """x as an operand in shared memory: under the interpreter, which multiplies no registers."""
    there[...] = x
    plgpu.commit_smem()
    return there


def _exists(plan: _Plan, refs, at):  # -> bool [64 64]
    """Which keys of the last listed block there are; None if all. The list ascends: no other one
    can be cut."""
    if not plan.tail:
        return None
    j = _number(plan, refs, at, plan.chosen - 1)
    here = jnp.where(j == plan.keys // BLOCK_K, plan.tail, BLOCK_K)
    return plgpu.broadcasted_iota(jnp.int32, (HALF, BLOCK_K), 1, layout=plgpu.Layout.WGMMA) < here


def _fold(p):  # [64 64] -> [64 8]
    """Sums of every eighth column: nothing is exchanged between threads."""
    parts = [p[:, 8 * e : 8 * e + 8] for e in range(BLOCK_K // 8)]
    while len(parts) > 1:
        parts = [x + y for x, y in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def _wide(x, size: int, axis: int = 0):
    """x of each row [64], or of each column (axis 1) for `size` rows, as a matrix."""
    shape = (x.shape[0], size) if axis == 0 else (size, x.shape[0])
    return lax.broadcast_in_dim(x, shape, (axis,))
