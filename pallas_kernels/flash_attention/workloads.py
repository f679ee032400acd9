"""Real shapes of dense attention: self-attention of the video tokens, and cross-attention to the
512 text tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.workload import Workload


def workload(l: int, s: int, h: int, k: int = 128) -> Workload:
    """The forward pass of one clip, q [1 l h k], k v [1 s h k] bfloat16. A tangent does 3.5 times
    its products (ours, given o and lse, 2.5 more), a gradient at least 2.5 times."""

    def make(key):
        shapes = (1, l, h, k), (1, s, h, k), (1, s, h, k)
        return tuple(
            jax.random.normal(key, shape, jnp.bfloat16)
            for key, shape in zip(jax.random.split(key, 3), shapes, strict=True)
        )

    return Workload(make=make, flops=4.0 * l * s * h * k, bytes=2.0 * 2 * (l + s) * h * k)


WORKLOADS = {
    "wan1.3b_480p": workload(32760, 32760, 12),
    "wan14b_720p": workload(75600, 75600, 40),
    "wan1.3b_480p_text": workload(32760, 512, 12),
    "wan14b_720p_text": workload(75600, 512, 40),
}
