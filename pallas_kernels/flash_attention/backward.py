"""The gradient of dense attention: dq by programs for blocks of queries, dk and dv by programs for
blocks of keys; no atomics.

With p = softmax(x), x = scale q k^T and g the cotangent of o: delta = rowsum(g o), dx = p (g v^T -
delta), dq = scale dx k, dk = scale dx^T q, dv = p^T g. p is recomputed from the saved lse (base 2).
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.experimental import pallas as pl

from pallas_kernels.flash_attention.segments import block_of, inside, own, rows, sweep, whole
from pallas_kernels.primitives import LOG2E, blocks, dot, fma_exp2, launch, store


def rowsum(g, o):  # [b l h k] twice -> float32 [b h l]
    """delta; the products are float32 too."""
    return rearrange((g.astype(jnp.float32) * o.astype(jnp.float32)).sum(-1), "b l h -> b h l")


def query_gradient(q, k, v, g, lse, delta, *, scale, tile, interpret):
    """dq [b l h k] of q g [b l h k], k v [b s h k], lse delta [b h l]."""
    b, l, h, _ = q.shape
    return launch(
        partial(query_kernel, l=l, s=k.shape[1], scale=scale, tile=tile, interpret=interpret),
        jax.ShapeDtypeStruct(q.shape, q.dtype),
        (blocks(l, tile.q), h, b),
        [*(block_of(x, tile.q) for x in (q, g, lse, delta)), whole(k, tile.k), whole(v, tile.k)],
        block_of(q, tile.q),
        warps=tile.warps,
        stages=tile.stages,
        interpret=interpret,
    )(q, g, lse, delta, k, v)


def query_kernel(
    q_ref, g_ref, lse_ref, delta_ref, k_ref, v_ref, dq_ref, *, l, s, scale, tile, interpret
):
    """q g dq [Q k], lse delta [Q], k v [s k]."""
    mask = inside(pl.program_id(0), tile.q, l)
    q, g, lse, delta = (own(ref, mask) for ref in (q_ref, g_ref, lse_ref, delta_ref))

    def step(start, there, dq):  # [Q k] float32
        k, v = rows(k_ref, start, tile.k, there), rows(v_ref, start, tile.k, there)
        p = fma_exp2(dot(q, k, (1, 1)), scale * LOG2E, -lse[:, None], interpret)
        if there is not None:
            p = jnp.where(there[None, :], p, 0.0)
        dx = p * (dot(g, v, (1, 1)) - delta[:, None])
        return dq + dot(dx.astype(k.dtype), k, (1, 0))

    dq = scale * sweep(step, jnp.zeros(q.shape, jnp.float32), tile.k, s)
    store(dq_ref, dq.astype(dq_ref.dtype), None if mask is None else mask[:, None])


def key_gradient(q, k, v, g, lse, delta, *, scale, tile, interpret):
    """dk, dv [b s h k] of q g [b l h k], k v [b s h k], lse delta [b h l]."""
    b, s, h, _ = k.shape
    return launch(
        partial(key_kernel, l=q.shape[1], s=s, scale=scale, tile=tile, interpret=interpret),
        (jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)),
        (blocks(s, tile.k), h, b),
        [*(whole(x, tile.q) for x in (q, g, lse, delta)), block_of(k, tile.k), block_of(v, tile.k)],
        [block_of(k, tile.k), block_of(v, tile.k)],
        warps=tile.warps,
        stages=tile.stages,
        interpret=interpret,
    )(q, g, lse, delta, k, v)


def key_kernel(
    q_ref, g_ref, lse_ref, delta_ref, k_ref, v_ref, dk_ref, dv_ref, *, l, s, scale, tile, interpret
):
    """q g [l k], lse delta [l], k v dk dv [K k]. Queries that do not exist read as q = g = delta =
    0, and add nothing."""
    mask = inside(pl.program_id(0), tile.k, s)
    k, v = own(k_ref, mask), own(v_ref, mask)

    def step(start, there, carry):  # dk, dv [K k] float32
        dk, dv = carry
        q, g, lse, delta = (
            rows(ref, start, tile.q, there) for ref in (q_ref, g_ref, lse_ref, delta_ref)
        )
        p = fma_exp2(dot(k, q, (1, 1)), scale * LOG2E, -lse[None, :], interpret)  # [K Q]
        dv = dv + dot(p.astype(g.dtype), g, (1, 0))
        dx = p * (dot(v, g, (1, 1)) - delta[None, :])
        return dk + dot(dx.astype(q.dtype), q, (1, 0)), dv

    zero = jnp.zeros(k.shape, jnp.float32)
    dk, dv = sweep(step, (zero, zero), tile.q, l)
    mask = None if mask is None else mask[:, None]
    store(dk_ref, (scale * dk).astype(dk_ref.dtype), mask)
    store(dv_ref, dv.astype(dv_ref.dtype), mask)
