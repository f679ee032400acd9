"""The causal convolution of 3 x 3 x 3 taps of a video VAE with what stands before it and after it:
norm, SiLU, convolution, and what is added.

On Hopper pairs of frames are convolved together with two thirds of the products (`winograd`): a
Triton kernel combines frames, a Mosaic GPU kernel multiplies them. The reference is the direct
form.
"""

from __future__ import annotations

from functools import partial

import jax.numpy as jnp

from pallas_kernels.causal_conv import reference, winograd
from pallas_kernels.dispatch import automatic, choose
from pallas_kernels.mosaic import at_hand, imported, unavailable

__all__ = ["IMPLEMENTATIONS", "causal_conv", "refusal"]

KERNEL = imported("causal_conv", "causal_conv")
IMPLEMENTATIONS = {
    "causal_conv": {
        "reference": reference.causal_conv,
        "mosaic": partial(KERNEL, interpret=False),
        "interpret": partial(KERNEL, interpret=True),
    }
}


def causal_conv(x, past, gain, kernel, bias, plus=None, *, impl: str = "auto"):
    """(y [b t h w o], the next past [b 2 h w i]): y sees its own and the two earlier frames of
    silu(unit_norm(x, gain)), or of x without a gain, zeros beside them in space; `plus` is added.

    x [b t h w i]; past [b 2 h w i]: what is convolved of the two frames before x; gain [i]; kernel
    [3 3 3 i o]; bias [o]; plus [b t h w o]. Sums are float32, rounded once to x.dtype; the kernels
    round combinations of frames and of taps to x.dtype (see `winograd`). impl: "auto" (the kernels
    on Hopper for what they take, `refusal`; the reference elsewhere, and wherever it is
    differentiated), "reference", "mosaic", "interpret". ValueError for shapes that do not fit each
    other.
    """
    _check(x, past, gain, kernel, bias, plus)
    table = IMPLEMENTATIONS["causal_conv"]
    auto = automatic(table, refusal(x, past, kernel), kernel="mosaic", derivative="reference")
    return choose("causal_conv", impl, table, auto)(x, past, gain, kernel, bias, plus)


def refusal(x, past, kernel) -> str | None:
    """Returns why "auto" is not the kernels for these arguments, here; None if it is."""
    if not at_hand():
        return unavailable() or "no GPU is at hand"
    return winograd.refusal(x, past, kernel)


def _check(x, past, gain, kernel, bias, plus):
    """Raise ValueError unless shapes and dtypes fit each other."""
    b, t, h, w, i = x.shape if x.ndim == 5 else (0,) * 5
    o = kernel.shape[-1]
    expected = {
        "x": (x, (b, t, h, w, i), x.dtype),
        "past": (past, (b, 2, h, w, i), x.dtype),
        "gain": (gain, (i,), None),
        "kernel": (kernel, (3, 3, 3, i, o), None),
        "bias": (bias, (o,), None),
        "plus": (plus, (b, t, h, w, o), None),
    }
    for name, (array, shape, dtype) in expected.items():
        if array is None and name in ("gain", "plus"):
            continue
        given = None if array is None else (array.dtype, array.shape)
        wanted = jnp.dtype(dtype or getattr(array, "dtype", x.dtype))
        if given != (wanted, shape):
            given = "None" if given is None else f"{given[0]} {given[1]}"
            raise ValueError(
                f"causal_conv: {name} is {given}; expected {wanted} {shape}: x [b t h w i], past"
                " [b 2 h w i], kernel [3 3 3 i o], plus [b t h w o]"
            )
