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
from jax.scipy.special import ndtr, ndtri

from tdjax.train.configs import LogNormal, TimeDistribution, UniformShift


@dataclasses.dataclass(frozen=True)
class Choice:
    """Times of which log sigma is one of `values`, each as likely; no setting of a run."""

    values: tuple[float, ...]


def draw(
    time: TimeDistribution | Choice,
    key,
    shape: tuple[int, ...],
    between: tuple[float, float] = (0.0, 1.0),
) -> jax.Array:
    """Returns log sigma f32[shape] from a distribution, always finite.

    between: flow times u (0: data, 1: noise) that may be drawn; the distribution inside is the
             same. One of two experts is trained on its own times.
    """
    if between != (0.0, 1.0):
        return _between(time, key, shape, between)
    match time:
        case UniformShift():
            return jax.random.logistic(key, shape, "float32") + math.log(time.shift)
        case LogNormal():
            return time.mean + time.deviation * jax.random.normal(key, shape, "float32")
        case Choice():
            return jax.random.choice(key, jnp.float32(time.values), shape)


def _between(time, key, shape: tuple[int, ...], between: tuple[float, float]) -> jax.Array:
    """By the inverse of the distribution function, at places between those of the ends."""
    ends = jnp.float32([_log_sigma(u) for u in between])
    match time:
        case UniformShift():
            low, high = jax.nn.sigmoid(ends - math.log(time.shift))
            inverse = lambda p: jax.scipy.special.logit(p) + math.log(time.shift)
        case LogNormal():
            low, high = ndtr((ends - time.mean) / time.deviation)
            inverse = lambda p: time.mean + time.deviation * ndtri(p)
        case Choice():
            raise ValueError("times of a choice are not divided between experts")
    place = low + (high - low) * jax.random.uniform(key, shape, "float32")
    least = jnp.finfo("float32").eps  # at 0 and 1 the inverse is infinite
    return jnp.clip(inverse(jnp.clip(place, least, 1 - least)), ends[0], ends[1])


def _log_sigma(u: float) -> float:
    """Log sigma of a flow time; infinite at 0 and 1."""
    if u in (0.0, 1.0):
        return math.inf if u else -math.inf
    return math.log(u / (1 - u))
