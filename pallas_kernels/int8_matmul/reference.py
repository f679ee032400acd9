"""The W8A8 product of the block128 scheme in plain JAX: the specification."""

from __future__ import annotations

import jax.numpy as jnp
from einops import rearrange, repeat
from jax import lax

from pallas_kernels.int8_matmul.quantize import BLOCK, QTensor

SUM_BYTES = 2**28  # float32 sums held at a time


def product(x: QTensor, weight: QTensor):  # values [m k], [n k] -> [m n] float32
    """Sum over the 128-wide blocks of k, in order, of float(int32 dot) * (scale_x *
    scale_weight)."""
    m, n = x.values.shape[0], weight.values.shape[0]
    rows = max(SUM_BYTES // (4 * n * BLOCK), 1) * BLOCK
    if rows >= m:
        return rows_product(x, weight)
    pieces = -(-m // rows)
    values = jnp.pad(x.values, ((0, pieces * rows - m), (0, 0)))
    scale = jnp.pad(x.scale, ((0, pieces * rows // BLOCK - x.scale.shape[0]), (0, 0)))
    split = QTensor(
        rearrange(values, "(p m) k -> p m k", p=pieces),
        rearrange(scale, "(p r) c -> p r c", p=pieces),
    )
    y = lax.map(lambda piece: rows_product(piece, weight), split)
    return rearrange(y, "p m n -> (p m) n")[:m]


def rows_product(x: QTensor, weight: QTensor):
    m, n = x.values.shape[0], weight.values.shape[0]

    def step(total, block):
        xv, xs, wv, ws = block  # [m 128], [r], [n 128], [o]
        dot = lax.dot_general(xv, wv, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
        xs, ws = repeat(xs, "r -> (r m) 1", m=BLOCK)[:m], repeat(ws, "o -> 1 (o n)", n=BLOCK)[:, :n]
        return total + dot.astype(jnp.float32) * (xs * ws), None

    blocks = (columns(x.values), x.scale.T, columns(weight.values), weight.scale.T)
    return lax.scan(step, jnp.zeros((m, n), jnp.float32), blocks)[0]


def columns(values):
    return rearrange(values, "m (c k) -> c m k", k=BLOCK)
