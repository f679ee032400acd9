"""The op in plain JAX: the specification. float32 inside, one rounding of y."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp


def unit_norm(x, gain):  # [... c], [c] -> f32 [... c]
    """Unit length over channels times sqrt(c) times the gain."""
    x = x.astype(jnp.float32)
    squares = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    length = jnp.sqrt(jnp.maximum(squares, 1e-24))  # with a derivative at zero too
    return x / length * math.sqrt(x.shape[-1]) * gain.astype(x.dtype)


def norm_silu(x, gain):  # [... c], [c] -> [... c]
    return jax.nn.silu(unit_norm(x, gain)).astype(x.dtype)


def temporal_unfold(x, past, gain):  # [b t n c], [b 2 n c], [c] -> [b t n 3c], [b 2 n c]
    y = x if gain is None else norm_silu(x, gain)
    b, t, n, c = x.shape
    y = jnp.concatenate([jnp.zeros((b, 2, n, c), x.dtype) if past is None else past, y], axis=1)
    return jnp.concatenate([y[:, i : i + t] for i in range(3)], axis=-1), y[:, -2:]
