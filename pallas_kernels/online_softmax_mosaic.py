"""The loop of attention over lists of key blocks on Hopper, through Mosaic GPU.

The function of `online_softmax.attend`, for the sizes that the networks have. A program stays on
its multiprocessor and works through blocks of queries: one warpgroup copies keys and values into
rings of buffers, two multiply, for 64 queries each. The scores of a block are begun together with
the products of the values of the block before, so the softmax of one lies beside the products of
the other (FlashAttention-3, arXiv 2407.08608).

With int8 scores and a small bound nothing is rescaled, so the values' products are not awaited
before those of the next block follow them. Otherwise they are awaited after the softmax, and two
things keep ptxas from putting the products in a row: weights that are operands in registers are
rounded only when no product is under way, and the wait stands behind a branch, the wait for the
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

from pallas_kernels.linear_branch import EPS
from pallas_kernels.mosaic import (
    BLOCK_K,
    BLOCK_Q,
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


# as much of shared memory as there is
INT8 = Tile(stages=4, query_buffers=1)
FLOATS = Tile(stages=3, query_buffers=2)


def attend(
    q,
    k,
    v,
    blocks,
    *,
    scales=None,
    bound=None,
    linear=None,
    keys: int | None = None,
    save: bool = False,
    tile: Tile | None = None,
    interpret: bool = False,
):
    """Softmax attention of each block of 128 queries over its blocks of 64 keys, plus the linear
    branch where its parts are given.

    q [b l h 128] and k [b s h 128] int8, or of v's dtype; v [b s h 128] bfloat16 or float16; blocks
    int32 [b h q_blocks chosen], ascending without repeats, or None for all of them.
    scales: of int8 queries and keys, float32 [b h 2*q_blocks], of every 64 queries, and [b h n], n
        at least the number of blocks of keys.
    bound: float32 [b h 2*q_blocks], at least the magnitude of the scores of 64 queries over
        1/sqrt(128), as logarithms to base 2; where it is at most `online_softmax.BOUND` no maximum
        is looked for. None: it is looked for everywhere.
    linear: None, or queries [b l h 128] and m [b h 128 128] in v.dtype, z [b h 128] and bias [128]
        in float32, which add phi(q) m / (phi(q) . z + eps) + bias to o before it is rounded.
    keys: how many of s count, by default all.
    -> o [b l h 128]; if save: also o_s, the softmax part alone, and the natural logarithm of its
    normaliser, float32 [b h q_blocks 128].

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
        linear=linear is not None,
        save=save,
        programs=programs(interpret),
        interpret=interpret,
    )
    q, k, v = (filled(x, 1) for x in (q, k, v))
    ins = {"q": q, "k": k, "v": v, "blocks": blocks, "bound": bound}
    if scales is not None:
        ins |= {"q_scale": scales[0] * (LOG2E * WIDTH**-0.5), "k_scale": scales[1]}
    if linear is not None:
        linear = filled(linear[0], 1), *linear[1:]
        ins |= dict(zip(("linear_q", "m", "z", "bias"), linear, strict=True))
    outs = {"o": jax.ShapeDtypeStruct(q.shape, v.dtype)}
    if save:
        outs["lse"] = jax.ShapeDtypeStruct((b, h, n, BLOCK_Q), jnp.float32)
    if save and linear is not None:
        outs["o_s"] = outs["o"]
    out = _launch(plan, {name: x for name, x in ins.items() if x is not None}, outs)
    o = out["o"][:, :l]
    return (o, out["o_s"][:, :l] if "o_s" in out else o, out["lse"]) if save else o


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
    linear: bool
    save: bool
    programs: int
    interpret: bool

    @property
    def total(self) -> int:
        return math.prod(self.shape)

    @property
    def quantized(self) -> bool:
        return self.scores == jnp.int8

    @property
    def shares_queries(self) -> bool:
        """Whether the linear branch reads the queries of the scores."""
        return self.linear and not self.quantized

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


def _launch(plan: _Plan, ins: dict, outs: dict) -> dict:
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
    if plan.linear:
        scratch |= {
            "m_s": shared(WIDTH, WIDTH, dtype=plan.values),
            "vectors_s": plgpu.SMEM((2, WIDTH), jnp.float32),
            "linear_full": ring(3 if plan.shares_queries else 4, 1),
            "linear_empty": ring(2, 1),
        }
    if plan.linear and not plan.shares_queries:
        scratch["linear_q_s"] = shared(BLOCK_Q, WIDTH, dtype=plan.values)
    if plan.save:
        scratch["lse_s"] = plgpu.SMEM((2, HALF), jnp.float32)
    if plan.interpret:
        scratch["operand_s"] = shared(2, HALF, WIDTH, dtype=plan.values)
    names = (*ins, *(f"{name}_out" for name in outs))

    def attend_blocks(*refs, **buffers):
        _kernel(plan, SimpleNamespace(**dict(zip(names, refs, strict=True)), **buffers))

    out = plgpu.kernel(
        attend_blocks,
        out_type=tuple(outs.values()),
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
    return dict(zip(outs, out, strict=True))


def _kernel(plan: _Plan, refs) -> None:
    """One program: the two warpgroups that multiply, and the one that copies. Names of shared
    memory end in _s, of barriers in _full (copied) and _empty (read by all)."""
    warpgroup, first = lax.axis_index("warpgroup"), lax.axis_index("grid")
    mine = lax.div(plan.total - first + plan.programs - 1, plan.programs)
    place = lambda i: plan.place(first + i * plan.programs)
    pl.when(warpgroup < 2)(partial(_multiply, plan, mine, place, refs))
    pl.when(warpgroup == 2)(partial(_copy, plan, mine, place, refs))


def _copy(plan: _Plan, mine, place: Callable, refs) -> None:
    """The warpgroup that copies: queries, keys and values as buffers come free, and last what the
    linear branch takes. Tokens past the end are zeros."""
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
        if plan.linear:
            full = refs.linear_full
            plgpu.barrier_wait(refs.linear_empty)
            if not plan.shares_queries:
                plgpu.copy_gmem_to_smem(refs.linear_q.at[b, queries, h], refs.linear_q_s, full)
            plgpu.copy_gmem_to_smem(refs.m.at[b, h], refs.m_s, full)
            plgpu.copy_gmem_to_smem(refs.z.at[b, h], refs.vectors_s.at[0], full)
            plgpu.copy_gmem_to_smem(refs.bias, refs.vectors_s.at[1], full)

    # every barrier is waited for as often as it completes
    for stage in range(tile.stages):
        slot = lax.rem(mine * plan.chosen + stage, tile.stages)
        plgpu.barrier_wait(refs.k_empty.at[slot])
        plgpu.barrier_wait(refs.v_empty.at[slot])
    for buffer in range(tile.query_buffers):
        plgpu.barrier_wait(refs.q_empty.at[lax.rem(mine + buffer, tile.query_buffers)])
    if plan.linear:
        plgpu.barrier_wait(refs.linear_empty)


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
    if plan.linear:
        plgpu.barrier_arrive(refs.linear_empty)

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
    loop = partial(_over_blocks, plan, i, at, refs, queries, bound)
    o, total, top = pl.run_scoped(loop, plgpu.ACC((HALF, WIDTH)))
    total = total.sum(axis=1)
    o = o * _wide(1.0 / total, WIDTH)
    if plan.save:
        _store_normaliser(at, refs, (top + jnp.log2(total)) * math.log(2))
    if plan.save and plan.linear:
        _store(at, refs, o, refs.o_s_out)
    if plan.linear:
        o = o + _linear_branch(plan, refs, refs.q_s.at[buffer] if plan.shares_queries else None)
    if not plan.registers:
        plgpu.barrier_arrive(refs.q_empty.at[buffer])
    _store(at, refs, o, refs.o_out)


def _over_blocks(plan: _Plan, i, at, refs, queries, bound, o_sum):
    """The loop over the listed blocks. -> sums of exponentials times values f32 [64 128], of
    exponentials f32 [64 8], and what was subtracted: the bound, or f32 [64]."""
    chosen, running = plan.chosen, bound is None
    slot = lambda t: lax.rem(i * chosen + t, plan.tile.stages)
    deferred = plan.quantized and not running
    begin_values = partial(_begin_values, plan, refs, o_sum)

    def factor(j):
        """What makes scores of the block of keys j logarithms to base 2."""
        if not plan.quantized:
            return LOG2E * WIDTH**-0.5
        return refs.q_scale[_half(at)] * refs.k_scale[(*at[:2], j)]

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
            if deferred and not first:
                pl.when(t > 1)(lambda: plgpu.barrier_arrive(refs.v_empty.at[slot(t - 2)]))
            # the list ascends: only its last block can be the cut one
            exists = None
            if last and plan.tail:
                exists = _exists(plan, _number(plan, refs, at, chosen - 1))
            weights, sums, new, fade = softmax(x.astype(jnp.float32), scale, (total, top), exists)
            weights, sums = lax.optimization_barrier((weights, sums))  # before the waits
            if deferred:
                weights = lax.optimization_barrier(weights.astype(plan.values))
            if not last:
                plgpu.barrier_wait(refs.k_full.at[slot(t + 1)])
            if not deferred:
                summed = summed if first else await_values(t, summed, fade)
                weights = lax.optimization_barrier(weights).astype(plan.values)
            return weights, sums, new, summed

        sums = plgpu.ACC((HALF, BLOCK_K), jnp.int32 if plan.quantized else jnp.float32)
        return (*pl.run_scoped(block, sums), *ahead)

    total = plgpu.layout_cast(jnp.zeros((HALF, 8), jnp.float32), plgpu.Layout.WGMMA)
    top = bound
    if running:
        least = jnp.full((HALF,), -jnp.inf, jnp.float32)
        top = plgpu.layout_cast(least, plgpu.Layout.WGMMA.reduce(1))
    o = jnp.zeros((HALF, WIDTH), jnp.float32) if plan.interpret else None
    block = _number(plan, refs, at, 0)
    carry = (None, total, top, o, factor(block), _number(plan, refs, at, 1))
    plgpu.barrier_wait(refs.k_full.at[slot(0)])
    carry = step(0, carry, first=True, last=chosen == 1)
    if chosen > 1:
        carry = _repeat(step, 1, chosen - 1, carry, by=2 if deferred else 1)
        carry = step(chosen - 1, carry, last=True)
    p, total, top, o, *_ = carry
    o = begin_values(p, slot(chosen - 1), o)
    o = o if plan.interpret else o_sum[...]
    if deferred and chosen > 1:
        plgpu.barrier_arrive(refs.v_empty.at[slot(chosen - 2)])
    plgpu.barrier_arrive(refs.v_empty.at[slot(chosen - 1)])
    return o, total, top


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


def _linear_branch(plan: _Plan, refs, queries):
    """phi(q) m / (phi(q) . z + eps) + bias for a warpgroup's queries -> f32 [64 128]. phi(q) = e /
    sum(e) is not divided out: e m / (e . (z + eps)) + bias."""
    warpgroup = lax.axis_index("warpgroup")
    columns = plgpu.Layout.WGMMA.reduce(0)
    plgpu.barrier_wait(refs.linear_full)
    queries = refs.linear_q_s if queries is None else queries
    x = plgpu.load(queries.at[pl.ds(warpgroup * HALF, HALF)], layout=plgpu.Layout.WGMMA)
    x = x.astype(jnp.float32)
    e = jnp.exp2((x - _wide(x.max(axis=1), WIDTH)) * LOG2E).astype(plan.values)
    z = plgpu.load(refs.vectors_s.at[0], layout=columns) + EPS
    bias = plgpu.load(refs.vectors_s.at[1], layout=columns)
    n = (e.astype(jnp.float32) * _wide(z, HALF, 1)).sum(axis=1)
    if plan.interpret:
        e = _through_memory(e, refs.operand_s.at[warpgroup])
    y = _product(e, refs.m_s)
    plgpu.barrier_arrive(refs.linear_empty)
    return y * _wide(1.0 / n, WIDTH) + _wide(bias, HALF, 1)


def _store(at, refs, o, out) -> None:
    """o [64 128] to memory; queries past the end are not written."""
    b, h, n = at
    warpgroup = lax.axis_index("warpgroup")
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    refs.o_s[warpgroup] = o.astype(out.dtype)
    plgpu.commit_smem()
    rows = pl.ds(n * BLOCK_Q + warpgroup * HALF, HALF)
    plgpu.copy_smem_to_gmem(refs.o_s.at[warpgroup], out.at[b, rows, h])


def _store_normaliser(at, refs, lse) -> None:
    """lse f32 [64] to memory."""
    warpgroup = lax.axis_index("warpgroup")
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    refs.lse_s[warpgroup] = lse
    plgpu.commit_smem()
    rows = pl.ds(warpgroup * HALF, HALF)
    plgpu.copy_smem_to_gmem(refs.lse_s.at[warpgroup], refs.lse_out.at[(*at, rows)])


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


def _exists(plan: _Plan, j):  # -> bool [64 64]
    """Which keys of the block j there are."""
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
