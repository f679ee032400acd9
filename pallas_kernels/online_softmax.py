"""The loop of attention over lists of key blocks as one kernel, dense attention included; the
linear branch goes with it.

One pass serves every kind of score: a `scorer` takes the refs of queries and keys, and returns a
function from the number of a key block to its raw scores and the positive factor that makes them
logarithms to base 2, and a bound on the magnitude of all these logarithms, or None. The float
scorer is in sparse_attention, the int8 one in sage_attention.

Where the bound is small, it is what the softmax subtracts: no maximum is looked for and no sum is
rescaled, which is a third of the loop's instructions. Nothing is lost: a row's largest exponential
is at least 2^(-2 bound), and those that count beside it are far above the smallest float32.
Elsewhere running maximum and sums are those of FlashAttention-2 (arXiv 2307.08691).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import mosaic
from pallas_kernels.dispatch import automatic, bound, choose
from pallas_kernels.linear_branch import rows_of_branch
from pallas_kernels.primitives import blocks as count
from pallas_kernels.primitives import dot, exp2, fma_exp2, launch, load, store

__all__ = ["BOUND", "Plan", "attend", "key_block", "kernel_name", "refusal", "run"]

BOUND = 48.0  # the largest bound that is subtracted: 2^(-2 BOUND - 24) is a normal float32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What is fixed when a kernel is compiled. rows: queries; length: keys; chosen: key blocks for
    each query block."""

    block_q: int
    block_k: int
    rows: int
    length: int
    chosen: int
    scorer: Callable
    interpret: bool

    @property
    def ragged(self) -> bool:
        """Whether the last key block is not full."""
        return self.length % self.block_k > 0


def kernel_name(block_q):
    """The row of tiles.json: half the queries need half the warps."""
    return "forward_q128" if block_q > 64 else "forward_q64"


def attend(
    scorer,
    queries,
    keys,
    v,
    blocks,
    block_q,
    block_k,
    *,
    linear=None,
    length=None,
    save=False,
    interpret,
    at,
):
    """Softmax attention of each block of queries over its key blocks, plus the linear branch where
    its parts are given.

    queries [b l h k] and keys [b s h k], and other arrays [b h n] beside them: what `scorer` reads;
    v [b s h k]; blocks int32 [b h q_blocks chosen], or None for all of them. linear: None, or q [b
    l h k], m [b h k k] in v.dtype, z [b h k] and bias [k] in float32, which add phi(q) m / (phi(q)
    . z + eps) + bias to o before it is rounded. length: how many keys count, by default all s. -> o
    [b l h k]; if save: also o_s, the softmax part
    alone (o itself without `linear`), and the natural logarithm of its normaliser, float32 [b h
    q_blocks block_q]. at: the warps and stages. Raises ValueError for sizes or a dtype that the
    kernel does not take.
    """
    (b, l, h, d), n = queries[0].shape, count(queries[0].shape[1], block_q)
    reason = refusal(d, block_q, block_k, v.dtype, interpret)
    if reason:
        raise ValueError(f"attention kernel: {reason}")
    length = v.shape[1] if length is None else length
    short = max(block_k - length, 0)  # less than one block of keys: zeros go before them
    if short:
        v, keys = v[:, :length], tuple(x[:, :length] if x.ndim == 4 else x for x in keys)
        before = ((0, 0), (short, 0), (0, 0), (0, 0))
        lengthen = lambda x: jnp.pad(x, before) if x.ndim == 4 else x
    else:
        lengthen = lambda x: x
    chosen = count(length, block_k) if blocks is None else blocks.shape[-1]
    plan = Plan(
        block_q=block_q,
        block_k=block_k,
        rows=l,
        length=length,
        chosen=chosen,
        scorer=scorer,
        interpret=interpret,
    )
    v, keys = lengthen(v), tuple(lengthen(x) for x in keys)
    tile_of = pl.BlockSpec((None, block_q, None, d), lambda i, g: (g // h, i, g % h, 0))
    tokens = lambda x: pl.BlockSpec((None, x.shape[1], None, d), lambda i, g: (g // h, 0, g % h, 0))
    row = lambda size: pl.BlockSpec((None, None, None, size), lambda i, g: (g // h, g % h, i, 0))
    whole = lambda x: pl.BlockSpec(
        (None, None, *x.shape[2:]), lambda i, g: (g // h, g % h, *(0 for _ in x.shape[2:]))
    )
    ins = {"queries": queries, "keys": keys, "v": v, "blocks": blocks, "linear": linear}
    in_specs = {
        "queries": tuple(tile_of if x.ndim == 4 else whole(x) for x in queries),
        "keys": tuple(tokens(x) if x.ndim == 4 else whole(x) for x in keys),
        "v": tokens(v),
        "blocks": None if blocks is None else row(chosen),
        "linear": None,
    }
    if linear is not None:
        bias = pl.BlockSpec((d,), lambda i, g: (0,))
        in_specs["linear"] = tile_of, whole(linear[1]), whole(linear[2]), bias
    o = jax.ShapeDtypeStruct((b, l, h, d), v.dtype)
    outs, out_specs = {"o": o}, {"o": tile_of}
    if save:
        outs["lse"] = jax.ShapeDtypeStruct((b, h, n, block_q), jnp.float32)
        out_specs["lse"] = row(block_q)
    if save and linear is not None:
        outs["o_s"], out_specs["o_s"] = o, tile_of
    out = launch(
        partial(attend_kernel, plan),
        outs,
        (n, b * h),
        (in_specs,),
        out_specs,
        warps=at.warps,
        stages=at.stages,
        interpret=interpret,
    )(ins)
    return (out["o"], out.get("o_s", out["o"]), out["lse"]) if save else out["o"]


def attend_kernel(plan, ins, outs):
    """One block of queries of one head: refs q [block_q k], v [s k], blocks [chosen], linear m [k
    k], z [k], bias [k]."""
    interpret, dtype = plan.interpret, outs["o"].dtype
    rows = inside(plan)
    if ins["linear"] is not None:
        # first, and out to memory: beside the loop's accumulators it does not fit into registers
        q, m, z, bias = ins["linear"]
        branch = rows_of_branch(load(q, rows), load(m), load(z), load(bias), interpret)
        store(outs["o"], branch.astype(dtype), rows)
    scores, bound = plan.scorer(plan, rows, ins["queries"], ins["keys"])
    number = lambda t: t if ins["blocks"] is None else ins["blocks"][t]
    values = lambda j: key_block(plan, ins["v"], j)

    # Nothing that an address depends on may be in the state of a loop: such loads are not
    # overlapped with work.
    def quick(t, state):  # a block of which every key exists
        total, o = state
        j = number(t)
        s, factor = scores(j)
        p = fma_exp2(s.astype(jnp.float32), factor, -bound, interpret)
        return total + p.sum(1), o + dot(p.astype(dtype), values(j), (1, 0))

    def step(t, state):
        top, total, o = state
        j = number(t)
        s, factor = scores(j)
        s = hide(plan, j, s, -jnp.inf if s.dtype == jnp.float32 else jnp.iinfo(s.dtype).min)
        new = jnp.maximum(top, s.max(1).astype(jnp.float32) * factor)
        p = fma_exp2(s.astype(jnp.float32), factor, -new[:, None], interpret)
        if s.dtype != jnp.float32:  # the least integer is not minus infinity
            p = hide(plan, j, p, 0.0)
        fade = exp2(top - new, interpret)
        o = o * fade[:, None] + dot(p.astype(dtype), values(j), (1, 0))
        return new, total * fade + p.sum(1), o

    first, top = 0, jnp.full(plan.block_q, -jnp.inf)
    total, o = jnp.zeros(plan.block_q), jnp.zeros(outs["o"].shape)
    if bound is not None:
        small = bound <= BOUND
        # the list ascends: only its last block can be the ragged one
        full = plan.chosen - plan.ragged
        first = small.astype(jnp.int32) * jnp.int32(full)
        total, o = jax.lax.fori_loop(0, first, quick, (total, o))
        top = jnp.where(small, bound, top)
    top, total, o = jax.lax.fori_loop(first, plan.chosen, step, (top, total, o))
    if "lse" in outs:
        store(outs["lse"], (top + jnp.log2(total)) * math.log(2))
    o = o * (1 / total)[:, None]
    if "o_s" in outs:
        store(outs["o_s"], o.astype(dtype), rows)
    if ins["linear"] is not None:
        o = o + load(outs["o"], rows).astype(jnp.float32)
    store(outs["o"], o.astype(dtype), rows)


def hide(plan, j, x, value):  # [block_q block_k]
    """x with `value` for the keys that the tail block's tile begins early with. Only that block
    takes the branch."""
    if not plan.ragged:
        return x
    early = -plan.length % plan.block_k
    cut = lambda x: jnp.where(jnp.arange(plan.block_k) >= early, x, jnp.array(value, x.dtype))
    return jax.lax.cond(j == plan.length // plan.block_k, cut, lambda x: x, x)


def inside(plan):  # [block_q 1]
    """The queries before the end; None where all are."""
    rows = pl.program_id(0) * plan.block_q + jnp.arange(plan.block_q)
    return (rows < plan.rows)[:, None] if plan.rows % plan.block_q else None


def key_block(plan, ref, j):  # ref [s k] -> [block_k k]
    """Block j of the tokens; the tail block's tile begins early, so that it lies inside the
    sequence: no load needs a mask."""
    size = plan.block_k
    return load(ref.at[pl.ds(jnp.minimum(j * size, max(plan.length - size, 0)), size)])


def refusal(width, block_q, block_k, dtype, interpret=False) -> str | None:
    """Why the kernel does not take these sizes or this dtype; None if it does."""
    for name, size in {"head width": width, "block_q": block_q, "block_k": block_k}.items():
        if size < 16 or size & (size - 1):
            low = max(16, 1 << size.bit_length() - 1)
            nearest = f"{low} and {2 * low}"
            return f"{name} is {size}; allowed: powers of two from 16 on; nearest: {nearest}"
    if dtype == jnp.float32 and not interpret:
        return "float32 is for impl='interpret' and 'reference'; allowed: bfloat16, float16"
    return None


def run(tables, name, impl, q, *args, block_q, block_k, **sizes):
    """Returns what the implementation `impl` of the op `name` gives for its arguments; "auto" is
    chosen by the dtype and sizes of q and the blocks. tables: the package's IMPLEMENTATIONS."""
    table = bound(tables[name], block_q=block_q, block_k=block_k, **sizes)
    asked = q.shape[-1], block_q, block_k, q.dtype
    kernel = mosaic.chosen(table, mosaic.attention_refusal(*asked), "triton")
    auto = automatic(table, refusal(*asked), kernel=kernel)
    return choose(name, impl, table, auto)(q, *args)
