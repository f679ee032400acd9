"""The block128 scheme: int8 values with one float32 scale for each 128 x 128 tile."""

from __future__ import annotations

import math

import jax.numpy as jnp
from einops import rearrange, repeat

from pallas_kernels.quantized import FLOOR, QTensor

BLOCK = 128


def tiles(shape) -> tuple[int, int]:
    """Returns the number of tiles of 128 x 128 of a matrix [m k] in each direction, the last ones
    cut: (ceil(m/128), ceil(k/128))."""
    return math.ceil(shape[0] / BLOCK), math.ceil(shape[1] / BLOCK)


def quantize(x) -> QTensor:  # [m k] float
    """amax/128 per tile, nearest even, saturated to -128..127 (thu-ml/TurboDiffusion
    turbodiffusion/ops/quant/quant.hpp).

    A positive maximum becomes 128 and saturates to 127. The factor is the float32 quotient
    128/amax, as in the source.
    """
    m, k = x.shape
    rows, columns = tiles(x.shape)
    padded = jnp.pad(x.astype(jnp.float32), ((0, rows * BLOCK - m), (0, columns * BLOCK - k)))
    tile = rearrange(padded, "(r m) (c k) -> r m c k", m=BLOCK, k=BLOCK)
    amax = jnp.maximum(jnp.abs(tile).max((1, 3)), FLOOR)
    values = jnp.round(tile * rearrange(128 / amax, "r c -> r 1 c 1"))
    values = jnp.clip(values, -128, 127).astype(jnp.int8)
    return QTensor(rearrange(values, "r m c k -> (r m) (c k)")[:m, :k], amax / 128)


def dequantize(q: QTensor):  # block128 -> [m k] float32
    """values * scale."""
    m, k = q.values.shape
    scale = repeat(q.scale, "r c -> (r m) (c k)", m=BLOCK, k=BLOCK)[:m, :k]
    return q.values.astype(jnp.float32) * scale
