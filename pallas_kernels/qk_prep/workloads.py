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


WORKLOADS = {name: rows(*shape) for name, shape in SHAPES.items()}
