"""The two sums over all keys that the linear branch needs, in one pass over k and v."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.primitives import LOG2E, dot, fma_exp2, launch, load, store
from pallas_kernels.primitives import blocks as count
from pallas_kernels.tuning import tile

ROWS = 64  # keys in one product
PROGRAMS = 512  # about as many programs, each over a chunk of the keys of one head


def summaries(k, v, *, interpret):  # k v [b l h k] -> f32 [b h k k], f32 [b h k]
    """phi(k)^T v and the sum of phi(k), phi = softmax over the head width, rounded to k.dtype as in
    `reference.feature`.

    Each program sums a chunk of the keys in float32; XLA adds the chunks, so the result does not
    depend on their timing.
    """
    b, l, h, d = k.shape
    steps = count(count(l, ROWS), max(1, PROGRAMS // (b * h)))
    chunks = count(l, steps * ROWS)
    tokens = pl.BlockSpec((None, steps * ROWS, None, d), lambda i, g: (g // h, i, g % h, 0))
    at = tile("sparse_attention", "summaries")
    products, sums = launch(
        partial(summaries_kernel, length=l, steps=steps, interpret=interpret),
        [
            jax.ShapeDtypeStruct((b, h, chunks, d, d), jnp.float32),
            jax.ShapeDtypeStruct((b, h, chunks, d), jnp.float32),
        ],
        (chunks, b * h),
        [tokens, tokens],
        [
            pl.BlockSpec((None, None, None, d, d), lambda i, g: (g // h, g % h, i, 0, 0)),
            pl.BlockSpec((None, None, None, d), lambda i, g: (g // h, g % h, i, 0)),
        ],
        warps=at.warps,
        stages=at.stages,
        interpret=interpret,
    )(k, v)
    return products.sum(2), sums.sum(2)


def summaries_kernel(k_ref, v_ref, product_ref, sum_ref, *, length, steps, interpret):
    """k v [steps*ROWS k] -> phi(k)^T v [k k] and the sum of phi(k) [k] over the rows before the
    end."""
    width = k_ref.shape[1]
    start = pl.program_id(0) * steps * ROWS

    def step(t, state):
        product, total = state
        rows = pl.ds(t * ROWS, ROWS)
        inside = (start + t * ROWS + jnp.arange(ROWS) < length)[:, None]
        phi = feature(load(k_ref.at[rows], inside), inside, interpret)
        total = total + dot(
            phi, jnp.ones((ROWS, 16), phi.dtype), (0, 0)
        )  # 16 equal columns: the tensor cores add up rows
        return product + dot(phi, load(v_ref.at[rows], inside), (0, 0)), total

    product, total = lax.fori_loop(
        0, steps, step, (jnp.zeros((width, width)), jnp.zeros((width, 16)))
    )
    store(product_ref, product)
    store(sum_ref, total.max(1))


def feature(x, inside, interpret):  # [n k], [n 1] -> [n k]
    """softmax over the head width, rounded to x.dtype; zeros where `inside` is false."""
    y = x.astype(jnp.float32)
    p = fma_exp2(y, LOG2E, -LOG2E * y.max(1, keepdims=True), interpret)
    return (p * jnp.where(inside, 1 / p.sum(1, keepdims=True), 0.0)).astype(x.dtype)
