"""The schemes of W8A8 behind one interface: how activations and weights become QTensors, and how the two multiply."""

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

# (k, n) of the weights whose product the kernel computes faster than XLA, as measured on a GPU inside a scan over layers: there
# XLA (jax 0.11.2) keeps the scales out of its matrix product and writes the sums to memory between the two.
KERNEL_SHAPES: frozenset[tuple[int, int]] = frozenset()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scheme:
    """quantizers: impl -> (x [m k]) -> QTensor;  products: impl -> (x, weight, bias or None, out_dtype) -> [m n].

    Values [m k] of `dtype` have scales of shape `scale_shape((m, k))`; k is a multiple of `k_multiple`. `auto` is one of the
    products, or a choice among them: the reference, until the kernel has been measured on a GPU.
    """

    dtype: object
    scale_shape: Callable
    k_multiple: int
    quantizers: Mapping[str, Callable]
    products: Mapping[str, Callable]
    auto: Callable

    def quantize_weight(self, weight) -> QTensor:  # [n k] float
        """A weight as the products take it: rows are output channels."""
        return self.quantizers["reference"](weight)


def block_product(x: QTensor, weight: QTensor, bias, out_dtype):
    """The reference's float32 sum, rounded to out_dtype, then the bias added in that dtype."""
    y, info = reference.product(x, weight), jnp.finfo(out_dtype)
    y = lax.reduce_precision(y, info.nexp, info.nmant).astype(out_dtype)  # a cast alone may be fused away before the bias
    return y if bias is None else y + bias.astype(out_dtype)


def kernel(function: Callable, name: str, interpret: bool, *more) -> Callable:
    """A kernel with the tile of the device at hand, looked up when it is called."""
    return lambda *args: function(*args, *more, tile=tile("int8_matmul", name), interpret=interpret)


def kernels(function: Callable, name: str, *more) -> dict[str, Callable]:
    return {impl: kernel(function, name, impl == "interpret", *more) for impl in ("triton", "interpret")}


def row_quantizers(dtype) -> dict[str, Callable]:
    plain = partial(channel.quantize_rows, dtype=dtype)
    return {"reference": plain, "xla": plain, **kernels(rows.quantize_rows, "quantize_rows", dtype)}


def row_product(x: QTensor, weight: QTensor, bias, out_dtype):
    """XLA's product, or the kernel when compiled for CUDA at a shape of KERNEL_SHAPES."""
    n, k = weight.values.shape
    run = lambda function: lambda x, weight, bias: function(x, weight, bias, out_dtype)
    if (k, n) not in KERNEL_SHAPES:
        return channel.product(x, weight, bias, out_dtype)
    return on_cuda(run(ROW_KERNELS["triton"]), run(channel.product))(x, weight, bias)


def fp8_product(x: QTensor, weight: QTensor, bias, out_dtype):
    """A dot of float8 operands when compiled for CUDA, its float32 form on anything else."""
    run = lambda function: lambda x, weight, bias: function(x, weight, bias, out_dtype)
    return on_cuda(run(channel.fp8_product_xla), run(channel.fp8_product))(x, weight, bias)


def rows_of(shape):
    return shape[:1]


ROW_KERNELS = kernels(triton.row_product, "row_product")
SCHEMES: dict[str, Scheme] = {
    "block128": Scheme(
        dtype=jnp.int8,
        scale_shape=tiles,
        k_multiple=BLOCK,
        quantizers={"reference": quantize, **kernels(triton.quantize, "quantize")},
        products={"reference": block_product, **kernels(triton.block_product, "block_product")},
        auto=block_product,
    ),
    "channel": Scheme(
        dtype=jnp.int8,
        scale_shape=rows_of,
        k_multiple=1,
        quantizers=row_quantizers(jnp.int8),
        products={"reference": channel.product, "xla": channel.product, **ROW_KERNELS},
        auto=row_product,
    ),
    "fp8": Scheme(
        dtype=channel.FP8,
        scale_shape=rows_of,
        k_multiple=1,
        quantizers=row_quantizers(channel.FP8),
        products={"reference": channel.fp8_product, "xla": channel.fp8_product_xla},
        auto=fp8_product,
    ),
}
