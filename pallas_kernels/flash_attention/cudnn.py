"""Dense attention by cuDNN, with the tangent that cuDNN lacks taken from the reference or from the
Triton kernel."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange

from pallas_kernels.derivatives import with_derivatives
from pallas_kernels.flash_attention import reference, triton
from pallas_kernels.flash_attention.tangent import tangent
from pallas_kernels.primitives import LOG2E

MAX_WIDTH = 128


def refusal(q) -> str | None:
    """Why cuDNN does not take these heads; None if it does."""
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN attention takes bfloat16 and float16, not {q.dtype}"
    if q.shape[-1] % 8 or q.shape[-1] > MAX_WIDTH:
        return (
            f"cuDNN attention takes head widths that are multiples of 8 up to {MAX_WIDTH}, not"
            f" {q.shape[-1]}"
        )
    return None


def attention(q, k, v, *, scale=None):  # q [b l h k], k v [b s h k]
    """The same function as the reference; raises ValueError with the reason where cuDNN has no
    kernel."""
    reason = refusal(q)
    if reason:
        raise ValueError(f'attention: {reason}; use impl="reference"')
    run = partial(fused, scale=scale)
    return with_derivatives(
        lambda *args: (run(*args), None),
        tangent=lambda args, _, tangents: jax.jvp(
            partial(reference.attention, scale=scale), args, tangents
        )[1],
        grad=lambda args, _, cotangent: jax.vjp(run, *args)[1](cotangent),
    )(q, k, v)


def with_triton_tangent(q, k, v, *, scale=None, interpret=False):  # q [b l h k], k v [b s h k]
    """cuDNN's forward pass and gradient; the Triton kernel's tangent, which starts from cuDNN's
    output and statistics."""
    reason = refusal(q) or triton.refusal(q, scale)
    if reason:
        raise ValueError(f'attention: {reason}; use impl="reference"')
    push = triton.bind(q, scale, interpret)(tangent, "tangent")
    run = partial(fused, scale=scale, return_residual=True)

    def forward(*args):
        o, lse = run(*args)  # lse [b l h], natural logarithm, bfloat16
        return o, (o, rearrange(lse.astype(jnp.float32), "b l h -> b h l") * LOG2E)

    return with_derivatives(
        forward,
        tangent=lambda args, saved, tangents: push(*args, *saved, *tangents),
        grad=lambda args, _, cotangent: jax.vjp(lambda *args: run(*args)[0], *args)[1](cotangent),
    )(q, k, v)


def fused(q, k, v, scale, **more):
    with jax.numpy_dtype_promotion("standard"):  # inside, jax.nn mixes dtypes
        return jax.nn.dot_product_attention(q, k, v, scale=scale, implementation="cudnn", **more)
