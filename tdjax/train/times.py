"""Distributions of training times. A time is s = log sigma in float32, from which
`flow.from_log_sigma` has every coefficient.

Shifting u is adding to s: sigma -> shift * sigma. Source: NVlabs/rcm rcm/utils/timestep_utils.py,
                           arXiv 2510.08431.
"""

from __future__ import annotations

import dataclasses
import math

import jax


@dataclasses.dataclass(frozen=True, kw_only=True)
class UniformShift:
    """u = shift(U[0, 1)): log sigma is logistic, moved by log shift."""

    shift: float = 5.0  # factor of sigma; 1 leaves u uniform

    def __post_init__(self):
        if not 0 < self.shift < math.inf:
            raise ValueError(
                f"UniformShift.shift is {self.shift}; it must be positive and finite (1 leaves u"
                " uniform)"
            )

    def draw(self, key, shape: tuple[int, ...]) -> jax.Array:
        """log sigma f32[shape], always finite."""
        return jax.random.logistic(key, shape, "float32") + math.log(self.shift)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogNormal:
    """log sigma = mean + deviation N(0, 1).

    A mean given for single images moves by 0.5 ln(latent frames) for video: -0.8 for 20 frames is
    0.7.
    """

    mean: float = 0.7  # of log sigma
    deviation: float = 1.6

    def __post_init__(self):
        if not math.isfinite(self.mean) or not 0 < self.deviation < math.inf:
            raise ValueError(
                f"LogNormal(mean={self.mean}, deviation={self.deviation}): finite numbers are"
                " needed, the deviation positive"
            )

    def draw(self, key, shape: tuple[int, ...]) -> jax.Array:
        """log sigma f32[shape]."""
        return self.mean + self.deviation * jax.random.normal(key, shape, "float32")


TimeDistribution = UniformShift | LogNormal
