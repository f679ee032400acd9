"""Dense attention by cuDNN, with the tangent that cuDNN lacks taken from the reference."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.derivatives import with_derivatives
from pallas_kernels.flash_attention import reference

MAX_WIDTH = 128


def refusal(q) -> str | None:
    """Why cuDNN does not take these heads; None if it does."""
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN attention takes bfloat16 and float16, not {q.dtype}"
    if q.shape[-1] % 8 or q.shape[-1] > MAX_WIDTH:
        return f"cuDNN attention takes head widths that are multiples of 8 up to {MAX_WIDTH}, not {q.shape[-1]}"
    return None


def attention(q, k, v, *, scale=None):  # q [b l h k], k v [b s h k]
    """The same function as the reference; raises ValueError with the reason where cuDNN has no kernel."""
    reason = refusal(q)
    if reason:
        raise ValueError(f'attention: {reason}; use impl="reference"')
    run = partial(fused, scale=scale)
    return with_derivatives(
        lambda *args: (run(*args), None),
        tangent=lambda args, _, tangents: jax.jvp(partial(reference.attention, scale=scale), args, tangents)[1],
        grad=lambda args, _, cotangent: jax.vjp(run, *args)[1](cotangent),
    )(q, k, v)


def fused(q, k, v, scale):
    with jax.numpy_dtype_promotion("standard"):  # inside, jax.nn mixes dtypes
        return jax.nn.dot_product_attention(q, k, v, scale=scale, implementation="cudnn")
