"""int8 queries and keys with one float32 scale for each block of tokens of each head."""

from __future__ import annotations

import jax.numpy as jnp

FLOOR = 1e-7  # least amax of a block


def quantize_blocks(x):  # f32 [b h n m k] -> int8 of the same shape, f32 [b h n]
    """scale = amax/127, nearest even; the symmetric range -127..127."""
    scale = jnp.maximum(jnp.abs(x).max((3, 4)), FLOOR) / 127
    return jnp.round(x / scale[..., None, None]).astype(jnp.int8), scale
