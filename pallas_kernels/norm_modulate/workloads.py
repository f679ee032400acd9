"""Real shapes: the row ops of one block, at the tokens of one clip."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.workload import Workload


def norm(l: int, d: int) -> Workload:
    """x, factor, shift, y, gate of `norm` that gives the stream and its quantised norm
    (floats=False)."""

    def make(key):
        x, y, *vectors = jax.random.split(key, 5)
        factor, shift, gate = (jax.random.normal(key, (1, 1, d)) for key in vectors)
        x, y = (jax.random.normal(key, (1, l, d), jnp.bfloat16) for key in (x, y))
        return x, 1 + 0.1 * factor, shift, y, gate

    return Workload(make=make, flops=11.0 * l * d, bytes=7.0 * l * d + 4 * l)


def gelu(l: int, d: int) -> Workload:
    """x of `gelu`."""
    make = lambda key: (jax.random.normal(key, (1, l, d), jnp.bfloat16),)
    return Workload(make=make, flops=10.0 * l * d, bytes=3.0 * l * d + 4 * l)


def quantize(l: int, d: int) -> Workload:
    """x [l d] of `int8_matmul.quantize_activations`."""
    make = lambda key: (jax.random.normal(key, (l, d), jnp.bfloat16),)
    return Workload(make=make, flops=2.0 * l * d, bytes=3.0 * l * d + 4 * l)


SIZES = {
    "wan1.3b_480p": (32760, 1536, 8960),
    "wan14b_720p": (75600, 5120, 13824),
}  # tokens, width, width of the MLP
NORM = {name: norm(l, d) for name, (l, d, _) in SIZES.items()}
GELU = {name: gelu(l, f) for name, (l, _, f) in SIZES.items()}
QUANTIZE = {name: quantize(l, d) for name, (l, d, _) in SIZES.items()}
