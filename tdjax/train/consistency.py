"""The forward-divergence half of rCM: consistency in continuous time (sCM) and in discrete time
(dCM), in rectified-flow variables.

With v- the student without gradient, V the guided teacher and dv = V - v-, the published loss in
TrigFlow becomes

    F - F- = b (v - v-)      g = cos b sqrt(1 - r^2 sin^2) dv - r cos sin T      T = x_t + dF-/dt
    along the teacher T = b tau dv + b^3 J     J = derivative of v- along (V, 1)     tau = tan(pi/4
    - t) = (cos - sin) b

T holds no x_t: it cancels against a piece of dF/dt. At r = 1, g = cos b^2 (dv - u J), the
derivative of the consistency map. Formulas: arXiv 2510.08431 section 3 and appendix, NVlabs/rcm
rcm/models/t2v_model_distill_rcm.py; the change of variables is ours.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from einops import reduce

from tdjax.sampling import flow
from tdjax.sampling.few_step import Velocity


def at(velocity: Velocity, x, u):
    """Returns v at x [b t h w c] and rectified-flow time u f32[b]."""
    return velocity(x, flow.TIME_SCALE * u)


def tau(c: flow.Coefficients):
    """Returns the factor of x_t in F = tau x_t + b v; shaped like the members of c."""
    return (c.cos - c.sin) * c.b


def earlier(c: flow.Coefficients, h: float) -> flow.Coefficients:
    """Returns the coefficients at TrigFlow time t - h: c of any shape, h in radians."""
    sin = c.sin * math.cos(h) - c.cos * math.sin(h)
    cos = c.cos * math.cos(h) + c.sin * math.sin(h)
    b = 1.0 / (sin + cos)
    u = c.u - math.sin(h) * c.b * b
    return flow.Coefficients(u=u, a=cos * b, b=b, sin=sin, cos=cos)


# -- T of the formulas above, three ways -----------------------------------------------------------
# Each is called outside the function that is differentiated, and takes x and v_teacher f32
# [b t h w c] and c of u f32[b].


def exact(student: Velocity, x, v_teacher, c: flow.Coefficients, h: float):
    """Returns (v-, T), both f32[b t h w c], by one forward-mode derivative; h is not used."""
    p = flow.per_sample(c)
    v, j = jax.jvp(lambda x, u: at(student, x, u), (x, c.u), (v_teacher, jnp.ones_like(c.u)))
    return v, p.b * tau(p) * (v_teacher - v) + p.b**3 * j


def discrete(student: Velocity, x, v_teacher, c: flow.Coefficients, h: float):
    """Returns (v-, T) from dF/dt = (cos(h) F(x_t, t) - F(x_{t-h}, t-h)) / sin(h), x_{t-h} on the
    teacher's trajectory.

    x, v_teacher and both results f32[b t h w c], c of u f32[b], h in radians of TrigFlow time. In
    rectified flow that point is x - (u - u') V, and what remains is one difference of velocities.
    """
    past = earlier(c, h)
    p, q = flow.per_sample(c), flow.per_sample(past)
    v = at(student, x, c.u)
    back = at(student, x - math.sin(h) * p.b * q.b * v_teacher, past.u)
    return v, p.b * tau(q) * (v_teacher - v) + q.b * (v - back) / math.sin(h)


def semidiscrete(student: Velocity, x, v_teacher, c: flow.Coefficients, h: float):
    """Returns (v-, T) from the exact derivative in x_t and a difference in t at fixed x_t, weighted
    as in `discrete`.

    Shapes and units are those of `discrete`.
    """
    past = earlier(c, h)
    p, q = flow.per_sample(c), flow.per_sample(past)
    v, j = jax.jvp(lambda x: at(student, x, c.u), (x,), (tau(p) * x + p.b**2 * v_teacher,))
    back = at(student, x * (q.b / p.b), past.u)
    rest = 1.0 + tau(p) ** 2 - (tau(p) * math.cos(h) * (math.tan(h / 2) + tau(p)) + 1.0) * q.b / p.b
    term = (
        rest * x / p.b
        + p.b * (tau(p) * v_teacher - tau(q) * v)
        + p.b * j
        + q.b * (v - back) / math.sin(h)
    )
    return v, term


TANGENT = {"exact": exact, "semidiscrete": semidiscrete, "discrete": discrete}


# -- loss of sCM -----------------------------------------------------------------------------------


def raw_direction(x, dv, term, c: flow.Coefficients, r, form: str = "paper"):
    """Returns g, where F is to go, before normalising. dv = V - v-, term = T, r in [0, 1] grows
    over the warm-up.

    "paper" scales all of T by r. "code2026" is the official code since January 2026, which leaves
    the derivative unscaled: for r < 1 its g points largely along x_t. It is here to compare with
    that code.
    """
    p = flow.per_sample(c)
    kept = {"paper": r * term, "code2026": term - (1.0 - r) * x / p.b}[form]
    return p.cos * p.b * jnp.sqrt(1.0 - jnp.square(r * p.sin)) * dv - p.cos * p.sin * kept


def normalised(g, floor: float):
    """Returns g / (|g| + floor sqrt(size)) over each sample of g [b t h w c]: floor is in units of
    the root mean square of g."""
    norm = jnp.sqrt(reduce(jnp.square(g), "b t h w c -> b 1 1 1 1", "sum"))
    return g / (norm + floor * math.sqrt(g[0].size))


def consistency_loss(student: Velocity, x, c: flow.Coefficients, direction, kappa: float | None):
    """Returns kappa sqrt(size) sum (F - F- - direction)^2 as (f32[b], v). The value is constant by
    construction; its gradient is not.

    kappa = 100 / sqrt(size) is the published loss scale of 100, and what None stands for: 0.071 for
    Wan at 480p in 20 latent frames, 0.045 at 720p in 21.
    """
    if kappa is None:
        kappa = 100.0 / math.sqrt(x[0].size)
    v = at(student, x, c.u)
    pull = flow.per_sample(c).b * (v - jax.lax.stop_gradient(v)) - direction
    return kappa * math.sqrt(x[0].size) * reduce(jnp.square(pull), "b t h w c -> b", "sum"), v


# -- dCM -------------------------------------------------------------------------------------------


def dcm_times(place, steps: int, shift: float, skip: int):
    """Returns log sigma f32[skip + 1, b]: `skip` intervals of 1/steps downwards in u before
    shifting, begun at place f32[b] in [0, 1)."""
    gone = place * (1.0 - skip / steps) + jnp.arange(skip + 1, dtype=place.dtype)[:, None] / steps
    return jnp.log1p(-gone) - jnp.log(gone) + math.log(shift)


def teacher_steps(teacher: Velocity, x, s):
    """Returns x at s[-1], reached from x [b t h w c] at log sigma s[0] by Euler steps of the guided
    teacher in TrigFlow time; s f32[m+1, b]."""

    def step(x, times):
        c, after = flow.from_log_sigma(times[0]), flow.from_log_sigma(times[1])
        p, q = flow.per_sample(c), flow.per_sample(after)
        f = flow.trig_from_velocity(x, at(teacher, x, c.u), p)
        gap = jnp.arctan2(p.sin * q.cos - p.cos * q.sin, p.cos * q.cos + p.sin * q.sin)
        return q.b * (x / p.b - gap * f), None

    return jax.lax.scan(step, x, (s[:-1], s[1:]))[0]


def dcm_loss(student: Velocity, x, c: flow.Coefficients, target):
    """Returns sum (x0(x) - target)^2, f32[b]; target is the student's own x0 further down the
    teacher's trajectory."""
    x0 = flow.data(x, at(student, x, c.u), flow.per_sample(c))
    return reduce(jnp.square(x0 - target), "b t h w c -> b", "sum")
