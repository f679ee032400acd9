"""Random training times. A time is s = log sigma in float32, from which `flow.from_log_sigma` has
every coefficient.

Shifting u is adding to s: sigma -> shift * sigma. Source: NVlabs/rcm rcm/utils/timestep_utils.py,
arXiv 2510.08431.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from tdjax.train.configs import LogNormal, TimeDistribution, UniformShift


@dataclasses.dataclass(frozen=True)
class Choice:
    """Times of which log sigma is one of `values`, each as likely; no setting of a run."""

    values: tuple[float, ...]


def draw(time: TimeDistribution | Choice, key, shape: tuple[int, ...]) -> jax.Array:
    """Returns log sigma f32[shape] from a distribution, always finite."""
    match time:
        case UniformShift():
            return jax.random.logistic(key, shape, "float32") + math.log(time.shift)
        case LogNormal():
            return time.mean + time.deviation * jax.random.normal(key, shape, "float32")
        case Choice():
            return jax.random.choice(key, jnp.float32(time.values), shape)
