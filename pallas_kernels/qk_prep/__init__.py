"""Queries and keys on their way from the projections to sparse attention: RMS norm, rotation, block
means, int8 keys.

Every `impl` is "auto", "reference", "triton" or "interpret"; "auto" is the kernels on CUDA, for the
sizes that they take (`triton.refusal`), and the reference elsewhere. Differentiated, rms_norm_rope
and rms_norm_rope_pool are the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.derivatives import forward_only
from pallas_kernels.dispatch import automatic, choose
from pallas_kernels.qk_prep import reference, triton

__all__ = ["quantize_keys", "rms_norm_rope", "rms_norm_rope_pool"]

NO_DERIVATIVE = "quantize_keys is forward only: rounding to int8 has no useful derivative."


def table(plain: Callable, kernel: Callable) -> dict[str, Callable]:
    return {
        "reference": plain,
        "triton": partial(kernel, interpret=False),
        "interpret": partial(kernel, interpret=True),
    }


ROPE = table(reference.rms_norm_rope, triton.rms_norm_rope)
ROPE_POOL = table(reference.rms_norm_rope_pool, triton.rms_norm_rope_pool)
KEYS = table(reference.quantize_keys, triton.quantize_keys)


def rms_norm_rope(
    x, weight, cos, sin, *, eps: float, impl: str = "auto"
):  # x [b l d], weight [d], tables [l k/2] -> [b l h k]
    """x / rms(x) * weight over all heads together, then channel pairs (2j, 2j+1) of each head
    rotated by their angles.

    cos and sin are float32 and give the head width k. Float32 inside and one rounding to x.dtype at
    the end, where a norm followed by a rotation rounds twice (thu-ml/TurboDiffusion
    rcm/networks/wan2pt1.py). Differentiable in both modes.
    """
    check(x, weight, cos, sin)
    return differentiable("rms_norm_rope", impl, ROPE, (2 * cos.shape[1],), eps=eps)(
        x, weight, cos, sin
    )


def rms_norm_rope_pool(
    x, weight, cos, sin, *, eps: float, block: int, impl: str = "auto"
):  # -> [b l h k], f32 [b h n k]
    """`rms_norm_rope`, and the mean of each block of `block` rounded tokens; the tail block is
    averaged over its own length.

    The means are what the block map of sparse attention is made of (arXiv 2509.24006).
    """
    check(x, weight, cos, sin)
    return differentiable(
        "rms_norm_rope_pool", impl, ROPE_POOL, (2 * cos.shape[1],), eps=eps, block=block
    )(x, weight, cos, sin)


def quantize_keys(
    k, mean, *, block: int, impl: str = "auto"
):  # k [b l h k], mean f32 [b h k] -> int8 [b l h k], f32 [b h n]
    """k - mean in int8, and the scale of each block of each head: amax/127, nearest even
    (SageAttention, arXiv 2410.02367)."""
    if k.ndim != 4 or mean.shape != (k.shape[0], *k.shape[2:]) or mean.dtype != jnp.float32:
        raise ValueError(
            f"quantize_keys: k {k.shape}, mean {mean.dtype} {mean.shape}; expected [b l h k] and"
            " float32 [b h k]"
        )
    return forward_only(
        named("quantize_keys", impl, KEYS, (k.shape[3], block), block=block), NO_DERIVATIVE
    )(k, mean)


def named(
    name: str, impl: str, impls: dict[str, Callable], powers: tuple[int, ...], **sizes
) -> Callable:
    """The implementation called `impl`; powers: sizes that the kernel wants to be powers of two."""
    ready = {key: partial(function, **sizes) for key, function in impls.items()}
    refusal = next(filter(None, map(triton.refusal, powers)), None)
    return choose(
        name,
        impl,
        ready,
        automatic(ready["triton"], ready["reference"], refusal, derivative=ready["reference"]),
    )


def differentiable(
    name: str, impl: str, impls: dict[str, Callable], powers: tuple[int, ...], **sizes
) -> Callable:
    """`named`, with the derivatives of the reference."""
    op = jax.custom_jvp(named(name, impl, impls, powers, **sizes))
    op.defjvp(lambda args, tangents: jax.jvp(partial(impls["reference"], **sizes), args, tangents))
    return op


def check(x, weight, cos, sin):
    """Raise ValueError unless x [b l d], weight [d] and float32 tables [l k/2] fit together, d in
    whole heads of width k."""
    fits = (
        x.ndim == 3
        and cos.ndim == 2
        and cos.shape == sin.shape
        and cos.shape[0] == x.shape[1]
        and weight.shape == x.shape[2:]
    )
    if not fits or x.shape[2] % (2 * cos.shape[1]) or not cos.dtype == sin.dtype == jnp.float32:
        raise ValueError(
            f"rms_norm_rope: x {x.shape}, weight {weight.shape}, cos {cos.dtype} {cos.shape}, sin"
            f" {sin.dtype} {sin.shape}; expected [b l d], [d] and float32 [l k/2] with d a multiple"
            " of the head width k"
        )
