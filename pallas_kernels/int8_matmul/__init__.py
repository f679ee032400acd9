"""W8A8 linear layers: activations and weights of 8 bits, in three schemes.

block128  int8, a scale for each tile of 128 x 128: the published quantised checkpoints
channel   int8, a scale for each token and for each output channel
fp8       float8_e4m3fn, scales as in channel

An activation is quantised once and multiplied with every weight that reads it. impl: "auto" (on
CUDA, for widths that are multiples of 128, the kernels, and XLA's product of float8 operands; on
Hopper the products of channel and fp8 through Mosaic, unless low_rank is given; elsewhere the
reference), "reference", "xla" (channel: the reference; fp8: float8 operands), "triton",
"interpret"; of the products of channel and fp8 also "mosaic" (Hopper). Rounding to float8
needs compute capability 8.9: on Ampere "auto" is the reference, "triton" a ValueError. A tile
(block128) or row (channel, fp8) with a NaN or an infinity gives outputs that are not finite.
"""

from __future__ import annotations

import difflib

import jax.numpy as jnp

from pallas_kernels import rounding
from pallas_kernels.derivatives import forward_only
from pallas_kernels.dispatch import automatic, bound, choose
from pallas_kernels.int8_matmul.quantize import BLOCK, dequantize, quantize, tiles
from pallas_kernels.int8_matmul.schemes import SCHEMES, Scheme, rows_of
from pallas_kernels.mosaic import chosen, product_refusal
from pallas_kernels.primitives import power_of_two
from pallas_kernels.quantized import QTensor, dequantize_rows, quantize_rows

__all__ = [
    "BLOCK",
    "IMPLEMENTATIONS",
    "QTensor",
    "SCHEMES",
    "Scheme",
    "dequantize",
    "dequantize_rows",
    "int8_linear",
    "quantize",
    "quantize_activations",
    "quantize_rows",
    "quantize_weight",
    "quantized_linear",
    "tiles",
]

IMPLEMENTATIONS = {
    **{f"quantized_linear {name}": scheme.products for name, scheme in SCHEMES.items()},
    **{f"quantize_activations {name}": scheme.quantizers for name, scheme in SCHEMES.items()},
}
NO_DERIVATIVE = (
    "{} is forward only: rounding to 8 bits has no useful derivative. Differentiate the float"
    ' weights: with_linear(model, "float"), or load the checkpoint that is not quantised.'
)


def int8_linear(x, weight: QTensor, bias=None, *, impl: str = "auto"):
    """x W^T + bias in the block128 scheme: x quantised like the weight, float32 sums in the order
    of k.

    x [m k] float, weight int8 [n k] with float32 scales [ceil(n/128) k/128], bias [n] or None -> [m
    n] of x.dtype. Forward only. Raises ValueError where k is not a multiple of 128, or shapes do
    not fit. Source: thu-ml/TurboDiffusion turbodiffusion/ops. The sum is rounded to x.dtype before
    the bias is added, as in the published kernels: two roundings.
    """
    op, scheme = "int8_linear", SCHEMES["block128"]
    _check(op, scheme, x, weight, bias)
    return _linear(op, _quantize(op, x, scheme, impl), weight, bias, scheme, x.dtype, impl)


def quantize_activations(x, scheme: str, *, groups: int = 1, impl: str = "auto") -> QTensor:
    """x [m k] as the products of the scheme take it; k is a multiple of 128 in block128 (else
    ValueError). In channel and fp8 a row's columns may come in more than one group: x [groups m
    k/groups]."""
    op, by_rows = "quantize_activations", _named(scheme).scale_shape is rows_of
    if groups < 1 or (groups > 1 and not by_rows):
        raise ValueError(f"{op}: groups is {groups}; allowed: 1, and more in channel and fp8")
    if x.shape[:-2] != (groups,) * (groups > 1) or x.ndim < 2:
        expected = "[m k]" if groups == 1 else f"[{groups} m k/{groups}]"
        raise ValueError(f"{op}: x {x.shape}; expected {expected}")
    _check_k(op, SCHEMES[scheme], _width(x))
    return _quantize(op, x, SCHEMES[scheme], impl)


def quantize_weight(weight, scheme: str) -> QTensor:  # [n k] float
    """A float weight [n k], one row for each output channel, in the scheme: values [n k] of 8 bits,
    and their scales."""
    return _named(scheme).quantize_weight(weight)


def quantized_linear(
    x: QTensor,
    weight: QTensor,
    bias=None,
    *,
    low_rank=None,
    stream=None,
    gate=None,
    scheme: str,
    out_dtype,
    groups: int = 1,
    impl: str = "auto",
):
    """x W^T + bias of quantised activations: [m k], [n k] -> [m n], or with its columns in more
    than one group [groups m n/groups]. Weights concatenated along n, scales and biases alike, give
    concatenated outputs.

    stream: [m n] of out_dtype, in one group, to which (x W^T + bias) gate is added; gate [n], None
    for ones. That is in the one rounding of channel and "mosaic", and rounded after it elsewhere.

    low_rank: (narrow [m r], up [n r]), floats of one dtype, r a power of two from 16; narrow up^T
    is added. channel and fp8 round once, after the bias; block128 before and after it, as in the
    published kernels. What low_rank adds is in the one rounding of channel, but for "mosaic", and
    elsewhere rounded and added after it. In block128 a weight that is not the last one
    concatenated must have a multiple of 128 rows.
    """
    op = "quantized_linear"
    _check(op, _named(scheme), x.values, weight, bias, x.scale)
    if low_rank is not None:
        _check_low_rank(op, *low_rank, x.values, weight.values)
    n = weight.values.shape[0]
    if groups < 1 or n % groups:
        raise ValueError(f"{op}: groups is {groups}; allowed: divisors of {n} output channels")
    _check_stream(op, stream, gate, (x.values.shape[0], n), out_dtype, groups)
    more = low_rank, stream, gate
    return _linear(op, x, weight, bias, SCHEMES[scheme], out_dtype, impl, *more, groups=groups)


def _quantize(op, x, scheme, impl):
    refusal = _refusal(_width(x)) or rounding.refusal(scheme.dtype)
    auto = automatic(scheme.quantizers, refusal)
    return forward_only(choose(op, impl, scheme.quantizers, auto), NO_DERIVATIVE.format(op))(x)


def _linear(op, x, weight, bias, scheme, out_dtype, impl, *more, groups=1):
    table = bound(scheme.products, out_dtype=jnp.dtype(out_dtype), groups=groups)
    refusal = _refusal(x.values.shape[1])
    theirs = product_refusal(x.values, weight.values, out_dtype)
    if more and more[0] is not None:
        theirs = "a low-rank product is not within its rounding"
    auto = automatic(table, refusal, kernel=chosen(table, theirs, scheme.kernel))
    run = forward_only(choose(op, impl, table, auto), NO_DERIVATIVE.format(op))
    return run(x, weight, bias, *more)


def _width(x) -> int:
    """Columns of [m k], or of [g m k/g]."""
    return x.size // x.shape[-2]


def _refusal(k) -> str | None:
    """Why the kernels do not take rows of this width: they are read by whole warps."""
    return f"k is {k}, no multiple of {BLOCK}" if k % BLOCK else None


def _named(scheme: str) -> Scheme:
    if scheme not in SCHEMES:
        near = difflib.get_close_matches(scheme, SCHEMES, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"scheme is {scheme!r}; allowed: {', '.join(SCHEMES)}{hint}")
    return SCHEMES[scheme]


def _check_k(op, scheme, k):
    step = scheme.k_multiple
    if k % step:
        low = k // step * step
        nearest = f"{low} and {low + step}" if low else low + step
        raise ValueError(
            f"{op}: k is {k}; it must be a multiple of {step}, the width of a scale block; nearest:"
            f" {nearest}"
        )


def _check(op, scheme, x, weight, bias, x_scale=None):
    """Raise ValueError unless x [m k] and weight [n k] fit each other and the scheme, and bias is
    [n]."""
    if x.ndim != 2 or weight.values.ndim != 2 or x.shape[1] != weight.values.shape[1]:
        raise ValueError(
            f"{op}: x {x.shape}, weight {weight.values.shape}; expected [m k] and [n k]"
        )
    _check_k(op, scheme, x.shape[1])
    for name, values, scale in (("weight", *weight), ("x", x, x_scale)):
        expected = scheme.scale_shape(values.shape)
        if scale is not None and (values.dtype != scheme.dtype or scale.shape != expected):
            raise ValueError(
                f"{op}: {name} {values.dtype}, scale {scale.shape}; expected"
                f" {jnp.dtype(scheme.dtype)} and {expected}"
            )
    if bias is not None and bias.shape != weight.values.shape[:1]:
        raise ValueError(f"{op}: bias {bias.shape}; expected {weight.values.shape[:1]}")


def _check_low_rank(op, narrow, up, x, weight):
    """Raise ValueError unless narrow [m r] and up [n r] fit x [m k], weight [n k] and a kernel."""
    rank = narrow.shape[-1]
    shapes = (x.shape[0], rank), (weight.shape[0], rank)
    if (narrow.shape, up.shape) != shapes or narrow.dtype != up.dtype:
        raise ValueError(
            f"{op}: low_rank {narrow.dtype} {narrow.shape}, {up.dtype} {up.shape}; expected"
            f" {shapes[0]} and {shapes[1]} of one dtype"
        )
    if rank < 16 or rank != power_of_two(rank):
        raise ValueError(
            f"{op}: the rank of low_rank is {rank}; allowed: powers of two from 16; fill up with"
            f" zeros to {max(16, power_of_two(rank))}"
        )


def _check_stream(op, stream, gate, shape, out_dtype, groups):
    """Raise ValueError unless stream is `shape` and gate fits it."""
    if gate is not None and (stream is None or gate.shape != shape[1:]):
        given = "no stream" if stream is None else f"stream {stream.shape}"
        raise ValueError(
            f"{op}: gate {gate.shape}, {given}; expected {shape[1:]}, and a stream {shape}"
        )
    if stream is None:
        return
    if (stream.shape, stream.dtype) != (shape, jnp.dtype(out_dtype)) or groups > 1:
        raise ValueError(
            f"{op}: stream {stream.dtype} {stream.shape} in {groups} groups; expected"
            f" {jnp.dtype(out_dtype)} {shape} in 1"
        )
