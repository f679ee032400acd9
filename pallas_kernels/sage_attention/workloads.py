"""Real shapes of `quantize_keys`: the keys of one layer, all heads, head width 128. Attention with
int8 scores has the shapes of flash_attention and of sparse_attention."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.primitives import blocks
from pallas_kernels.workload import Workload

WIDTH, BLOCK = 128, 64
SHAPES = {"wan1.3b_480p": (32760, 12), "wan14b_720p": (75600, 40)}  # tokens, heads


def keys(l: int, h: int) -> Workload:
    """Arguments of `quantize_keys` with block 64: keys with a mean to take off, and that mean."""

    def make(key):
        key_k, key_mean = jax.random.split(key)
        mean = 3 * jax.random.normal(key_mean, (1, h, WIDTH))
        k = (jax.random.normal(key_k, (1, l, h, WIDTH)) + mean[:, None]).astype(jnp.bfloat16)
        return k, k.mean(1, dtype=jnp.float32)

    elements = l * h * WIDTH
    scales = h * blocks(l, BLOCK)
    return Workload(make, flops=4 * elements, bytes=3 * elements + 4 * (h * WIDTH + scales))


KEYS = {name: keys(*shape) for name, shape in SHAPES.items()}
