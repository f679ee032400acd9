"""Algebra of time and noise: rectified flow (what Wan predicts), EDM and TrigFlow (what the
samplers and losses speak).

One process in three clocks, with data x0 of unit deviation and noise eps ~ N(0, 1):

    rectified flow  x_u = (1-u) x0 + u eps            v = eps - x0                   u in [0, 1]
    EDM             x_e = x0 + sigma eps              x_u = x_e / (1 + sigma)        sigma = u/(1-u)
    TrigFlow        x_t = cos(t) x0 + sin(t) eps      F = cos(t) eps - sin(t) x0     sigma = tan(t)

The network is always the unmodified Wan velocity, fed x_u and 1000 u. Everything on arrays is
float32-safe (no arctan, no tan, no division by a small number) and differentiable in both modes.
Formulas: arXiv 2510.08431, NVlabs/rcm rcm/utils/denoiser_scaling.py and timestep_utils.py.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

TIME_SCALE = 1000.0  # the network's timestep is 1000 u


class Coefficients(NamedTuple):
    """All factors of one time, each shaped like the time they came from."""

    u: jax.Array  # weight of noise in x_u
    a: jax.Array  # weight of data in x_u: 1 - u, without cancellation where it came from log sigma
    b: jax.Array  # x_u = b x_t; also 1 / (sin + cos), and du/dt = b^2
    sin: jax.Array
    cos: jax.Array


def from_u(u) -> Coefficients:
    """Coefficients at rectified-flow time u f32[...] in [0, 1]."""
    return coefficients(u, 1.0 - u)


def from_log_sigma(s) -> Coefficients:
    """Coefficients at log sigma s f32[...]; +-infinity are the two ends. 1-u keeps its relative
    precision near u = 1."""
    return coefficients(jax.nn.sigmoid(s), jax.nn.sigmoid(-s))


def coefficients(u, a) -> Coefficients:
    """Coefficients of u and a = 1-u, arrays of one shape."""
    b = jnp.sqrt(u * u + a * a)  # at least sqrt(1/2)
    return Coefficients(u=u, a=a, b=b, sin=u / b, cos=a / b)


def sigma(u):
    """EDM sigma at u [...] in [0, 1): infinite at 1."""
    return u / (1.0 - u)


def u_from_sigma(sigma):
    """Rectified-flow time of an EDM sigma [...] in [0, infinity), shaped like it."""
    return sigma / (1.0 + sigma)


def u_from_trig(t):
    """Rectified-flow time of a TrigFlow time in [0, pi/2]; the numpy function for numpy input,
    which keeps float64."""
    xp = np if isinstance(t, np.ndarray | float) else jnp
    return xp.sin(t) / (xp.sin(t) + xp.cos(t))


def shift(u, factor: float):
    """u [...] with more room for later times: sigma -> factor * sigma."""
    return factor * u / (1.0 + (factor - 1.0) * u)


def unshift(u, factor: float):
    """The inverse of `shift`."""
    return u / (factor - (factor - 1.0) * u)


def per_sample(value):
    """[b] -> [b 1 1 1 1], to meet latents [b t h w c]. Works on a whole Coefficients."""
    return jax.tree.map(lambda a: rearrange(a, "b -> b 1 1 1 1"), value)


def noisy(x0, eps, c: Coefficients):
    """x_u of data and noise, both [b t h w c]; here and below c is `per_sample`, [b 1 1 1 1]."""
    return c.a * x0 + c.u * eps


def data(x, v, c: Coefficients):
    """x0 [b t h w c] predicted by velocity v at x = x_u, both [b t h w c]."""
    return x - c.u * v


def noise(x, v, c: Coefficients):
    """eps [b t h w c] predicted by velocity v at x = x_u, both [b t h w c]."""
    return x + c.a * v


def velocity(x, x0, c: Coefficients):
    """The velocity at x = x_u whose prediction of data is x0, all [b t h w c]. Undefined at u =
    0."""
    return (x - x0) / c.u


def trig_from_velocity(x, v, c: Coefficients):
    """F of TrigFlow from v at x = x_u, all [b t h w c]: stable at both ends, unlike (cos x_t - x0)
    / sin."""
    return (c.cos - c.sin) * x + c.b * v
