"""The moving average of weights that a run keeps beside them, and at last exports."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from tdjax.train.configs import EMAConfig


def exponent(width: float) -> float:
    """Returns gamma of the power function on [0, 1] whose relative width is `width` (arXiv
    2312.02696, section 3.1)."""
    roots = np.roots([1.0, 7.0, 16.0 - width**-2, 12.0 - width**-2])
    return float(roots[np.isreal(roots)].real.max())


def ema_beta(config: EMAConfig, n):
    """Returns the share of the old average at update n = 0, 1, ... (int32[] or more); f32."""
    if config.decay is not None:
        return jnp.float32(config.decay)
    n = jnp.asarray(n, jnp.float32)
    return jnp.exp((exponent(config.width) + 1.0) * jnp.log1p(-1.0 / (n + 1.0)))


def ema_update(ema, model, step, config: EMAConfig):
    """Returns the float32 average after update `step` (int32[], counted from 0) has given `model`;
    leaf by leaf, in the shapes of `ema`."""
    beta = ema_beta(config, step)

    def averaged(old, new):
        new = new.astype(jnp.float32)
        return new + beta * (old - new)

    return jax.tree.map(averaged, ema, model)
