"""The op in plain JAX: the specification. Sums in float32, rounded once."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

from pallas_kernels.norm_silu import norm_silu
from pallas_kernels.rounding import rounded


def causal_conv(x, past, gain, kernel, bias, plus):
    """x [b t h w i], past [b 2 h w i], gain [i] or None, kernel [3 3 3 i o], bias [o], plus [b t h
    w o] or None -> [b t h w o], the next past."""
    frames = jnp.concatenate([past, x if gain is None else norm_silu(x, gain)], axis=1)
    y = lax.conv_general_dilated(
        frames.astype(jnp.float32),
        rounded(kernel.astype(jnp.float32), x.dtype, interpret=True),
        (1, 1, 1),
        [(0, 0), (1, 1), (1, 1)],
        dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
        precision=lax.Precision.HIGHEST,
    )
    y = y + bias.astype(jnp.float32)
    y = y if plus is None else y + plus.astype(jnp.float32)
    return y.astype(x.dtype), frames[:, -2:]
