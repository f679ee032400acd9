"""Norms and the time sinusoid, shared by the networks: float32 inside, one rounding at the end."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax import lax

from tdjax.precision import Policy


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last axis; float32 inside, one rounding at the end."""

    def __init__(self, d: int, eps: float, policy: Policy):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(d, policy.param_dtype))

    def __call__(self, x):  # float32 island
        y = x.astype(jnp.float32)
        y = y * lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + self.eps)
        return (y * self.scale[...].astype(jnp.float32)).astype(x.dtype)


class LayerNorm(nnx.Module):
    """Layer norm with scale and bias; float32 inside, one rounding at the end."""

    def __init__(self, d: int, eps: float, policy: Policy):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(d, policy.param_dtype))
        self.bias = nnx.Param(jnp.zeros(d, policy.param_dtype))

    def __call__(self, x):  # float32 island
        y = layer_norm(x.astype(jnp.float32), self.eps) * self.scale[...].astype(jnp.float32)
        return (y + self.bias[...].astype(jnp.float32)).astype(x.dtype)


def layer_norm(x, eps):  # float32
    """(x - mean) / sqrt(var + eps) over the last axis, without parameters."""
    x = x - jnp.mean(x, -1, keepdims=True)
    return x * lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + eps)


def modulate(x, scale, shift, eps):  # float32 island: x [b l d], scale and shift f32 [b 1 d]
    """layer_norm(x) (1 + scale) + shift, rounded once to x.dtype."""
    return (layer_norm(x.astype(jnp.float32), eps) * (1 + scale) + shift).astype(x.dtype)


def sinusoid(t, width: int, period: float = 10000.0):  # t f32 [b] in 0..4095 -> f32 [b width]
    """cat(cos, sin) of t * period^(-i/half), i = 0..half-1; within 1e-6 of the float64 value in
    float32.

    A float32 product t * frequency would be off by 3e-5 at t = 1000. Here the frequency, in turns,
    is split so that its products with the whole part of t are exact, and whole turns are removed
    before the sum.
    """
    half = width // 2
    turns = period ** (-np.arange(half) / half) / (2 * math.pi)
    high = _leading(turns)
    middle = _leading(turns - high)
    low = turns - high - middle
    high, middle, low, turns = (x.astype(np.float32) for x in (high, middle, low, turns))
    t = rearrange(t.astype(jnp.float32), "b -> b 1")
    whole = jnp.floor(t)
    phase = whole * high
    phase = (phase - jnp.round(phase)) + whole * middle + whole * low + (t - whole) * turns
    angle = phase * np.float32(2 * math.pi)
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], -1)


def _leading(x: np.ndarray) -> np.ndarray:
    """x cut to its 12 leading bits, so that its product with a whole number below 4096 is exact in
    float32."""
    mantissa, exponent = np.frexp(x)
    return np.ldexp(np.trunc(mantissa * 4096) / 4096, exponent)
