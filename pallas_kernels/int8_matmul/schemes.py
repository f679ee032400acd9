"""The schemes of W8A8 behind one interface: how activations and weights become QTensors, and how
the two multiply."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial

import jax.numpy as jnp
from jax import lax

from pallas_kernels.dispatch import on_cuda
from pallas_kernels.int8_matmul import channel, reference, rows, triton
from pallas_kernels.int8_matmul.quantize import BLOCK, QTensor, quantize, tiles
from pallas_kernels.tuning import tile


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scheme:
    """quantizers: impl -> (x [m k]) -> QTensor;  products: impl -> (x, weight, bias or None,
    out_dtype) -> [m n].

    Values [m k] of `dtype` have scales of shape `scale_shape((m, k))`; k is a multiple of
    `k_multiple`. Both have an "auto": the kernel on CUDA, where there is one, and the reference
    elsewhere.
    """

    dtype: object
    scale_shape: Callable
    k_multiple: int
    quantizers: Mapping[str, Callable]
    products: Mapping[str, Callable]

    def quantize_weight(self, weight) -> QTensor:  # [n k] float
        """A weight as the products take it: rows are output channels."""
        return self.quantizers["reference"](weight)


def block_product(x: QTensor, weight: QTensor, bias, out_dtype):
    """The reference's float32 sum, rounded to out_dtype, then the bias added in that dtype."""
    y, info = reference.product(x, weight), jnp.finfo(out_dtype)
    y = lax.reduce_precision(y, info.nexp, info.nmant).astype(
        out_dtype
    )  # a cast alone may be fused away before the bias
    return y if bias is None else y + bias.astype(out_dtype)


def kernel(function: Callable, name: str, interpret: bool, *more) -> Callable:
    """A kernel with the tile of the device at hand, looked up when it is called."""
    return lambda *args: function(*args, *more, tile=tile("int8_matmul", name), interpret=interpret)


def quantizers(reference: Callable, function: Callable, name: str, *more) -> dict[str, Callable]:
    """The reference (XLA's too) and the kernel, which "auto" takes on CUDA where whole warps read a
    row."""
    made = {
        impl: kernel(function, name, impl == "interpret", *more) for impl in ("triton", "interpret")
    }
    auto = lambda x: reference(x) if x.shape[1] % BLOCK else on_cuda(made["triton"], reference)(x)
    return {"reference": reference, "xla": reference, **made, "auto": auto}


def row_quantizers(dtype) -> dict[str, Callable]:
    return quantizers(
        partial(channel.quantize_rows, dtype=dtype), rows.quantize_rows, "quantize_rows", dtype
    )


def products(reference: Callable, fast: Callable, **others: Callable) -> dict[str, Callable]:
    """ "auto" is `fast` on CUDA, which takes widths that are multiples of 128, and the reference
    elsewhere."""

    def auto(x, weight, bias, out_dtype):
        run = lambda function: lambda x, weight, bias: function(x, weight, bias, out_dtype)
        if x.values.shape[1] % BLOCK:
            return reference(x, weight, bias, out_dtype)
        return on_cuda(run(fast), run(reference))(x, weight, bias)

    return {"reference": reference, **others, "auto": auto}


def rows_of(shape):
    return shape[:1]


BLOCK_KERNELS = {
    impl: kernel(triton.block_product, "block_product", impl == "interpret")
    for impl in ("triton", "interpret")
}
ROW_KERNELS = {
    impl: kernel(triton.row_product, "row_product", impl == "interpret")
    for impl in ("triton", "interpret")
}
SCHEMES: dict[str, Scheme] = {
    "block128": Scheme(
        dtype=jnp.int8,
        scale_shape=tiles,
        k_multiple=BLOCK,
        quantizers=quantizers(quantize, triton.quantize, "quantize"),
        products=products(block_product, BLOCK_KERNELS["triton"], **BLOCK_KERNELS),
    ),
    "channel": Scheme(
        dtype=jnp.int8,
        scale_shape=rows_of,
        k_multiple=1,
        quantizers=row_quantizers(jnp.int8),
        products=products(
            channel.product, ROW_KERNELS["triton"], xla=channel.product, **ROW_KERNELS
        ),
    ),
    "fp8": Scheme(
        dtype=channel.FP8,
        scale_shape=rows_of,
        k_multiple=1,
        quantizers=row_quantizers(channel.FP8),
        products=products(
            channel.fp8_product, channel.fp8_product_xla, xla=channel.fp8_product_xla
        ),
    ),
}
