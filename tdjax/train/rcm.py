"""rCM distillation (arXiv 2510.08431): the steps of student and critic, which alternate.

The student follows the consistency term on data and, after the warm-up, the distribution-matching
term on its own samples; the critic learns to model those samples. All three networks start as the
teacher. Source: NVlabs/rcm rcm/models/t2v_model_distill_rcm.py.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from tdjax.errors import UsageError
from tdjax.sampling import flow
from tdjax.train import consistency
from tdjax.train.configs import SCM, RCMConfig
from tdjax.train.distribution import critic_loss, data_of, dmd_direction, dmd_loss, rollout
from tdjax.train.ema import ema_update
from tdjax.train.state import Batch, DistillState
from tdjax.train.step import (
    accumulated,
    apply,
    conditioned,
    drawn,
    guided_teacher,
    keep,
    network,
    normal,
    sample_keys,
    summary,
    whole,
)

# -- counters --------------------------------------------------------------------------------------
# Steps of both networks are counted together; whose turn it is says `methods.distillation`.


def student_updates(config: RCMConfig, step):
    """Returns the number of the student's update at its turn; works on traced steps."""
    if config.dmd_weight == 0:
        return step
    after = config.warmup + (step - config.warmup) // config.frequency
    return jnp.where(step < config.warmup, step, after)


def critic_updates(config: RCMConfig, step):
    """Returns the number of the critic's update at its turn (-1 before its first)."""
    return step - student_updates(config, step) - 1


# -- student ---------------------------------------------------------------------------------------


def scm_gradient(config: RCMConfig, model, teacher, batch: Batch, draws: dict, r):
    """Returns (gradient of the mean, values of each sample) of the continuous-time consistency
    term; r in [0, 1] grows over the warm-up."""
    own = config.consistency
    c = flow.from_log_sigma(draws["data_time"])
    x = flow.noisy(batch.latents, draws["data_noise"], flow.per_sample(c))
    v_teacher = guided_teacher(teacher, batch, config.guidance)(x, flow.TIME_SCALE * c.u)
    v, term = consistency.TANGENT[own.tangent](
        conditioned(network(model, teacher, own.compute), batch),
        x,
        v_teacher,
        c,
        own.interval,
    )
    g = consistency.raw_direction(x, v_teacher - v, term, c, r, own.warmup_form)
    ok = whole(x, v, g)
    x, direction = lax.stop_gradient((keep(ok, x), keep(ok, consistency.normalised(g, own.floor))))

    def loss(model):
        values, again = consistency.consistency_loss(
            conditioned(network(model, teacher), batch), x, c, direction, own.kappa
        )
        values = keep(ok & whole(again), values)
        return values.mean(), values

    grads, values = jax.grad(loss, has_aux=True)(model)
    return grads, {
        "consistency": values,
        "rms_direction": _rms(g),
        "rms_tangent": _rms(term),
        "ok": ok,
    }


def dcm_gradient(config: RCMConfig, model, teacher, batch: Batch, draws: dict, r):
    """Returns the same of the discrete-time consistency term; r is not used."""
    own = config.consistency
    s = consistency.dcm_times(draws["place"], own.steps, own.shift, own.skip)
    c, last = flow.from_log_sigma(s[0]), flow.from_log_sigma(s[-1])
    x = flow.noisy(batch.latents, draws["data_noise"], flow.per_sample(c))
    there = consistency.teacher_steps(guided_teacher(teacher, batch, config.guidance), x, s)
    target = data_of(conditioned(network(model, teacher), batch), there, last)
    ok = whole(x, target)
    x, target = lax.stop_gradient((keep(ok, x), keep(ok, target)))

    def loss(model):
        student = conditioned(network(model, teacher), batch)
        values = keep(ok, own.weight * consistency.dcm_loss(student, x, c, target))
        return values.mean(), values

    grads, values = jax.grad(loss, has_aux=True)(model)
    return grads, {"consistency": values, "ok": ok}


def dmd_gradient(config: RCMConfig, state: DistillState, teacher, batch: Batch, draws: dict, count):
    """Returns (gradient of the mean, values of each sample) of the distribution-matching term; only
    the last of the `count` steps has a gradient."""
    student = conditioned(network(state.model, teacher), batch)
    critic = conditioned(network(state.critic, teacher), batch)
    x, s = rollout(student, draws["noise"], draws["time"], count)
    ok = whole(x)

    def direction(made):
        guided = guided_teacher(teacher, batch, config.guidance)
        noise, time = draws["renoise"], draws["renoise_time"]
        return dmd_direction(made, guided, critic, noise, time, config.dmd_limit)

    def loss(model):
        student = conditioned(network(model, teacher), batch)
        made = data_of(student, keep(ok, x), flow.from_log_sigma(s))
        d, gap = lax.stop_gradient(direction(lax.stop_gradient(made)))
        good = ok & whole(made, d)
        values = config.dmd_weight * keep(good, dmd_loss(made, keep(good, d)))
        return values.mean(), {"dmd": values, "rms_dmd": _rms(d), "dmd_distance": gap, "ok": good}

    return jax.grad(loss, has_aux=True)(state.model)


def _rms(x):  # [b ...] -> [b]
    return jnp.sqrt(jnp.mean(jnp.square(x), tuple(range(1, x.ndim))))


def _only_when(active, gradient: Callable):
    """Returns gradient(), (gradient, values of each sample), where `active` bool[] holds, else
    zeros and samples that are fine."""
    grads, samples = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradient))
    return lax.cond(active, gradient, lambda: (grads, samples | {"ok": ~samples["ok"]}))


def student_gradient(config: RCMConfig, state: DistillState, teacher, batch: Batch, draws: dict):
    """Returns the gradient of both terms of a microbatch, one backward pass after the other, and
    values of each sample."""
    parts = []
    if config.consistency is not None:
        term = scm_gradient if isinstance(config.consistency, SCM) else dcm_gradient
        r = 1.0
        if config.warmup:
            r = jnp.minimum(1.0, state.step / config.warmup)
        parts.append(term(config, state.model, teacher, batch, draws, r))
    if config.dmd_weight:
        count = student_updates(config, state.step) % config.max_steps + 1
        dmd = lambda: dmd_gradient(config, state, teacher, batch, draws, count)
        parts.append(_only_when(state.step >= config.warmup, dmd) if config.warmup else dmd())
    grads = jax.tree.map(lambda *g: sum(g), *(grads for grads, _ in parts))
    samples = {name: value for _, values in parts for name, value in values.items()}
    loss = sum(samples[name] for name in ("consistency", "dmd") if name in samples)
    ok = jnp.stack([values["ok"] for _, values in parts]).all(0)
    return grads, samples | {"loss": loss, "ok": ok}


def _data_draws(config: RCMConfig, keys: dict, shape) -> dict:
    """Returns noise and time (log sigma; for DCM a place between 0 and 1) of the consistency term,
    for samples of this shape, batch axis first."""
    noise = {"data_noise": normal(keys["data_noise"], shape)}
    if isinstance(config.consistency, SCM):
        return noise | {"data_time": drawn(config.consistency.time, keys["data_time"])}
    return noise | {"place": jax.vmap(jax.random.uniform)(keys["data_time"])}


def _sample_draws(config: RCMConfig, keys: dict, shape) -> dict:
    """Returns what `rollout` and the comparison of its result take, for samples of this shape,
    batch axis first."""
    n = config.max_steps
    if config.rollout is None:
        time = drawn(config.sample_time, keys["time"], (n,)).at[:, 0].set(jnp.inf)
    else:
        fixed = [math.inf, *(math.log(math.tan(t)) for t in config.rollout)]
        time = jnp.broadcast_to(jnp.float32(fixed[:n]), (len(keys["time"]), n))
    return {
        "noise": normal(keys["noise"], (n, *shape)),
        "time": time,
        "renoise": normal(keys["renoise"], shape),
        "renoise_time": drawn(config.sample_time, keys["renoise_time"]),
    }


def _begin(config: RCMConfig, state: DistillState, batch: Batch):
    """Returns (batch in float32, random keys of its samples) of a step, checked."""
    if (state.critic is None) != (config.dmd_weight == 0):
        article = "no" if state.critic is None else "a"
        raise UsageError(
            f"dmd_weight is {config.dmd_weight:g} and the state has {article} critic",
            "distribution matching needs a critic, and consistency alone has none",
            "create the state with critic and critic_optimizer exactly where dmd_weight is not 0",
        )
    names = "data_noise", "data_time", "noise", "time", "renoise", "renoise_time"
    keys = sample_keys(state, len(batch.latents), *names)
    return dataclasses.replace(batch, latents=batch.latents.astype(jnp.float32)), keys


def make_student_step(config: RCMConfig, optimizer) -> Callable:
    """Returns step(state, teacher, batch) -> (state, metrics), for the student's turns."""

    def step(state, teacher, batch):
        batch, keys = _begin(config, state, batch)

        def gradient(arrays):
            batch, keys = arrays
            draws, shape = {}, batch.latents.shape[1:]
            if config.consistency:
                draws |= _data_draws(config, keys, shape)
            if config.dmd_weight:
                draws |= _sample_draws(config, keys, shape)
            return student_gradient(config, state, teacher, batch, draws)

        grads, samples = accumulated(gradient, (batch, keys), config.accumulate)
        model, opt, metrics = apply(optimizer, grads, state.opt, state.model)
        ema = ema_update(state.ema, model, student_updates(config, state.step), config.ema)
        state = dataclasses.replace(state, step=state.step + 1, model=model, ema=ema, opt=opt)
        return state, summary(samples) | metrics

    return step


# -- critic ----------------------------------------------------------------------------------------


def critic_gradient(config: RCMConfig, state: DistillState, teacher, batch: Batch, draws: dict):
    """Returns (gradient of the mean, values of each sample) of the critic's loss on fresh samples
    of the student."""
    student = conditioned(network(state.model, teacher), batch)
    count = critic_updates(config, state.step) % config.max_steps + 1
    x, s = rollout(student, draws["noise"], draws["time"], count)
    made = data_of(student, x, flow.from_log_sigma(s))
    ok = whole(made)
    made = keep(ok, made)

    def loss(critic):
        trained = conditioned(network(critic, teacher), batch)
        values, v = critic_loss(trained, made, draws["renoise"], draws["renoise_time"])
        good = ok & whole(v)
        return keep(good, values).mean(), {"loss": keep(good, values), "ok": good}

    return jax.grad(loss, has_aux=True)(state.critic)


def make_critic_step(config: RCMConfig, optimizer) -> Callable:
    """Returns step(state, teacher, batch) -> (state, metrics), for the other turns. Of the
    teacher only the base of networks that are trained in part is used, of the batch's latents only
    their shape."""
    if not config.dmd_weight:
        raise ValueError("make_critic_step: dmd_weight is 0, and consistency alone has no critic")

    def step(state, teacher, batch):
        batch, keys = _begin(config, state, batch)

        def gradient(arrays):
            batch, keys = arrays
            draws = _sample_draws(config, keys, batch.latents.shape[1:])
            return critic_gradient(config, state, teacher, batch, draws)

        grads, samples = accumulated(gradient, (batch, keys), config.accumulate)
        critic, opt, metrics = apply(optimizer, grads, state.critic_opt, state.critic)
        state = dataclasses.replace(state, step=state.step + 1, critic=critic, critic_opt=opt)
        return state, summary(samples) | metrics

    return step
