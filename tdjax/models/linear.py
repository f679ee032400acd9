"""Linear layers, float and of 8 bits, and how each kind reads its input: quantised once for all
layers that read it.

A block never asks of what kind its layers are. The kind makes the input (`quantize_input`,
`residual_norm`, `gelu_quantized`), and every layer of the kind reads it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

from pallas_kernels import norm_modulate
from pallas_kernels.int8_matmul import (
    QTensor,
    dequantize,
    dequantize_rows,
    quantize_activations,
    quantize_weight,
    quantized_linear,
)
from pallas_kernels.primitives import EXACT
from tdjax.models.abstract import drawn
from tdjax.parallel.sharding import of_each_group, over_channels, over_samples, over_tokens
from tdjax.precision import Policy

PRODUCT = "linear_product"  # what `remat` may keep
xavier = jax.nn.initializers.xavier_uniform()


def product(x, kernel):  # [... i], [i o] -> [... o]
    """x kernel in x.dtype. The kernel's gradient is that of x.dtype for each device, summed over
    devices in the kernel's own."""
    # It is cast once for all that reads it, as devices give each other their parts of it.
    return checkpoint_name(_product(x, kernel, lax.stop_gradient(kernel.astype(x.dtype))), PRODUCT)


@jax.custom_jvp
def _product(x, kernel, cast):
    """x cast. Its derivative by the kernel is that of `of_each_group`; by the cast it has none."""
    return jnp.matmul(x, cast, precision=EXACT)


@partial(_product.defjvp, symbolic_zeros=True)
def _product_tangent(primals, tangents):
    (x, kernel, cast), (dx, dkernel, _) = primals, tangents
    y = _product(x, kernel, cast)
    if isinstance(dkernel, SymbolicZero):
        dy = jnp.zeros_like(y) if isinstance(dx, SymbolicZero) else _product(dx, kernel, cast)
        return y, dy
    dy = of_each_group(x, dkernel)
    return y, dy if isinstance(dx, SymbolicZero) else dy + _product(dx, kernel, cast)


class Activations(NamedTuple):
    """x in 8 bits: values [b l i], scale [b l] of each token or, in tiles, [(b l)/128 i/128]. dtype
    is that of x and of the products."""

    values: Any
    scale: Any
    dtype: Any


def _residual_norm(pick, x, factor, shift, residual, gate, **options):
    """pick(norm_modulate.norm(...)), tokens divided over the mesh."""

    def norm(x, factor, shift, y=None, gate=None):
        return pick(norm_modulate.norm(x, factor, shift, y=y, gate=gate, **options))

    vectors = lambda a: a if a is None or a.ndim == 3 else rearrange(a, "i -> 1 1 i")
    arrays = x, vectors(factor), vectors(shift), residual, vectors(gate)
    return over_tokens(norm, *(a for a in arrays if a is not None))


class _Layer(nnx.Module):
    """What the kinds have in common: `i` inputs, `o` outputs, a bias or none, and `impl` as in
    pallas_kernels. `draw(kernel, policy)` of a kind makes its leaves of kernel(dtype) [i o]."""

    def __init__(
        self,
        i: int,
        o: int,
        policy: Policy,
        *,
        rngs: nnx.Rngs,
        bias: bool = True,
        init=xavier,
        impl: str = "auto",
    ):
        self.impl = impl
        self.draw(lambda dtype: drawn(init, rngs, (i, o), dtype), policy)
        self.bias = nnx.Param(jnp.zeros(o, policy.param_dtype)) if bias else None


class Linear(_Layer):
    """x [... i] -> x kernel + bias [... o], in x.dtype."""

    leaves: ClassVar = ("kernel",)

    def draw(self, kernel, policy: Policy) -> None:
        self.kernel = nnx.Param(kernel(policy.param_dtype))

    def __call__(self, x):
        y = product(x, self.kernel[...])
        if self.bias is None:
            return y
        # Spread before it is cast: its gradient is summed in float32, over devices too.
        return y + jnp.broadcast_to(self.bias[...].astype(jnp.float32), y.shape).astype(x.dtype)

    def in_groups(self, x, groups: int):  # -> [groups b l o/groups]
        """Returns self(x) with its channels in groups of neighbours."""
        return rearrange(self(x), "b l (g o) -> g b l o", g=groups)

    def of_groups(self, x):  # [groups b l i/groups]
        """Returns self of x with its channels side by side."""
        return self(rearrange(x, "g b l i -> b l (g i)"))

    def onto(self, stream, x, gate):  # [b l o], [b l i], f32 [b 1 o] -> [b l o]
        """Returns stream + self(x) gate, the gate in the dtype of the stream."""
        return stream + self(x) * gate.astype(stream.dtype)

    def quantize_input(self, x):  # [b l i]
        """Returns x as the layer reads it: here as it is."""
        return x

    def gelu_quantized(self, x):  # [b l i]
        """Returns GELU (tanh form) of x as the layer reads it."""
        return jax.nn.gelu(x)

    @classmethod
    def residual_norm(cls, x, factor, shift, *, eps: float, residual=None, gate=None, impl: str):
        """Returns x + residual gate, and its layer norm times factor plus shift as layers of this
        kind read it: x and residual [b l i]; factor, shift and gate [i] or [b 1 i]."""
        pick = lambda out: (out.x, out.h)
        return _residual_norm(pick, x, factor, shift, residual, gate, eps=eps, impl=impl)

    @classmethod
    def unpacked(cls, kernel):  # [i o] -> float32 [o i]
        return rearrange(kernel.astype(jnp.float32), "i o -> o i")

    @classmethod
    def packed(cls, weight, dtype):  # the inverse, as a tuple of leaves
        return (rearrange(weight, "o i -> i o").astype(dtype),)


class QuantizedLinear(_Layer):
    """Linear of 8-bit weights [o i] on float x [b l i], or on activations that were quantised for
    another layer of the class. impl "mosaic" is the product's alone.

    A subclass names its scheme of `pallas_kernels.int8_matmul` and its two leaves, values and
    scale.
    """

    scheme: ClassVar[str]
    leaves: ClassVar = ("weight", "weight_scale")
    dequantize = staticmethod(dequantize_rows)
    # Factors of LoRA files beside the weights, where there are some: [r i] and [o r].
    low_rank_down: Any = None
    low_rank_up: Any = None
    # impl -> impl of the product, where the scheme has no kernel for it
    products: ClassVar[dict[str, str]] = {}

    def draw(self, kernel, policy: Policy) -> None:
        weight = rearrange(kernel(jnp.float32), "i o -> o i")
        for name, value in zip(self.leaves, self.packed(weight, None), strict=True):
            setattr(self, name, nnx.Variable(value))

    in_groups, of_groups, onto = Linear.in_groups, Linear.of_groups, Linear.onto

    def __call__(self, x):
        return self.multiplied(x, self.product, self.divided)

    def multiplied(self, x, product: Callable, divided: Callable, *outputs):
        """Returns self(x) by such a `product`, divided over a mesh by `divided`. outputs: what they
        take besides, if anything."""
        x, narrow, up = self.quantize_input(x), None, None
        if self.low_rank_up is not None:
            narrow, up = self.low_rank(x)
        weight = [getattr(self, name)[...] for name in self.leaves]
        bias = None if self.bias is None else self.bias[...]
        product = partial(product, dtype=x.dtype)
        return divided(product, (x.values, x.scale, narrow), (*weight, bias, up), *outputs)

    @jax.named_scope("lora")
    def low_rank(self, x: Activations):
        """Returns what the product takes besides: the values that it reads, times the narrow factor
        [b l r], and the other factor [o r]."""
        down, up = (a[...].astype(x.dtype) for a in (self.low_rank_down, self.low_rank_up))

        def narrowed(of_tokens, down):
            narrow = self.narrowed(self.rows(*of_tokens), down).astype(x.dtype)
            return rearrange(narrow, "(b l) r -> b l r", b=of_tokens[0].shape[0])

        return self.by_samples(narrowed, (x.values, x.scale), down), up

    @classmethod
    def narrowed(cls, rows: QTensor, down):  # [(b l) i], [r i] -> [(b l) r]
        """Activations times the narrow factor of a LoRA."""
        floats = cls.dequantize(rows).astype(down.dtype)
        return jnp.matmul(floats, down.T, precision=EXACT)

    def product(self, of_tokens, of_channels, onto=(), *, dtype, groups=1):
        """of_tokens: values, scale, narrow or None; of_channels: weight, its scale, bias or None,
        up or None; onto: nothing, or a stream [1 l o] and its gate f32 [1 1 o]. -> [b l o], or
        [groups b l o/groups]."""
        (values, scale, narrow), (weight, weight_scale, bias, up) = of_tokens, of_channels
        weight, impl = QTensor(weight, weight_scale), self.products.get(self.impl, self.impl)
        options = {"scheme": self.scheme, "out_dtype": dtype, "groups": groups, "impl": impl}
        if up is not None:
            options["low_rank"] = rearrange(narrow, "b l r -> (b l) r"), up
        if onto:
            stream, gate = onto
            options |= {"stream": stream[0], "gate": gate[0, 0]}
        y = quantized_linear(self.rows(values, scale), weight, bias, **options)
        return rearrange(y, "... (b l) o -> ... b l o", b=values.shape[0])

    @staticmethod
    def divided(op, of_tokens, of_channels):
        """op(of_tokens, of_channels), divided over a mesh by the compiler."""
        return op(of_tokens, of_channels)

    @staticmethod
    def by_samples(op, of_tokens, shared):
        """op(of_tokens, shared) of what is not divided by itself."""
        return op(of_tokens, shared)

    @staticmethod
    def rows(values, scale) -> QTensor:  # of Activations -> values [(b l) i]
        return QTensor(rearrange(values, "b l i -> (b l) i"), scale)

    @property
    def row_impl(self) -> str:
        """`impl` of what is not the product."""
        return "auto" if self.impl == "mosaic" else self.impl

    def quantize_input(self, x):
        """Returns x [b l i] as the layer reads it, quantised unless it is already."""
        return x if isinstance(x, Activations) else self.quantized(x, self.row_impl)

    def gelu_quantized(self, x):
        """Returns GELU (tanh form) of x [b l i], quantised."""
        return self.quantized(jax.nn.gelu(x), self.row_impl)

    @classmethod
    def residual_norm(cls, x, factor, shift, *, eps: float, residual=None, gate=None, impl: str):
        """See `Linear.residual_norm`; the norm is quantised."""
        pick = lambda out: (out.x, out.h)
        x, h = _residual_norm(pick, x, factor, shift, residual, gate, eps=eps, impl=impl)
        return x, cls.quantized(h, impl)

    @classmethod
    def quantized(cls, x, impl: str) -> Activations:  # [b l i]
        def quantize(of_tokens, _):
            rows = rearrange(of_tokens[0], "b l i -> (b l) i")
            values, scale = quantize_activations(rows, cls.scheme, impl=impl)
            return rearrange(values, "(b l) i -> b l i", b=of_tokens[0].shape[0]), scale

        return Activations(*cls.by_samples(quantize, (x,), ()), x.dtype)

    @classmethod
    def unpacked(cls, values, scale):  # -> float32 [o i]
        return cls.dequantize(QTensor(values, scale))

    @classmethod
    def packed(cls, weight, dtype):
        return tuple(quantize_weight(weight, cls.scheme))


class Int8Linear(QuantizedLinear):
    """int8 in tiles of 128 x 128 with a scale each, tiles of tokens running across the samples of a
    device: the published -quant files."""

    scheme = "block128"
    divided = staticmethod(over_samples)
    by_samples = staticmethod(over_samples)
    products: ClassVar = {"mosaic": "auto"}
    leaves = ("int8_weight", "scale")
    dequantize = staticmethod(dequantize)


class RowLinear(QuantizedLinear):
    """A scale for each token and for each output channel: norm and GELU give their rows quantised
    in the same pass."""

    divided = staticmethod(over_channels)

    def in_groups(self, x, groups):
        grouped = {"groups": groups}
        return self.multiplied(
            x, partial(self.product, **grouped), partial(self.divided, **grouped)
        )

    def onto(self, stream, x, gate):
        if len(stream) > 1:  # each sample has a gate of its own
            return super().onto(stream, x, gate)
        return self.multiplied(x, self.product, self.divided, (stream, gate))

    def of_groups(self, x):
        def quantize(x):
            options = {"groups": len(x), "impl": self.row_impl}
            rows = rearrange(x, "g b l i -> g (b l) i")
            return _by_token(quantize_activations(rows, self.scheme, **options), x[0])

        axes, ours = ("groups", "batch", "tokens"), ("batch", "tokens")
        quantized = over_tokens(quantize, x, axes=axes, out=(ours, ours))
        return self(Activations(*quantized, x.dtype))

    @staticmethod
    def rows(values, scale):
        return QTensor(rearrange(values, "b l i -> (b l) i"), rearrange(scale, "b l -> (b l)"))

    @classmethod
    def narrowed(cls, rows, down):
        """The scale of a row comes after the product: its 8-bit values are numbers of any float
        dtype, and no dequantised copy of the activations is written."""
        floats = rows.values.astype(down.dtype)
        y = jnp.matmul(floats, down.T, precision=EXACT, preferred_element_type=jnp.float32)
        return y * rows.scale[:, None]

    @classmethod
    def quantized(cls, x, impl):
        def quantize(x):
            rows = rearrange(x, "b l i -> (b l) i")
            return _by_token(quantize_activations(rows, cls.scheme, impl=impl), x)

        return Activations(*over_tokens(quantize, x), x.dtype)

    def gelu_quantized(self, x):
        gelu = partial(norm_modulate.gelu, scheme=self.scheme, impl=self.row_impl)
        return Activations(*over_tokens(lambda x: _by_token(gelu(x), x), x), x.dtype)

    @classmethod
    def residual_norm(cls, x, factor, shift, *, eps, residual=None, gate=None, impl):
        options = {"eps": eps, "floats": False, "scheme": cls.scheme, "impl": impl}
        pick = lambda out: (out.x, *_by_token(out.q, out.x))
        stream, *h = _residual_norm(pick, x, factor, shift, residual, gate, **options)
        return stream, Activations(*h, x.dtype)


def _by_token(rows: QTensor, x):
    """values [(b l) i], scale [(b l)] -> values [b l i], scale [b l], for the b of x [b l i]."""
    return tuple(rearrange(a, "(b l) ... -> b l ...", b=x.shape[0]) for a in rows)


class Int8ChannelLinear(RowLinear):
    """int8."""

    scheme = "channel"


class FP8Linear(RowLinear):
    """float8_e4m3fn. There is no Triton kernel for its product: XLA's is the tensor cores' own."""

    scheme = "fp8"
    products = {"triton": "xla", "interpret": "reference"}


LINEAR = {"float": Linear, "int8": Int8Linear, "int8_channel": Int8ChannelLinear, "fp8": FP8Linear}


class WeightOnlyLinear(nnx.Module):
    """A frozen linear layer of 8-bit weights whose product is computed in the dtype of x: unlike
    the kinds above it has a derivative by x."""

    def __init__(self, layer, kind: str):
        self.kind = kind
        for name in LINEAR[kind].leaves:
            setattr(self, name, getattr(layer, name))
        self.bias = layer.bias

    def __call__(self, x):  # [... i] -> [... o]
        leaves = [getattr(self, name)[...] for name in LINEAR[self.kind].leaves]
        weight = LINEAR[self.kind].unpacked(*leaves).astype(x.dtype)  # [o i]
        y = jnp.einsum("...i,oi->...o", x, weight, precision=EXACT)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)

    quantize_input = Linear.quantize_input
    gelu_quantized = Linear.gelu_quantized
    in_groups, of_groups, onto = Linear.in_groups, Linear.of_groups, Linear.onto


class AdaptedLinear(nnx.Module):
    """A frozen linear layer with a trained product of two narrow ones beside it."""

    def __init__(self, layer, down, up, scale: float):
        self.layer = layer
        self.down = nnx.Param(down)  # [i r]
        self.up = nnx.Param(up)  # [r o]
        self.scale = scale

    def __call__(self, x):  # [... i] -> [... o]
        change = product(product(x, self.down[...]), self.up[...])
        return self.layer(x) + self.scale * change

    in_groups, of_groups, onto = Linear.in_groups, Linear.of_groups, Linear.onto

    def quantize_input(self, x):
        return self.layer.quantize_input(x)

    def gelu_quantized(self, x):
        return self.layer.gelu_quantized(x)


@partial(jax.jit, static_argnames=("old", "new", "dtype"))
def converted(leaves: tuple, *, old: str, new: str, dtype) -> tuple:
    """The leaves [n ...] of a stacked layer of kind `old` as those of kind `new` (a float kernel in
    dtype), one layer at a time."""
    return lax.map(lambda leaves: LINEAR[new].packed(LINEAR[old].unpacked(*leaves), dtype), leaves)
