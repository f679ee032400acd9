"""Arrays of 8 bits with their scales, and the rounding of rows in plain JAX: the specification.

A row that holds a NaN or an infinity has a scale that is not finite, so its products are not
finite; other rows are untouched.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

FP8 = jnp.float8_e4m3fn
FLOOR = 1e-8  # least amax of a row or a tile
# the value that the largest element of a row becomes
TOP = {jnp.dtype(jnp.int8): 127, jnp.dtype(FP8): 448}
# schemes with one scale for each row: their names, and the dtype of their values
ROW_SCHEMES = {"channel": jnp.int8, "fp8": FP8}


class QTensor(NamedTuple):
    """Values [m k] of 8 bits and float32 scales: of each tile [ceil(m/128) ceil(k/128)] in
    block128, of each row [m] otherwise."""

    values: object
    scale: object


def quantize_rows(x, dtype=jnp.int8) -> QTensor:  # [m k] float -> values [m k], scale [m]
    """Returns x top/amax for each row, nearest even, and the scale amax/top, where top is 127 for
    int8 and 448 for float8_e4m3fn. Rows of a weight are its output channels.

    The factor is the float32 quotient, the scale a float32 product with 1/top. On a GPU XLA takes
    the quotient as top times the rounded reciprocal, which is a last bit off in a row of six and
    takes 1 of 500 float8 values to its neighbour; the kernels divide exactly.
    """
    x, top = x.astype(jnp.float32), TOP[jnp.dtype(dtype)]
    amax = jnp.maximum(jnp.abs(x).max(1), FLOOR)
    x = jnp.clip(x * (top / amax)[:, None], -top, top)
    if dtype == jnp.int8:
        values = jnp.round(x).astype(dtype)
    else:  # for GPUs XLA leaves out a cast to float8 and back: nothing would be rounded
        values = lax.optimization_barrier(x.astype(dtype))
    return QTensor(values, amax * np.float32(1 / top))


def dequantize_rows(q: QTensor):  # -> [m k] float32
    """Returns values * scale, the scale of each row."""
    return q.values.astype(jnp.float32) * q.scale[:, None]
