"""The forward pass of dense attention: one program for a block of queries, online softmax over
blocks of keys."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.flash_attention.segments import block_of, inside, own, rows, sweep, whole
from pallas_kernels.primitives import LOG2E, blocks, dot, exp2, fma, fma_exp2, launch, store

LOWEST = float(jnp.finfo(jnp.float32).min)


def forward(q, k, v, *, scale, tile, interpret):
    """softmax(scale q k^T) v, and the base-2 logarithm of the softmax's denominator: log2 sum
    exp(scale q k^T): q [b l h k], k v [b s h k] -> o [b l h k], lse float32 [b h l]."""
    b, l, h, _ = q.shape
    out = jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((b, h, l), jnp.float32)
    return launch(
        partial(forward_kernel, l=l, s=k.shape[1], scale=scale, tile=tile, interpret=interpret),
        out,
        (blocks(l, tile.q), h, b),
        [block_of(q, tile.q), whole(k, tile.k), whole(v, tile.k)],
        [block_of(x, tile.q) for x in out],
        warps=tile.warps,
        stages=tile.stages,
        interpret=interpret,
    )(q, k, v)


def forward_kernel(q_ref, k_ref, v_ref, o_ref, lse_ref, *, l, s, scale, tile, interpret):
    """q o [Q k], k v [s k], lse [Q]."""
    mask = inside(pl.program_id(0), tile.q, l)
    q = own(q_ref, mask)

    def step(start, there, carry):  # o [Q k], m and total [Q], all float32; m is in units of log2
        o, m, total = carry
        k, v = rows(k_ref, start, tile.k, there), rows(v_ref, start, tile.k, there)
        x = dot(q, k, (1, 1))
        if there is not None:
            x = jnp.where(there[None, :], x, LOWEST)
        top = jnp.maximum(m, x.max(1) * (scale * LOG2E))
        p = fma_exp2(x, scale * LOG2E, -top[:, None], interpret)
        shrink = exp2(m - top, interpret)
        o = o * shrink[:, None] + dot(p.astype(v.dtype), v, (1, 0))
        return o, top, fma(total, shrink, p.sum(1), interpret)

    zero = jnp.zeros(tile.q, jnp.float32)
    o, m, total = sweep(step, (jnp.zeros(q.shape, jnp.float32), zero + LOWEST, zero), tile.k, s)
    store(o_ref, (o / total[:, None]).astype(o_ref.dtype), None if mask is None else mask[:, None])
    store(lse_ref, m + jnp.log2(total), mask)
