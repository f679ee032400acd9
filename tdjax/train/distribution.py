"""The reverse-divergence half of rCM: backward simulation by the student, distribution matching
(DMD), and its critic.

Formulas: arXiv 2510.08431 section 3, arXiv 2405.14867; NVlabs/rcm
rcm/models/t2v_model_distill_rcm.py.
"""

from __future__ import annotations

import jax.numpy as jnp
from einops import reduce
from jax import lax

from tdjax.sampling import flow
from tdjax.sampling.few_step import Velocity
from tdjax.train.consistency import at

_LEAST_DISTANCE = 1e-5


def data_of(velocity: Velocity, x, c: flow.Coefficients):
    """Returns x0 predicted at x [b t h w c] and c of u f32[b]."""
    return flow.data(x, at(velocity, x, c.u), flow.per_sample(c))


def rollout(student: Velocity, noise, s, count):
    """Returns (x [b t h w c], log sigma f32[b]) after the student's own sampling up to, but
    without, the last of `count` steps.

    noise f32[b n t h w c]: entry 0 starts, entry k goes in after step k. s f32[b n]: entry 0 is
    infinite (u = 1), entry k is the time of step k+1 unless that is later than the time before.
    count i32[] in 1..n, may be traced; there is no gradient.
    """

    def step(k, state):
        x, now = state
        x0 = data_of(student, x, flow.from_log_sigma(now))
        after = jnp.minimum(now, lax.dynamic_index_in_dim(s, k, 1, keepdims=False))
        fresh = lax.dynamic_index_in_dim(noise, k, 1, keepdims=False)
        return flow.noisy(x0, fresh, flow.per_sample(flow.from_log_sigma(after))), after

    return lax.stop_gradient(lax.fori_loop(1, count, step, (noise[:, 0], s[:, 0])))


def dmd_direction(made, teacher: Velocity, critic: Velocity, eps, s, limit: float | None = None):
    """Returns (d, mean f32[b]) with d = (x0_critic - x0_teacher) / mean|made - x0_teacher|, both at
    x_u of (made, eps, log sigma s f32[b]).

    limit: the greatest root mean square of d in a sample; None for no limit (published).
    """
    c = flow.from_log_sigma(s)
    x = flow.noisy(made, eps, flow.per_sample(c))
    wanted = data_of(teacher, x, c)
    gap = reduce(jnp.abs(made - wanted), "b t h w c -> b", "mean")
    d = (data_of(critic, x, c) - wanted) / flow.per_sample(jnp.maximum(gap, _LEAST_DISTANCE))
    if limit is not None:
        rms = jnp.sqrt(reduce(jnp.square(d), "b t h w c -> b 1 1 1 1", "mean"))
        d = d * (limit / jnp.maximum(rms, limit))
    return d, gap


def dmd_loss(made, d):
    """Returns sum (made - stop(made - d))^2, f32[b]: its gradient by `made` is 2 d."""
    return reduce(jnp.square(made - lax.stop_gradient(made - d)), "b t h w c -> b", "sum")


def critic_loss(critic: Velocity, made, eps, s):
    """Returns flow matching on the student's samples, weight b^2, which is
    sum (made - x0_critic)^2 / sin^2, as (f32[b], v)."""
    c = flow.from_log_sigma(s)
    p = flow.per_sample(c)
    v = at(critic, flow.noisy(made, eps, p), c.u)
    return reduce(jnp.square(p.b * (v - (eps - made))), "b t h w c -> b", "sum"), v
