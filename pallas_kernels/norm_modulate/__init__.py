"""Row ops between the products of a transformer block: residual sum, norm and modulation; GELU;
each with its quantisation.

float32 inside, one rounding at each output. impl: "auto" (the kernel on CUDA, for widths that are
multiples of 128; elsewhere the reference), "reference", "triton", "interpret". scheme: "channel"
(int8) or "fp8" of `pallas_kernels.int8_matmul`, whose `quantize_activations` quantises rows alone.
A row with a NaN or an infinity gets a scale that is not finite; other rows are untouched.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from einops import rearrange

from pallas_kernels import rounding
from pallas_kernels.derivatives import forward_only
from pallas_kernels.dispatch import automatic, bound, choose, implementations
from pallas_kernels.norm_modulate import reference, triton
from pallas_kernels.quantized import ROW_SCHEMES, QTensor

__all__ = ["IMPLEMENTATIONS", "Normed", "gelu", "norm"]

IMPLEMENTATIONS = {
    "norm": implementations(reference.norm, triton.norm),
    "gelu": implementations(reference.gelu, triton.gelu),
}
NO_DERIVATIVE = (
    "norm_modulate.{} is forward only where it quantises or runs a kernel. Differentiate the float"
    ' model: with_linear(model, "float"), impl="auto" or "reference" and no scheme.'
)


class Normed(NamedTuple):
    """The stream x + y gate [b l d], its norm h [b l d] or None, and h quantised by row, values [(b
    l) d], or None."""

    x: object
    h: object
    q: QTensor | None


def norm(
    x,
    factor,
    shift,
    *,
    y=None,
    gate=None,
    eps: float,
    floats: bool = True,
    scheme: str | None = None,
    impl: str = "auto",
) -> Normed:
    """h = layer_norm(x + y gate) factor + shift over the last axis: x y [b l d]; factor, shift,
    gate [d] or [b 1 d], float32 inside.

    The sum is rounded to x.dtype and the norm is that of the rounded sum: what separate ops would
    give, but for the rounding of the gate and of y gate. h is rounded once, to x.dtype (`floats`)
    and, from float32 again, to 8 bits (`scheme`). factor is 1 + scale of a modulation, or the
    weight of a norm with parameters; the variance is the true one.
    """
    b, _, d = _check("norm", x, floats, scheme)
    unlike_x = y is not None and (y.shape != x.shape or y.dtype != x.dtype)
    if unlike_x or (gate is not None and y is None):
        given = "no y" if y is None else f"y {y.dtype} {y.shape}"
        raise ValueError(
            f"norm: x {x.dtype} {x.shape}, {given}; expected y of the shape and dtype of x, and a"
            " gate only with y"
        )
    named = (("gate", gate), ("factor", factor), ("shift", shift))
    vectors = [_sample_rows(name, a, b, d) for name, a in named]
    dtype = ROW_SCHEMES.get(scheme)
    run = _chosen("norm", impl, d, dtype, eps=eps, floats=floats)
    if impl not in ("auto", "reference") or scheme:
        run = forward_only(run, NO_DERIVATIVE.format("norm"))
    return Normed(*run(x, y, *vectors))


def gelu(x, *, scheme: str, impl: str = "auto") -> QTensor:
    """GELU (tanh form) of x [b l d], quantised by row from float32: values [(b l) d], scale [(b
    l)]."""
    _, _, d = _check("gelu", x, False, scheme)
    run = _chosen("gelu", impl, d, ROW_SCHEMES[scheme])
    return forward_only(run, NO_DERIVATIVE.format("gelu"))(x)


def _chosen(name: str, impl: str, width: int, dtype, **options) -> Callable:
    """The implementation called `impl`; differentiated, "auto" is the reference."""
    table = bound(IMPLEMENTATIONS[name], dtype=dtype, **options)
    refusal = rounding.refusal(dtype)
    if width % 128:
        refusal = f"width {width} is not a multiple of 128"
    return choose(name, impl, table, automatic(table, refusal, derivative="reference"))


def _check(op, x, floats, scheme):
    """Raise ValueError unless x is [b l d] and an output is asked for; -> (b, l, d)."""
    if x.ndim != 3:
        raise ValueError(f"{op}: x {x.shape}; expected [b l d]")
    if scheme not in ROW_SCHEMES and (scheme or not floats):
        raise ValueError(
            f"{op}: scheme is {scheme!r}; a row has one scale in {', '.join(ROW_SCHEMES)}; block128"
            " quantises tiles"
        )
    return x.shape


def _sample_rows(name, a, b, d):  # [d] or [1 or b, 1, d] -> float32 [1 or b, d]
    if a is None:
        return None
    if a.shape not in {(d,), (1, 1, d), (b, 1, d)}:
        raise ValueError(f"norm: {name} {a.shape}; expected {(d,)} or {(b, 1, d)}")
    return rearrange(a, "... d -> (...) d").astype(jnp.float32)
