"""W8A8 linear layer: int8 activations times int8 weights with block scales."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

from pallas_kernels.derivatives import forward_only
from pallas_kernels.dispatch import choose
from pallas_kernels.int8_matmul import reference
from pallas_kernels.int8_matmul.quantize import BLOCK, QTensor, dequantize, quantize, tiles

__all__ = ["BLOCK", "QTensor", "dequantize", "int8_linear", "quantize", "tiles"]

IMPLS = {"reference": reference.product}
NO_DERIVATIVE = (
    "int8_linear is forward only: rounding to int8 has no useful derivative. "
    'Differentiate the float weights: with_linear(model, "float"), or load the checkpoint that is not quantised.'
)


def int8_linear(x, weight: QTensor, bias=None, *, impl: str = "auto"):  # x [m k] float, weight [n k] -> [m n] of x.dtype
    """x W^T + bias with x quantised like the weight, in tiles of 128 x 128; float32 sums in the order of k.

    The sum is rounded to x.dtype before the bias is added, as in the published kernels: two roundings.
    """
    check(x, weight, bias)
    product = choose("int8_linear", impl, IMPLS, reference.product)

    def run(x, values, scale):
        y = product(quantize(x), QTensor(values, scale))
        info = jnp.finfo(x.dtype)
        return lax.reduce_precision(y, info.nexp, info.nmant).astype(x.dtype)  # a cast alone may be fused away before the bias

    y = forward_only(run, NO_DERIVATIVE)(x, weight.values, weight.scale)
    return y if bias is None else y + bias.astype(y.dtype)


def check(x, weight, bias):
    """Raise ValueError unless x [m k], weight [n k] with k a multiple of 128 and one scale for each tile."""
    if x.ndim != 2 or weight.values.ndim != 2 or x.shape[1] != weight.values.shape[1]:
        raise ValueError(f"int8_linear: x {x.shape}, weight {weight.values.shape}; expected [m k] and [n k]")
    if x.shape[1] % BLOCK:
        low = x.shape[1] // BLOCK * BLOCK
        raise ValueError(
            f"int8_linear: k is {x.shape[1]}; it must be a multiple of {BLOCK}, the width of a scale block; "
            f"nearest: {f'{low} and ' if low else ''}{low + BLOCK}"
        )
    if weight.values.dtype != jnp.int8 or weight.scale.shape != tiles(weight.values.shape):
        raise ValueError(
            f"int8_linear: weight {weight.values.dtype}, scale {weight.scale.shape}; expected int8 and {tiles(weight.values.shape)}"
        )
    if bias is not None and bias.shape != weight.values.shape[:1]:
        raise ValueError(f"int8_linear: bias {bias.shape}; expected {weight.values.shape[:1]}")
