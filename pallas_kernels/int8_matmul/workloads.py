"""Real shapes: the linear layers of one block, at the tokens of one clip."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.workload import Workload


def layer(m: int, k: int, n: int) -> Workload:
    """x [m k], weight [n k] and bias [n] in bfloat16, for any scheme to quantise; flops and bytes
    are those of the product alone."""

    def make(key):
        x, weight, bias = jax.random.split(key, 3)
        x = jax.random.normal(x, (m, k), jnp.bfloat16)
        return (
            x,
            jax.random.normal(weight, (n, k), jnp.bfloat16) * k**-0.5,
            jax.random.normal(bias, (n,), jnp.bfloat16),
        )

    return Workload(make=make, flops=2.0 * m * n * k, bytes=1.0 * k * (m + n) + 2.0 * m * n)


WORKLOADS = {
    f"{model}_{name}": layer(tokens, k, n)
    for model, tokens, d, f in (
        ("wan1.3b_480p", 32760, 1536, 8960),
        ("wan14b_720p", 75600, 5120, 13824),
    )
    for name, k, n in (("qkv", d, 3 * d), ("o", d, d), ("up", d, f), ("down", f, d))
}
