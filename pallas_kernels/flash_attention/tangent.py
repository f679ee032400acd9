"""The tangent of dense attention: one program for a block of queries, one pass over the keys,
nothing rescaled on the way.

The forward pass has left o and lse, so there is one accumulator and no running maximum. lse only
keeps the exponentials in range: they are summed again here, so that a rounded lse (cuDNN's comes in
bfloat16) costs no accuracy.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.flash_attention.segments import block_of, inside, own, rows, sweep, whole
from pallas_kernels.primitives import LOG2E, blocks, dot, fma, fma_exp2, launch, store


def tangent(q, k, v, o, lse, tq, tk, tv, *, scale, tile, interpret):
    """The tangent of o: sum_s p tv + p (tx - mu) v, with p = softmax(x), x = scale q k^T, mu =
    sum_s p tx; lse is base 2. q o tq [b l h k], k v tk tv [b s h k] -> [b l h k].

    Any number may be taken from a row of tx, since mu moves with it. Here it is the row's mean, for
    accuracy: p tx is rounded to the operands' type, and what all keys have in common would drown
    the rest.
    """
    mean = lambda x: x.mean(1, dtype=jnp.float32)  # [b h k]
    l, s, h = q.shape[1], k.shape[1], q.shape[2]
    head = pl.BlockSpec((None, None, q.shape[3]), lambda i, h, b: (b, h, 0))
    return launch(
        partial(tangent_kernel, l=l, s=s, scale=scale, tile=tile, interpret=interpret),
        jax.ShapeDtypeStruct(q.shape, q.dtype),
        (blocks(l, tile.q), h, q.shape[0]),
        [
            *(block_of(x, tile.q) for x in (q, tq, o, lse)),
            *(whole(x, tile.k) for x in (k, tk, v, tv)),
            head,
            head,
        ],
        block_of(q, tile.q),
        warps=tile.warps,
        stages=tile.stages,
        interpret=interpret,
    )(q, tq, o, lse, k, tk, v, tv, mean(k), mean(tk))


def tangent_kernel(*refs, l, s, scale, tile, interpret):
    """q tq o to [Q k], lse [Q], k tk v tv [s k], means of k and tk [k]."""
    q_ref, tq_ref, o_ref, lse_ref, k_ref, tk_ref, v_ref, tv_ref, mean_ref, tmean_ref, to_ref = refs
    mask = inside(pl.program_id(0), tile.q, l)
    q, tq, lse = own(q_ref, mask), own(tq_ref, mask), own(lse_ref, mask)
    wide = lambda x: x.astype(jnp.float32)
    centre = scale * (wide(tq) * mean_ref[...][None, :] + wide(q) * tmean_ref[...][None, :]).sum(1)

    def step(start, there, carry):  # to [Q k], mu and total [Q], float32
        to, mu, total = carry
        k, tk, v, tv = (rows(ref, start, tile.k, there) for ref in (k_ref, tk_ref, v_ref, tv_ref))
        p = fma_exp2(dot(q, k, (1, 1)), scale * LOG2E, -lse[:, None], interpret)
        if there is not None:
            p = jnp.where(there[None, :], p, 0.0)
        tx = fma(dot(tq, k, (1, 1)) + dot(q, tk, (1, 1)), scale, -centre[:, None], interpret)
        ptx = p * tx
        to = to + dot(p.astype(v.dtype), tv, (1, 0)) + dot(ptx.astype(v.dtype), v, (1, 0))
        return to, mu + ptx.sum(1), total + p.sum(1)

    zero = jnp.zeros(tile.q, jnp.float32)
    to, mu, total = sweep(step, (jnp.zeros(q.shape, jnp.float32), zero, zero), tile.k, s)
    to = (to - mu[:, None] * wide(own(o_ref, mask))) / total[:, None]
    store(to_ref, to.astype(to_ref.dtype), None if mask is None else mask[:, None])
