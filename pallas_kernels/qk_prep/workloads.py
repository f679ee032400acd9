"""Real shapes: the queries or the keys of one layer, all heads, head width 128."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.workload import Workload

WIDTH, BLOCK = 128, 64
SHAPES = {"wan1.3b_480p": (32760, 12), "wan14b_720p": (75600, 40)}  # tokens, heads


def rows(l: int, h: int) -> Workload:
    """Arguments of `rms_norm_rope_pool` with eps 1e-6 and block 64: x, weight, cos, sin."""

    def make(key):
        key_x, key_weight, key_angle = jax.random.split(key, 3)
        angle = jax.random.uniform(key_angle, (l, WIDTH // 2), maxval=6.28)
        x = jax.random.normal(key_x, (1, l, h * WIDTH), jnp.bfloat16)
        return (
            x,
            1 + 0.1 * jax.random.normal(key_weight, (h * WIDTH,)),
            jnp.cos(angle),
            jnp.sin(angle),
        )

    elements = l * h * WIDTH
    means = h * -(-l // BLOCK) * WIDTH
    return Workload(
        make, flops=8 * elements, bytes=4 * elements + 4 * (l * WIDTH + h * WIDTH + means)
    )


def keys(l: int, h: int) -> Workload:
    """Arguments of `quantize_keys` with block 64: keys with a mean to take off, and that mean."""

    def make(key):
        key_k, key_mean = jax.random.split(key)
        mean = 3 * jax.random.normal(key_mean, (1, h, WIDTH))
        k = (jax.random.normal(key_k, (1, l, h, WIDTH)) + mean[:, None]).astype(jnp.bfloat16)
        return k, k.mean(1, dtype=jnp.float32)

    elements = l * h * WIDTH
    return Workload(make, flops=4 * elements, bytes=3 * elements + 4 * h * (WIDTH + -(-l // BLOCK)))


WORKLOADS = {name: rows(*shape) for name, shape in SHAPES.items()}
KEYS = {name: keys(*shape) for name, shape in SHAPES.items()}
