"""The schemes of W8A8 behind one interface: how activations and weights become QTensors, and how
the two multiply."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import jax.numpy as jnp
from einops import rearrange

from pallas_kernels import quantized, rows, tuning
from pallas_kernels.dispatch import implementations
from pallas_kernels.int8_matmul import reference, triton
from pallas_kernels.int8_matmul.quantize import BLOCK, quantize, tiles
from pallas_kernels.int8_matmul.reference import added, in_groups, low_rank_product
from pallas_kernels.mosaic import imported
from pallas_kernels.quantized import ROW_SCHEMES, QTensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scheme:
    """quantizers: impl -> (x [m k]) -> QTensor, of rows also x [g m k/g];  products: impl -> (x,
    weight, bias or None, low_rank or None, stream or None, gate or None, out_dtype=, groups=) -> [m
    n], or [groups m n/groups].

    Values [m k] of `dtype` have scales of shape `scale_shape((m, k))`; k is a multiple of
    `k_multiple`. kernel: the product that "auto" takes on CUDA, but for Hopper, where it is
    "mosaic" if that takes the operands.
    """

    dtype: object
    scale_shape: Callable
    k_multiple: int
    quantizers: Mapping[str, Callable]
    products: Mapping[str, Callable]
    kernel: str = "triton"

    def quantize_weight(self, weight) -> QTensor:  # [n k] float
        """A weight as the products take it: rows are output channels."""
        return self.quantizers["reference"](weight)


def _quantizers(plain: Callable, kernel: Callable) -> dict[str, Callable]:
    """XLA's is the reference."""
    return implementations(plain, kernel, xla=plain)


def _beside(product: Callable, *, adds: bool = False) -> Callable:
    """A product that has no place for a second one within: that is added to what it gives, with a
    rounding of its own. So is what it gives to a stream, unless the product `adds` it."""

    def run(x, weight, bias, low_rank=None, stream=None, gate=None, *, groups=1, **options):
        if adds and low_rank is None:
            return product(x, weight, bias, stream=stream, gate=gate, groups=groups, **options)
        y = product(x, weight, bias, groups=groups, **options)
        if low_rank is not None:
            y = y + in_groups(low_rank_product(*low_rank), groups).astype(y.dtype)
        return y if stream is None else added(y, stream, gate)

    return run


def _grouped(product: Callable) -> Callable:
    """A product that gives [m n]: its columns are put into groups after it."""
    return lambda *args, groups=1, **options: in_groups(product(*args, **options), groups)


def _row_quantizers(dtype) -> dict[str, Callable]:
    def plain(x):
        if x.ndim == 3:
            x = rearrange(x, "g m k -> m (g k)")
        return quantized.quantize_rows(x, dtype)

    def kernel(x, *, interpret):
        at = tuning.tile("int8_matmul", "quantize_rows")
        return rows.quantize_rows(x, dtype, tile=at, interpret=interpret)

    return _quantizers(plain, kernel)


_MOSAIC = imported("int8_matmul", "row_product")


def rows_of(shape):
    return shape[:1]


SCHEMES: dict[str, Scheme] = {
    "block128": Scheme(
        dtype=jnp.int8,
        scale_shape=tiles,
        k_multiple=BLOCK,
        quantizers=_quantizers(quantize, triton.quantize),
        products=implementations(
            _beside(_grouped(reference.block_product)), _beside(_grouped(triton.block_product))
        ),
    ),
    "channel": Scheme(
        dtype=ROW_SCHEMES["channel"],
        scale_shape=rows_of,
        k_multiple=1,
        quantizers=_row_quantizers(ROW_SCHEMES["channel"]),
        products=implementations(
            _grouped(reference.row_product),
            triton.row_product,
            xla=_grouped(reference.row_product),
            mosaic=_beside(_MOSAIC, adds=True),
        ),
    ),
    "fp8": Scheme(
        dtype=ROW_SCHEMES["fp8"],
        scale_shape=rows_of,
        k_multiple=1,
        quantizers=_row_quantizers(ROW_SCHEMES["fp8"]),
        products={
            "reference": _beside(_grouped(reference.fp8_product)),
            "xla": _beside(_grouped(reference.fp8_product_xla)),
            "mosaic": _beside(_MOSAIC, adds=True),
        },
        kernel="xla",
    ),
}
