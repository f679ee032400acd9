"""Norm, rotation and int8 rounding of queries and keys in plain JAX: the specification."""

from __future__ import annotations

import jax.numpy as jnp
from einops import rearrange
from jax import lax

from pallas_kernels.sage_attention.quantize import quantize_blocks
from pallas_kernels.sparse_attention.reference import blocked, counts, unblocked


def rms_norm_rope(
    x, weight, cos, sin, *, eps
):  # x [b l d], weight [d], cos sin f32 [l k/2] -> [b l h k]
    """x / rms(x) * weight over all heads together, then channel pairs (2j, 2j+1) rotated; float32
    inside, one rounding."""
    y = x.astype(jnp.float32)
    y = y * lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + eps) * weight.astype(jnp.float32)
    a, b = rearrange(y, "b l (h k two) -> two b l h k", k=cos.shape[1], two=2)
    cos, sin = cos[:, None], sin[:, None]
    return rearrange([a * cos - b * sin, b * cos + a * sin], "two b l h k -> b l h (k two)").astype(
        x.dtype
    )


def rms_norm_rope_pool(x, weight, cos, sin, *, eps, block):  # -> [b l h k], f32 [b h n k]
    """`rms_norm_rope`, and the mean of each block of its rounded tokens; the tail block is averaged
    over its own length."""
    y = rms_norm_rope(x, weight, cos, sin, eps=eps)
    return y, blocked(y, block).sum(3, dtype=jnp.float32) / counts(y.shape[1], block)[:, None]


def quantize_keys(
    k, mean, *, block
):  # k [b l h k], mean f32 [b h k] -> int8 [b l h k], f32 [b h n]
    """k - mean in float32, rounded by `quantize_blocks`; tokens past the end count as zeros."""
    values, scale = quantize_blocks(blocked(k.astype(jnp.float32) - mean[:, None], block))
    return unblocked(values, k.shape[1]), scale
