"""Real shapes: four frames at full size, the widest layer of the VAE of Wan2.1 that comes before a
convolution."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.workload import Workload


def frames(t: int, h: int, w: int, c: int) -> Workload:
    """x, past, gain of `temporal_unfold`. A caller that keeps `past`, as a bench does, has it
    copied in this time."""

    def make(key):
        keys = jax.random.split(key, 3)
        shapes = (1, t, h, w, c), (1, 2, h, w, c), (c,)
        return tuple(
            jax.random.normal(key, shape, jnp.bfloat16)
            for key, shape in zip(keys, shapes, strict=True)
        )

    return Workload(
        make=make, flops=10.0 * t * h * w * c, bytes=2.0 * (t + 2 + 3 * t + 2) * h * w * c
    )


WORKLOADS = {"wan_vae_480p": frames(4, 480, 832, 96), "wan_vae_720p": frames(4, 720, 1280, 96)}
