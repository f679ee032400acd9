"""Norm and SiLU before a convolution, in plain JAX and in kernels."""

from __future__ import annotations

import math
from functools import reduce

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.primitives import LOG2E, exp2, reciprocal


def unit_norm(x, gain):  # [... c], [c] -> f32 [... c]
    """Unit length over channels times sqrt(c) times the gain."""
    x = x.astype(jnp.float32)
    squares = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    length = jnp.sqrt(jnp.maximum(squares, 1e-24))  # with a derivative at zero too
    return x / length * math.sqrt(x.shape[-1]) * gain.astype(x.dtype)


def norm_silu(x, gain):  # [... c], [c] -> [... c]
    return jax.nn.silu(unit_norm(x, gain)).astype(x.dtype)


def activated(xs, gains, c, interpret):
    """silu(unit_norm(x, gain)) in a kernel: parts [p ..], [..] -> float32 parts."""
    xs = [x.astype(jnp.float32) for x in xs]
    squares = reduce(jnp.add, [(x * x).sum(1, keepdims=True) for x in xs])
    factor = math.sqrt(c) * lax.rsqrt(jnp.maximum(squares, 1e-24))
    ys = [x * factor * gain for x, gain in zip(xs, gains, strict=True)]
    return [y * reciprocal(1 + exp2(y * -LOG2E, interpret), interpret) for y in ys]
