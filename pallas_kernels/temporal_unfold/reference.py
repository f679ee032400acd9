"""The op in plain JAX: the specification. float32 inside, one rounding of y."""

from __future__ import annotations

import jax.numpy as jnp

from pallas_kernels.norm_silu import norm_silu


def temporal_unfold(x, past, gain):  # [b t n c], [b 2 n c], [c] -> [b t n 3c], [b 2 n c]
    y = x if gain is None else norm_silu(x, gain)
    b, t, n, c = x.shape
    y = jnp.concatenate([jnp.zeros((b, 2, n, c), x.dtype) if past is None else past, y], axis=1)
    return jnp.concatenate([y[:, i : i + t] for i in range(3)], axis=-1), y[:, -2:]
