"""Samplers as pure functions of (velocity, noise, times): few-step SDE and ODE, and the guided
many-step teacher.

`velocity` is any callable (x f32[b t h w c], timestep f32[b] in 0..1000) -> v. Each loop is one
`lax.while_loop`, to be jitted by the caller together with the network; times and scalars are
arguments, so one executable serves every schedule of a length. The state is float32. Sources:
thu-ml/TurboDiffusion inference/, NVlabs/rcm rcm/samplers/, arXiv 2510.08431.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from tdjax.config import SamplerConfig
from tdjax.sampling import flow, unipc

Velocity = Callable[[jax.Array, jax.Array], jax.Array]


def sde(x, v, eps, u, u_next):
    """x, v, eps f32[b t h w c] at time u -> x at u_next: to the predicted data, then back up with
    fresh noise."""
    return (1.0 - u_next) * (x - u * v) + u_next * eps


def ode(x, v, eps, u, u_next):
    """x, v f32[b t h w c] at time u -> x at u_next, along the velocity; the noise is not used."""
    return x - (u - u_next) * v


UPDATE = {"sde": sde, "ode": ode}


def predicted(x, other, u, u_next, sampler: str):
    """The data that a step from u to u_next predicted, of the state x f32[b t h w c] after it.

    other: the noise that "sde" injected, or the state that "ode" had before; both updates are
    linear in the prediction. u_next < u, and below 1.
    """
    if sampler == "sde":
        return (x - u_next * other) / (1.0 - u_next)
    return (u * x - u_next * other) / (u - u_next)


def start(noise, times):
    """State at times[0] of the start noise [b t h w c]: no data in it yet."""
    return times[0] * noise


def injected(noise):
    """Noise [steps ...] as the steps inject it: entry i after step i. The last entry only fills the
    place, its weight is 0."""
    return jnp.roll(noise, -1, axis=0)


def _call(velocity: Velocity, x, u):
    """v f32[b t h w c] at one time u for all samples; the door between float32 state and the
    network."""
    return velocity(x, jnp.full(x.shape[:1], flow.TIME_SCALE * u, jnp.float32)).astype(jnp.float32)


def step(velocity: Velocity, x, eps, u, u_next, sampler: str):
    """One step of a few-step sampler. x f32[b t h w c] at time u -> x at u_next."""
    # The barriers keep one step's arithmetic apart from its neighbours', whatever the number of
    # steps in the loop: a loop cut into several calls gives the same bits.
    x, eps, u, u_next = lax.optimization_barrier((x, eps, u, u_next))
    v = lax.optimization_barrier(_call(velocity, x, u))
    return lax.optimization_barrier(UPDATE[sampler](x, v, eps, u, u_next))


def sample_from(velocity: Velocity, x, noise, times, sampler: str):
    """Steps over times f32[n+1] from the state x at times[0] -> (x at times[n], finite bool[n]).

    noise f32[n b t h w c]: entry i is injected after step i (a slice of `injected(...)`); None will
    do for "ode". finite[i] says whether the state after step i is finite everywhere.
    ValueError for another sampler or another length of the noise.
    """
    if sampler not in UPDATE:
        raise ValueError(
            f"sampler is {sampler!r}; allowed: {', '.join(UPDATE)} (teachers: sample_teacher)"
        )
    steps = times.shape[0] - 1
    if sampler == "sde" and noise.shape[0] != steps:
        raise ValueError(
            f"{steps} steps need {steps} entries of noise, entry i for step i; got {noise.shape[0]}"
        )

    def one(x, row):
        eps, u, u_next = row
        x = step(velocity, x, eps, u, u_next, sampler)
        return x, jnp.isfinite(x).all()

    return _loop(one, x, (noise if sampler == "sde" else None, times[:-1], times[1:]))


def _loop(one, state, rows):
    """`lax.scan(one, state, rows)` -> (state, finite bool[n]), its length hidden from the compiler.

    XLA inlines a loop of one step and may then round it differently: with the length hidden, a
    schedule run in pieces (experts, progress) gives the bits of the whole. For sampling only: it
    has no reverse-mode derivative; losses differentiate `step`.
    """
    rows = jax.tree.map(jnp.asarray, rows)
    steps = jax.tree.leaves(rows)[0].shape[0]
    last = lax.optimization_barrier(jnp.int32(steps))

    def body(carry):
        i, state, finite = carry
        row = jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, i, keepdims=False), rows)
        state, ok = one(state, row)
        return i + 1, state, finite.at[i].set(ok)

    carry = jnp.int32(0), state, jnp.zeros(steps, bool)
    _, state, finite = lax.while_loop(lambda carry: carry[0] < last, body, carry)
    return state, finite


def sample(velocity: Velocity, noise, times, sampler: str):
    """Few-step sampling: noise f32[steps b t h w c], times f32[steps+1] -> (latents f32[b t h w c],
    finite bool[steps]).

    Entry 0 of the noise starts, the others are injected ("sde"); "ode" reads entry 0 only.
    """
    later = injected(noise) if sampler == "sde" else None
    return sample_from(velocity, start(noise[0], times), later, times, sampler)


# -- teacher ---------------------------------------------------------------------------------------


def guide(v, v_negative, scale):
    """Classifier-free guidance of velocities [b t h w c]; scale 1 is v itself."""
    return v_negative + scale * (v - v_negative)


def guided(velocity: Velocity, velocity_negative: Velocity, scale) -> Velocity:
    """v- + scale (v - v-) of two callables (x f32[b t h w c], timestep f32[b]) -> v, as one of
    them; each step calls both."""
    return lambda x, timestep: guide(velocity(x, timestep), velocity_negative(x, timestep), scale)


class TeacherState(NamedTuple):
    """x f32[b t h w c] and what a multistep scheme remembers: its last corrected x, and two
    predictions of data."""

    x: jax.Array
    last: jax.Array
    m1: jax.Array
    m2: jax.Array


def teacher_start(noise) -> TeacherState:
    """The teacher starts from the noise itself (not scaled by its first time)."""
    # Three arrays of zeros, not one array three times: the state may be donated.
    return TeacherState(
        x=noise, last=jnp.zeros_like(noise), m1=jnp.zeros_like(noise), m2=jnp.zeros_like(noise)
    )


def teacher_step(
    velocity: Velocity, state: TeacherState, row: unipc.StepCoefficients
) -> TeacherState:
    """One step of Euler or UniPC by the scalars of its row; see `teacher`."""
    (x, last, m1, m2), row = lax.optimization_barrier((state, row))
    m = lax.optimization_barrier(x - row.time * _call(velocity, x, row.time))
    c, p = row.corrector, row.predictor
    x = c[0] * x + c[1] * last + c[2] * m + c[3] * m1 + c[4] * m2
    return lax.optimization_barrier(
        TeacherState(x=p[0] * x + p[1] * m + p[2] * m1, last=x, m1=m, m2=m1)
    )


def teacher_from(velocity: Velocity, state: TeacherState, steps: unipc.StepCoefficients):
    """Steps of a table (or of a part of it) -> (state, finite bool[n]); latents are state.x after
    the last row."""

    def one(state, row):
        state = teacher_step(velocity, state, row)
        return state, jnp.isfinite(state.x).all()

    return _loop(one, state, steps)


def sample_teacher(velocity: Velocity, noise, cfg: SamplerConfig):
    """The teacher's many steps from noise f32[b t h w c] -> (latents f32[b t h w c], finite
    bool[steps])."""
    state, finite = teacher_from(velocity, teacher_start(noise), unipc.step_coefficients(cfg))
    return state.x, finite
