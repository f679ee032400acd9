"""The channel and fp8 schemes in plain JAX: one scale for each token, one for each output channel
of the weight.

A row that holds a NaN or an infinity has a scale that is not finite, so its products are not
finite; other rows are untouched.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.int8_matmul.quantize import FLOOR, QTensor, dequantize

FP8 = jnp.float8_e4m3fn
TOP = {
    jnp.dtype(jnp.int8): 127,
    jnp.dtype(FP8): 448,
}  # the value that the largest element of a row becomes


def quantize_rows(x, dtype=jnp.int8) -> QTensor:  # [m k] float -> values [m k], scale [m]
    """x top/amax for each row, nearest even; scale amax/top, where top is 127 for int8 and 448 for
    float8_e4m3fn.

    The factor is the float32 quotient, the scale a float32 product with 1/top. On a GPU XLA takes
    the quotient as top times the rounded reciprocal, which is a last bit off in a row of six and
    takes 1 of 500 float8 values to its neighbour; the kernels divide exactly.
    """
    x, top = x.astype(jnp.float32), TOP[jnp.dtype(dtype)]
    amax = jnp.maximum(jnp.abs(x).max(1), FLOOR)
    x = jnp.clip(x * (top / amax)[:, None], -top, top)
    return QTensor(
        (jnp.round(x) if dtype == jnp.int8 else x).astype(dtype), amax * np.float32(1 / top)
    )


def quantize_channels(weight, dtype=jnp.int8) -> QTensor:  # [n k] float -> values [n k], scale [n]
    """`quantize_rows` of a weight: its rows are the output channels."""
    return quantize_rows(weight, dtype)


def dequantize_rows(q: QTensor):  # -> [m k] float32
    """values * scale, the scale of each row."""
    return q.values.astype(jnp.float32) * q.scale[:, None]


def rescale(
    weight: QTensor, dtype=jnp.int8
) -> QTensor:  # block128 [n k] -> values [n k], scale [n]
    """A block128 weight in the channel (or fp8) scheme: one more rounding, of at most half a step
    of the row."""
    return quantize_channels(dequantize(weight), dtype)


def product(x: QTensor, weight: QTensor, bias, out_dtype):  # values [m k], [n k] -> [m n]
    """float32(int32 dot) * scale_x * scale_weight + bias, rounded once to out_dtype."""
    return epilogue(dot(x, weight, jnp.int32).astype(jnp.float32), x, weight, bias, out_dtype)


def fp8_product(x: QTensor, weight: QTensor, bias, out_dtype):  # values [m k], [n k] -> [m n]
    """The float32 dot of float8 values, rounded to bfloat16 if that is the output, then scales and
    bias and the last rounding.

    The dot leaves a GPU in the dtype of the output; scales by row and column keep its relative
    precision.
    """
    total = dot(QTensor(*cast(x)), QTensor(*cast(weight)), jnp.float32)
    if out_dtype == jnp.bfloat16:
        total = lax.reduce_precision(total, 8, 7)
    return epilogue(total, x, weight, bias, out_dtype)


def fp8_product_xla(x: QTensor, weight: QTensor, bias, out_dtype):  # values [m k], [n k] -> [m n]
    """`fp8_product` with a dot of float8 operands: a matrix instruction on GPUs of compute
    capability 8.9 and newer."""
    total = dot(x, weight, jnp.bfloat16 if out_dtype == jnp.bfloat16 else jnp.float32)
    return epilogue(total.astype(jnp.float32), x, weight, bias, out_dtype)


def cast(q: QTensor) -> QTensor:
    return QTensor(q.values.astype(jnp.float32), q.scale)


def dot(x: QTensor, weight: QTensor, dtype):
    precision = lax.Precision.HIGHEST if x.values.dtype == jnp.float32 else None
    dims = (((1,), (1,)), ((), ()))
    return lax.dot_general(
        x.values, weight.values, dims, precision=precision, preferred_element_type=dtype
    )


def epilogue(total, x, weight, bias, out_dtype):  # float32 [m n]
    y = total * x.scale[:, None] * weight.scale[None, :]
    if bias is not None:
        y = y + bias.astype(jnp.float32)[None, :]
    return y.astype(out_dtype)
