"""Norm, rotation and block means of queries and keys in plain JAX: the specification."""

from __future__ import annotations

import jax.numpy as jnp
from einops import rearrange
from jax import lax

from pallas_kernels.blocking import block_means


def rms_norm_rope(x, weight, cos, sin, *, eps):
    """x / rms(x) * weight over all heads together, then channel pairs (2j, 2j+1) rotated; float32
    inside, one rounding. x [b l d], weight [d], cos sin f32 [l k/2] -> [b l h k]."""
    y = x.astype(jnp.float32)
    y = y * lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + eps) * weight.astype(jnp.float32)
    a, b = rearrange(y, "b l (h k two) -> two b l h k", k=cos.shape[1], two=2)
    cos, sin = cos[:, None], sin[:, None]
    y = rearrange([a * cos - b * sin, b * cos + a * sin], "two b l h k -> b l h (k two)")
    return y.astype(x.dtype)


def rms_norm_rope_pool(x, weight, cos, sin, *, eps, block):  # -> [b l h k], f32 [b h n k]
    """`rms_norm_rope`, and the mean of each block of its rounded tokens."""
    y = rms_norm_rope(x, weight, cos, sin, eps=eps)
    return y, block_means(y, block)
