"""What comes before the loop of attention, in one pass over tokens on Hopper, through Mosaic GPU:
int8 values of queries or keys, the sums over all keys of the linear branch, and that branch.

A program takes a chunk of the tokens of one head, 128 at a time: one warpgroup copies them into a
ring of buffers, two work on a block of 64 each. The sums are products: phi(k) goes through shared
memory, and each warpgroup multiplies half of its columns with all the values. phi(q) stays in
registers: every warpgroup multiplies its own, with what the program fetches once. Every token is
read once, which is what such a pass costs.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.linear_branch import EPS
from pallas_kernels.mosaic import ROUND, WIDTH, filled, programs, swizzled
from pallas_kernels.primitives import LOG2E

__all__ = ["Rounded", "query_pass", "token_pass"]

BLOCK = 64  # tokens of a warpgroup, and of one scale
TILE = 2 * BLOCK
STRIPE = 32  # columns of the sums in one store
FLOOR = 1e-7  # least amax of a block
MOST_CHUNKS = 64  # of one head
FILL = 3  # tiles' time that a program takes to begin and to end


@dataclasses.dataclass(frozen=True)
class Rounded:
    """int8 values [b l h 128] of tokens in blocks of 64; f32 [b h n] their scales, and a bound on
    the length (Euclidean norm) of each block's longest token as rounded. n is even: there may be
    one block more than there are tokens for, with a length near zero."""

    values: object
    scale: object
    length: object


def query_pass(q, m, z, bias, *, rounds: bool, interpret: bool = False):
    """One pass over queries [b l h 128], bfloat16 or float16 -> `Rounded` of them if `rounds`, else
    None; and phi(q) m / (phi(q) . z + eps) + bias, [b l h 128] of q.dtype, phi the softmax over the
    head width.

    m [b h 128 128] of q.dtype, z [b h 128] and bias [128] in float32: `linear_branch.operand`.
    """
    x = filled(q, 1)
    plan = _planned(q, q.shape[1], rounds=rounds, branch=True, interpret=interpret)
    branch = {"branch": jax.ShapeDtypeStruct(x.shape, q.dtype)}
    out = _launch(plan, q, {"x": x, "m": m, "z": z, "bias": bias}, branch)
    return _rounded(plan, q, out), out["branch"][:, : q.shape[1]]


def token_pass(
    x, v=None, *, mean=None, rounds: bool, tokens: int | None = None, interpret: bool = False
):
    """One pass over x and v [b l h 128], bfloat16 or float16.

    tokens: how many of l count, by default all; x is zero in the others.
    rounds: whether x is rounded to int8; mean: f32 [b h 128], taken off x first, or None.
    v: the values, where x are keys whose sums are wanted.
    -> `Rounded` of x or None; phi(x)^T v f32 [b h 128 128] and the sum of phi(x) f32 [b h 128], phi
    the softmax over the head width rounded to x.dtype, or None.
    """
    (b, l, h, _), options = x.shape, {"rounds": rounds, "interpret": interpret}
    tokens = l if tokens is None else tokens
    plan = _planned(x, tokens, smooth=mean is not None, sums=v is not None, **options)
    ins = {"x": filled(x, 1), "mean": mean, "v": None if v is None else filled(v, 1)}
    sums = {}
    if v is not None:
        shapes = {"product": (WIDTH, WIDTH), "total": (WIDTH,)}
        sums = {
            name: jax.ShapeDtypeStruct((b, h, plan.chunks, *shape), jnp.float32)
            for name, shape in shapes.items()
        }
    out = _launch(plan, x, {name: a for name, a in ins.items() if a is not None}, sums)
    rounded = _rounded(plan, x, out)
    if v is None:
        return rounded, None
    # tokens past the end are zeros, whose phi is 1/128
    past = (plan.tiles * TILE - tokens) / WIDTH
    product = out["product"].sum(2)
    beyond = ins["v"][:, tokens : plan.tiles * TILE]  # what values there are
    if beyond.shape[1]:
        product = product - beyond.sum(1, dtype=jnp.float32)[:, :, None] / WIDTH
    return rounded, (product, out["total"].sum(2) - past)


def _rounded(plan: _Plan, x, out: dict) -> Rounded | None:
    if not plan.rounds:
        return None
    return Rounded(out["values"][:, : x.shape[1]], out["scale"], out["length"])


def _chunks(heads: int, tiles: int, programs: int) -> int:
    """Chunks of a head: the number that takes the fewest tiles' time."""

    def time(chunks):
        return pl.cdiv(heads * chunks, programs) * (pl.cdiv(tiles, chunks) + FILL)

    numbers = range(1, min(MOST_CHUNKS, tiles) + 1)
    every = [c for c in numbers if (c - 1) * pl.cdiv(tiles, c) < tiles]  # each has a tile
    return min(every, key=time)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
    """What is fixed when a kernel is compiled. tokens, tiles: of a sequence; chunks: of a head."""

    tokens: int
    tiles: int
    chunks: int
    dtype: jnp.dtype
    rounds: bool
    interpret: bool
    smooth: bool = False
    sums: bool = False
    branch: bool = False

    @property
    def steps(self) -> int:
        """Tiles of a chunk; the last chunk may have fewer."""
        return pl.cdiv(self.tiles, self.chunks)

    @property
    def stages(self) -> int:
        return 2 if self.sums else 4

    @property
    def copies(self) -> int:
        """Copies that fill a stage of the ring."""
        return 1 + self.sums


def _planned(x, tokens: int, *, interpret: bool, **options) -> _Plan:
    """The plan of a pass over the first `tokens` of x [b l h 128]."""
    tiles = pl.cdiv(tokens, TILE)
    chunks = _chunks(x.shape[0] * x.shape[2], tiles, programs(interpret))
    options |= {"dtype": x.dtype, "interpret": interpret}
    return _Plan(tokens=tokens, tiles=tiles, chunks=chunks, **options)


def _launch(plan: _Plan, x, ins: dict, outs: dict) -> dict:
    """The kernel on arrays by name, for x [b l h 128]; outs: what it makes beside `Rounded`."""
    batch, _, heads, _ = x.shape
    if plan.rounds:
        row = jax.ShapeDtypeStruct((batch, heads, 2 * plan.tiles), jnp.float32)
        values = jax.ShapeDtypeStruct(ins["x"].shape, jnp.int8)
        outs = {"values": values, "scale": row, "length": row, **outs}
    shared = lambda *shape, dtype: plgpu.SMEM(shape, dtype, transforms=swizzled(shape[-1], dtype))
    scratch = {
        "x_s": shared(plan.stages, TILE, WIDTH, dtype=plan.dtype),
        "full": plgpu.Barrier(num_arrivals=plan.copies, num_barriers=plan.stages),
        "empty": plgpu.Barrier(num_arrivals=2, num_barriers=plan.stages),
    }
    if plan.rounds:
        scratch["values_s"] = shared(2, BLOCK, WIDTH, dtype=jnp.int8)
        scratch["rows_s"] = plgpu.SMEM((2, 2, BLOCK), jnp.float32)
    if plan.smooth:
        scratch["mean_s"] = plgpu.SMEM((WIDTH,), jnp.float32)
        scratch["mean_full"] = plgpu.Barrier()
    if plan.branch:
        scratch |= {
            "m_s": shared(WIDTH, WIDTH, dtype=plan.dtype),
            "vectors_s": plgpu.SMEM((2, WIDTH), jnp.float32),
            "m_full": plgpu.Barrier(num_arrivals=3),
            "branch_s": shared(2, BLOCK, WIDTH, dtype=plan.dtype),
        }
    if plan.branch and plan.interpret:
        scratch["operand_s"] = shared(2, BLOCK, WIDTH, dtype=plan.dtype)
    if plan.sums:
        scratch |= {
            "v_s": shared(plan.stages, TILE, WIDTH, dtype=plan.dtype),
            "phi_s": shared(2, TILE, BLOCK, dtype=plan.dtype),  # half of the columns each
            "ones_s": shared(TILE, BLOCK, dtype=plan.dtype),
            "product_s": shared(2, BLOCK, STRIPE, dtype=jnp.float32),
            "total_s": plgpu.SMEM((2, BLOCK), jnp.float32),
            "phi_full": plgpu.Barrier(num_arrivals=2),
            "phi_empty": plgpu.Barrier(num_arrivals=2),
        }
    names = (*ins, *(f"{name}_out" for name in outs))

    def pass_over_tokens(*refs, **buffers):
        _kernel(plan, SimpleNamespace(**dict(zip(names, refs, strict=True)), **buffers))

    out = plgpu.kernel(
        pass_over_tokens,
        out_type=tuple(outs.values()),
        scratch_types=scratch,
        grid=(plan.chunks, heads, batch),
        grid_names=("chunk", "head", "batch"),
        num_threads=3,
        thread_name="warpgroup",
        # see online_softmax_mosaic
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
        ),
        interpret=plgpu.InterpretGPUParams() if plan.interpret else None,
    )(*ins.values())
    return dict(zip(outs, out, strict=True))


def _kernel(plan: _Plan, refs) -> None:
    """One program: the two warpgroups that work, and the one that copies. Names of shared memory
    end in _s, of barriers in full (copied) and empty (read by all)."""
    at = tuple(lax.axis_index(name) for name in ("batch", "head", "chunk"))
    first = at[2] * plan.steps
    mine = lax.min(plan.tiles - first, jnp.int32(plan.steps))
    warpgroup = lax.axis_index("warpgroup")
    work = _sum if plan.sums else _each
    pl.when(warpgroup < 2)(partial(work, plan, at, first, mine, refs))
    pl.when(warpgroup == 2)(partial(_copy, plan, at, first, mine, refs))


def _copy(plan: _Plan, at, first, mine, refs) -> None:
    """The warpgroup that copies. Tokens past the end are zeros."""
    b, h, _ = at
    plgpu.set_max_registers(24, action="decrease")
    if plan.smooth:
        plgpu.copy_gmem_to_smem(refs.mean.at[b, h], refs.mean_s, refs.mean_full)
    if plan.branch:
        plgpu.copy_gmem_to_smem(refs.m.at[b, h], refs.m_s, refs.m_full)
        plgpu.copy_gmem_to_smem(refs.z.at[b, h], refs.vectors_s.at[0], refs.m_full)
        plgpu.copy_gmem_to_smem(refs.bias, refs.vectors_s.at[1], refs.m_full)

    @pl.loop(0, mine)
    def _(i):
        slot, tokens = lax.rem(i, plan.stages), pl.ds((first + i) * TILE, TILE)
        plgpu.barrier_wait(refs.empty.at[slot])
        full = refs.full.at[slot]
        plgpu.copy_gmem_to_smem(refs.x.at[b, tokens, h], refs.x_s.at[slot], full)
        if plan.sums:
            plgpu.copy_gmem_to_smem(refs.v.at[b, tokens, h], refs.v_s.at[slot], full)

    for stage in range(plan.stages):  # every barrier is waited for as often as it completes
        plgpu.barrier_wait(refs.empty.at[lax.rem(mine + stage, plan.stages)])


def _begin(plan: _Plan, refs) -> None:
    """What a warpgroup that works does first."""
    plgpu.set_max_registers(240, action="increase")
    for stage in range(plan.stages):
        plgpu.barrier_arrive(refs.empty.at[stage])
    if plan.smooth:
        plgpu.barrier_wait(refs.mean_full)
    if plan.branch:
        plgpu.barrier_wait(refs.m_full)


def _take(refs, slot):
    """A warpgroup's tokens of a tile, f32 [64 128]."""
    own = pl.ds(lax.axis_index("warpgroup") * BLOCK, BLOCK)
    return plgpu.load(refs.x_s.at[slot, own], layout=plgpu.Layout.WGMMA).astype(jnp.float32)


def _each(plan: _Plan, at, first, mine, refs) -> None:
    """A warpgroup that rounds, or makes the linear branch: its half of each tile of the chunk."""
    _begin(plan, refs)

    @pl.loop(0, mine)
    def _(i):
        slot = lax.rem(i, plan.stages)
        plgpu.barrier_wait(refs.full.at[slot])
        if plan.rounds:
            _round(plan, at, first + i, refs, _take(refs, slot))
        if plan.branch:  # taken again: see `_sum`
            e = _exponentials(_take(refs, slot)).astype(plan.dtype)
        plgpu.barrier_arrive(refs.empty.at[slot])
        if plan.branch:
            _branch(plan, at, first + i, refs, e)

    plgpu.wait_smem_to_gmem(0)


def _round(plan: _Plan, at, tile, refs, x) -> None:
    """x f32 [64 128], a warpgroup's half of a tile, to int8, its scale and its longest token's
    length."""
    (b, h, _), warpgroup = at, lax.axis_index("warpgroup")
    block = 2 * tile + warpgroup
    if plan.smooth:
        x = x - _wide(plgpu.load(refs.mean_s, layout=plgpu.Layout.WGMMA.reduce(0)), BLOCK, 1)
    rows = {0: jnp.abs(x).max(axis=1), 1: (x * x).sum(axis=1)}
    inside = None
    if plan.tokens % TILE:  # tokens past the end count as zeros
        row = plgpu.broadcasted_iota(jnp.int32, (BLOCK,), 0, layout=plgpu.Layout.WGMMA.reduce(1))
        inside = row < plan.tokens - block * BLOCK
    for number, values in rows.items():
        values = values if inside is None else jnp.where(inside, values, 0.0)
        refs.rows_s[warpgroup, number] = values
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    plgpu.commit_smem()
    amax, square = (_largest(refs.rows_s.at[warpgroup, number]) for number in rows)
    amax = jnp.maximum(amax, FLOOR)
    scale = amax * (1 / 127)
    rounded = x * (127 / amax) + ROUND
    values = lax.bitcast_convert_type(rounded, jnp.int32).astype(jnp.int8)
    refs.values_s[warpgroup] = values
    plgpu.commit_smem()
    to = refs.values_out.at[b, pl.ds(block * BLOCK, BLOCK), h]
    plgpu.copy_smem_to_gmem(refs.values_s.at[warpgroup], to)
    refs.scale_out[b, h, block] = scale
    # rounding moves each element half a step
    refs.length_out[b, h, block] = jnp.sqrt(square) + scale * (0.5 * math.sqrt(WIDTH))


def _largest(ref):  # f32 [64] in shared memory -> []
    """Read as columns, of which every warp has all: nothing is exchanged between warps."""
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(0)).max()


def _sum(plan: _Plan, at, first, mine, refs) -> None:
    """A warpgroup that sums: phi of its half of each tile, and then half of phi's columns times all
    values."""
    _begin(plan, refs)
    (b, h, chunk), warpgroup = at, lax.axis_index("warpgroup")
    own = pl.ds(warpgroup * BLOCK, BLOCK)
    plgpu.barrier_arrive(refs.phi_empty)
    ones = jnp.ones((BLOCK, BLOCK), plan.dtype)
    refs.ones_s[own] = plgpu.layout_cast(ones, plgpu.Layout.WGMMA)

    def sums(product, total):
        def step(i, *, follows=True):
            slot = lax.rem(i, plan.stages)
            plgpu.barrier_wait(refs.full.at[slot])
            if plan.rounds:
                _round(plan, at, first + i, refs, _take(refs, slot))
            # taken again: registers do not hold the tokens beside what is made of them
            phi = _feature(_take(refs, slot)).astype(plan.dtype)
            if follows:
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(refs.empty.at[lax.rem(i - 1, plan.stages)])
                plgpu.barrier_arrive(refs.phi_empty)
            plgpu.barrier_wait(refs.phi_empty)
            for half in range(2):
                refs.phi_s[half, own] = phi[:, half * BLOCK : (half + 1) * BLOCK]
            plgpu.commit_smem()
            plgpu.barrier_arrive(refs.phi_full)
            plgpu.barrier_wait(refs.phi_full)
            columns = refs.phi_s.at[warpgroup].transpose((1, 0))
            plgpu.wgmma(product, columns, refs.v_s.at[slot])
            plgpu.wgmma(total, columns, refs.ones_s)

        step(0, follows=False)
        pl.loop(1, mine)(step)
        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(refs.empty.at[lax.rem(mine - 1, plan.stages)])
        plgpu.barrier_arrive(refs.phi_empty)
        plgpu.barrier_wait(refs.phi_empty)
        return product[...], total[...]

    accumulators = plgpu.ACC((BLOCK, WIDTH)), plgpu.ACC((BLOCK, BLOCK))
    product, total = pl.run_scoped(sums, *accumulators)
    refs.total_s[warpgroup] = total.max(axis=1)  # its columns are equal
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(refs.total_s.at[warpgroup], refs.total_out.at[b, h, chunk, own])
    for c in range(0, WIDTH, STRIPE):
        if c:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        refs.product_s[warpgroup] = product[:, c : c + STRIPE]
        plgpu.commit_smem()
        to = refs.product_out.at[b, h, chunk, own, pl.ds(c, STRIPE)]
        plgpu.copy_smem_to_gmem(refs.product_s.at[warpgroup], to)
    plgpu.wait_smem_to_gmem(0)


def _branch(plan: _Plan, at, tile, refs, e) -> None:
    """The linear branch of a warpgroup's half of a tile. phi(q) = e / sum(e) is not divided out: e
    m / (e . (z + eps)) + bias."""
    (b, h, _), warpgroup = at, lax.axis_index("warpgroup")
    columns = plgpu.Layout.WGMMA.reduce(0)
    z = plgpu.load(refs.vectors_s.at[0], layout=columns) + EPS
    n = (e.astype(jnp.float32) * _wide(z, BLOCK, 1)).sum(axis=1)
    if plan.interpret:  # which multiplies no registers
        refs.operand_s[warpgroup] = e
        plgpu.commit_smem()
        e = refs.operand_s.at[warpgroup]

    def product(total):
        plgpu.wgmma(total, e, refs.m_s)
        return total[...]

    y = pl.run_scoped(product, plgpu.ACC((BLOCK, WIDTH))) * _wide(1.0 / n, WIDTH)
    y = y + _wide(plgpu.load(refs.vectors_s.at[1], layout=columns), BLOCK, 1)
    # of this tile only its int8 values may be on their way
    plgpu.wait_smem_to_gmem(int(plan.rounds), wait_read_only=True)
    refs.branch_s[warpgroup] = y.astype(plan.dtype)
    plgpu.commit_smem()
    to = refs.branch_out.at[b, pl.ds((2 * tile + warpgroup) * BLOCK, BLOCK), h]
    plgpu.copy_smem_to_gmem(refs.branch_s.at[warpgroup], to)


def _exponentials(x):  # f32 [64 128] -> f32
    """Powers of e of the head width, the largest of each token 1."""
    return jnp.exp2((x - _wide(x.max(axis=1), WIDTH)) * LOG2E)


def _feature(x):  # f32 [64 128] -> f32
    """softmax over the head width."""
    e = _exponentials(x)
    return e * _wide(1.0 / e.sum(axis=1), WIDTH)


def _wide(x, size: int, axis: int = 0):
    """x of each row [64], or of each column (axis 1) for `size` rows, as a matrix."""
    shape = (x.shape[0], size) if axis == 0 else (size, x.shape[0])
    return lax.broadcast_in_dim(x, shape, (axis,))
