"""Real shapes: a chunk of four frames at the levels of the VAE of Wan2.1 that have most of the
work, with what is added to the second convolution of a residual block."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.workload import Workload


def level(t: int, h: int, w: int, c: int) -> Workload:
    """x, past, gain, kernel, bias, plus of `causal_conv`; flops are those of the direct form. A
    caller that keeps `past`, as a bench does, has it copied in this time."""

    def make(key):
        keys = jax.random.split(key, 6)
        frames = lambda key, t: jax.random.normal(key, (1, t, h, w, c), jnp.bfloat16)
        kernel = jax.random.normal(keys[3], (3, 3, 3, c, c), jnp.bfloat16) * (27 * c) ** -0.5
        gain, bias = (jax.random.normal(key, (c,), jnp.bfloat16) for key in keys[4:])
        return frames(keys[0], t), frames(keys[1], 2), gain, kernel, bias, frames(keys[2], t)

    return Workload(make=make, flops=2.0 * 27 * c * c * t * h * w, bytes=2.0 * 3 * t * h * w * c)


WORKLOADS = {
    "wan_vae_480p": level(4, 480, 832, 96),
    "wan_vae_480p_half": level(4, 240, 416, 192),
    "wan_vae_480p_quarter": level(2, 120, 208, 384),
    "wan_vae_720p": level(4, 720, 1280, 96),
}
