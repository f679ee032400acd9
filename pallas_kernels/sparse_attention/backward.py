"""The gradient of block-sparse attention: dq over the lists of key blocks, dk and dv over the lists
turned round; no atomics.

With p = exp(scale q k^T - lse) on the chosen blocks and do the cotangent of o (kernels as in arXiv
2307.08691): delta = rowsum(do o), ds = p (do v^T - delta), dq = scale ds k, dk = scale ds^T q, dv =
p^T do. p and ds are rounded to the input dtype where they are multiplied; every sum is float32.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.primitives import LOG2E, dot, fma_exp2, launch, load, store
from pallas_kernels.primitives import blocks as count
from pallas_kernels.sparse_attention.transpose import transpose
from pallas_kernels.tuning import tile

__all__ = ["backward"]

# queries for each warp in the gradient of queries: as many as one tensor instruction gives it
WARP_ROWS = 16
# keys, and in the gradient of keys also queries, taken at a time; more need more registers or
# shared memory than there is
ROWS = 64


def backward(q, k, v, blocks, o, lse, do, block_q, block_k, *, interpret):
    """dq, dk, dv [b l h k] of `reference.sparse_attention`, whose o it was; do is the cotangent of
    o.

    blocks: int32 [b h q_blocks chosen], ascending; lse: natural logarithm of the normalisers, f32
    [b h q_blocks block_q].
    """
    lse = rearrange(lse, "b h i m -> b h (i m)")
    at = tile("sparse_attention", f"dq_q{block_q}")
    dq, delta = query_side(q, k, v, blocks, o, lse, do, block_q, block_k, at, interpret)
    columns = transpose(blocks, count(k.shape[1], block_k))
    at = tile("sparse_attention", "dkdv")
    dk, dv = key_side(q, k, v, columns, lse, delta, do, block_q, block_k, at, interpret)
    return dq, dk, dv


def query_side(q, k, v, blocks, o, lse, do, block_q, block_k, at, interpret):
    """dq [b l h k], and delta f32 [b h (q_blocks block_q)], which is not written past the last
    query. lse f32 [b h (q_blocks block_q)]."""
    rows = min(block_q, WARP_ROWS * at.warps)
    (b, l, h, d), chosen = q.shape, blocks.shape[3]
    own = pl.BlockSpec((None, rows, None, d), lambda i, g: (g // h, i, g % h, 0))
    head = pl.BlockSpec((None, k.shape[1], None, d), lambda i, g: (g // h, 0, g % h, 0))
    number = pl.BlockSpec((None, None, rows), lambda i, g: (g // h, g % h, i))
    lists = pl.BlockSpec(
        (None, None, None, chosen), lambda i, g: (g // h, g % h, i * rows // block_q, 0)
    )
    return launch(
        partial(query_kernel, rows=l, length=k.shape[1], block_k=block_k, interpret=interpret),
        (jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct(lse.shape, jnp.float32)),
        (count(l, rows), b * h),
        [lists, own, own, own, number, head, head],
        (own, number),
        warps=at.warps,
        stages=at.stages,
        interpret=interpret,
    )(blocks, q, o, do, lse, k, v)


def query_kernel(
    blocks_ref,
    q_ref,
    o_ref,
    do_ref,
    lse_ref,
    k_ref,
    v_ref,
    dq_ref,
    delta_ref,
    *,
    rows,
    length,
    block_k,
    interpret,
):
    """blocks [chosen]; q o do dq [m k]; lse delta [m]; k v [length k], of one head."""
    here = pl.program_id(0) * lse_ref.shape[0] + jnp.arange(lse_ref.shape[0]) < rows
    q, o, do = (load(ref, here[:, None]) for ref in (q_ref, o_ref, do_ref))
    lse = load(lse_ref, here) * LOG2E
    delta = (do.astype(jnp.float32) * o.astype(jnp.float32)).sum(1)
    store(delta_ref, delta, here)
    scale, size, chosen = q.shape[1] ** -0.5, min(block_k, ROWS), blocks_ref.shape[0]
    parts = block_k // size

    def add(t, dq, ragged):
        i, part = split(t, parts)
        start = blocks_ref[i] * block_k + part * size
        inside = start + jnp.arange(size) < length
        k, v = (
            load(ref.at[pl.ds(start, size)], inside[:, None] if ragged else None)
            for ref in (k_ref, v_ref)
        )
        p = fma_exp2(dot(q, k, (1, 1)), scale * LOG2E, -lse[:, None], interpret)
        if ragged:
            p = jnp.where(inside, p, 0.0)
        ds = p * (dot(do, v, (1, 1)) - delta[:, None])
        return dq + dot(ds.astype(k.dtype), k, (1, 0))

    # The list ascends, so only its last block can reach past the end: its last part goes first, and
    # parts that have no key are left out.
    left = length - blocks_ref[chosen - 1] * block_k
    last = (chosen - 1) * parts + lax.min(parts, lax.div(left + size - 1, size)) - 1
    dq = add(last, jnp.zeros(q.shape, jnp.float32), length % size != 0)
    dq = lax.fori_loop(0, last, partial(add, ragged=False), dq)
    store(dq_ref, (scale * dq).astype(dq_ref.dtype), here[:, None])


def key_side(q, k, v, columns, lse, delta, do, block_q, block_k, at, interpret):
    """dk, dv [b l h k], zeros where no query chose a key; columns: the lists of `transpose`; lse
    and delta f32 [b h (q_blocks block_q)]."""
    whole = lambda x: pl.BlockSpec(x.shape, lambda i: (0,) * x.ndim)
    args = columns, q, do, lse, delta, k, v
    return launch(
        partial(key_kernel, block_q=block_q, block_k=block_k, interpret=interpret),
        (jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)),
        (columns.order.shape[0] * count(block_k, ROWS),),
        jax.tree.map(whole, args),
        (whole(k), whole(v)),
        warps=at.warps,
        stages=at.stages,
        interpret=interpret,
    )(*args)


def key_kernel(
    columns,
    q_ref,
    do_ref,
    lse_ref,
    delta_ref,
    k_ref,
    v_ref,
    dk_ref,
    dv_ref,
    *,
    block_q,
    block_k,
    interpret,
):
    """ROWS keys of one head against the queries of their list, ROWS at a time; refs are whole
    arrays.

    Queries past the end read as q = do = 0 and add nothing; keys past the end only change their own
    row, which is not stored.
    """
    length, queries, heads = k_ref.shape[1], q_ref.shape[1], q_ref.shape[2]
    rows, size, scale = min(block_q, ROWS), min(block_k, ROWS), k_ref.shape[3] ** -0.5
    times, parts = block_q // rows, block_k // size
    (i, part), k_blocks = split(pl.program_id(0), parts), count(length, block_k)
    column = columns.order[i]
    b, h = column // k_blocks // heads, column // k_blocks % heads
    first = column % k_blocks * block_k + part * size
    inside = (first + jnp.arange(size) < length)[:, None]
    at = lambda ref: ref.at[b, pl.ds(first, size), h]
    k, v = load(at(k_ref), inside), load(at(v_ref), inside)

    def add(t, carry):
        dk, dv = carry
        i, part = split(t, times)
        row = columns.queries[i] * block_q + part * rows
        here = row + jnp.arange(rows) < queries
        q, do = (load(ref.at[b, pl.ds(row, rows), h], here[:, None]) for ref in (q_ref, do_ref))
        lse, delta = (load(ref.at[b, h, pl.ds(row, rows)], here) for ref in (lse_ref, delta_ref))
        p = fma_exp2(dot(k, q, (1, 1)), scale * LOG2E, -LOG2E * lse[None], interpret)  # [size rows]
        ds = p * (dot(v, do, (1, 1)) - delta[None])
        return dk + dot(ds.astype(q.dtype), q, (1, 0)), dv + dot(p.astype(do.dtype), do, (1, 0))

    zero = jnp.zeros(k.shape, jnp.float32)
    begin, end = columns.start[column] * times, columns.start[column + 1] * times
    dk, dv = lax.fori_loop(begin, end, add, (zero, zero))
    store(at(dk_ref), (scale * dk).astype(dk_ref.dtype), inside)
    store(at(dv_ref), dv.astype(dv_ref.dtype), inside)


def split(t, parts):
    """Which block, and which of its parts, the part number t is."""
    return lax.div(t, parts), lax.rem(t, parts)
