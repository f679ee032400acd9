"""Norm, rotation and block means of queries and keys in plain JAX: the specification."""

from __future__ import annotations

import jax.numpy as jnp
from einops import rearrange
from jax import lax

from pallas_kernels.blocking import block_means


def rms_norm_rope(x, weight, cos, sin, *, eps, groups):
    """x / rms(x) * weight over all heads together, then channel pairs (2j, 2j+1) rotated; float32
    inside, one rounding. x [b l d], weight [d], cos sin f32 [l k/2] -> [b l h k], or [groups b l
    h/groups k]."""
    return in_groups(_rotated(x, weight, cos, sin, eps), groups)


def in_groups(y, groups):  # [b l h k] -> itself, or [groups b l h/groups k]
    """Heads that lie together, group by group."""
    return y if groups == 1 else rearrange(y, "b l (g h) k -> g b l h k", g=groups)


def _rotated(x, weight, cos, sin, eps):  # -> [b l h k]
    y = x.astype(jnp.float32)
    y = y * lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + eps) * weight.astype(jnp.float32)
    a, b = rearrange(y, "b l (h k two) -> two b l h k", k=cos.shape[1], two=2)
    cos, sin = cos[:, None], sin[:, None]
    y = rearrange([a * cos - b * sin, b * cos + a * sin], "two b l h k -> b l h (k two)")
    return y.astype(x.dtype)


def rms_norm_rope_pool(x, weight, cos, sin, *, eps, block, groups):  # and f32 [b h n k]
    """`rms_norm_rope`, and the mean of each block of its rounded tokens."""
    y = _rotated(x, weight, cos, sin, eps)
    return in_groups(y, groups), block_means(y, block)
