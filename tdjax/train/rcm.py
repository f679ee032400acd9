"""rCM distillation (arXiv 2510.08431): configuration, the alternation of student and critic, and
their steps.

The student follows the consistency term on data and, after the warm-up, the distribution-matching
term on its own samples; the critic learns to model those samples. All three networks start as the
teacher. Source: NVlabs/rcm rcm/models/t2v_model_distill_rcm.py; hyper-parameters from its
                 configs/experiments.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from tdjax.errors import UsageError
from tdjax.models.wan_dit import with_compute
from tdjax.precision import FLOATS
from tdjax.sampling import flow
from tdjax.train import consistency
from tdjax.train.distribution import critic_loss, data_of, dmd_direction, dmd_loss, rollout
from tdjax.train.state import (
    Batch,
    DistillState,
    EMAConfig,
    accumulated,
    apply,
    check_accumulate,
    ema_update,
    guided_teacher,
    keep,
    named_keys,
    normal,
    summary,
    velocity,
    whole,
)
from tdjax.train.times import LogNormal, TimeDistribution, UniformShift


@dataclasses.dataclass(frozen=True, kw_only=True)
class SCM:
    """Continuous-time consistency. kappa and floor are in units that do not depend on the size of a
    sample: the defaults are the
    published 100 : 1 and 0.1 for 20 latent frames at 480p."""

    kappa: float = 0.07  # weight beside distribution matching
    floor: float = 7e-5  # directions of a smaller root mean square are not brought to full length
    time: TimeDistribution = LogNormal()  # of the noise on data
    # or differences in time: semidiscrete (fd_type 1), discrete (fd_type 2); not with rounded
    # timesteps
    tangent: str = "exact"
    interval: float = (
        1e-2  # of the differences; the official 1e-4 is below the rounding of a float32 network
    )
    compute: str = "own"  # dtype in which the network of the tangent runs; own: the student's
    warmup_form: str = (
        "paper"  # of the direction; code2026: as the official code has it since January 2026
    )

    def __post_init__(self):
        if not 0 < self.kappa < math.inf or not 0 <= self.floor < math.inf:
            raise ValueError(
                f"SCM: kappa {self.kappa} must be positive, floor {self.floor} not negative"
            )
        if self.tangent not in consistency.TANGENT:
            raise ValueError(
                f"SCM.tangent is {self.tangent!r}; allowed: {', '.join(consistency.TANGENT)}"
            )
        if self.warmup_form not in consistency.WARMUPS:
            raise ValueError(
                f"SCM.warmup_form is {self.warmup_form!r}; allowed:"
                f" {', '.join(consistency.WARMUPS)}"
            )
        if self.compute not in ("own", *FLOATS):
            raise ValueError(f"SCM.compute is {self.compute!r}; allowed: own, {', '.join(FLOATS)}")
        if not 0 < self.interval < 0.5:
            raise ValueError(
                f"SCM.interval is {self.interval}; allowed: greater than 0, less than 0.5 of the"
                " pi/2 of TrigFlow time"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DCM:
    """Discrete-time consistency: `skip` Euler steps of the teacher on a shifted grid of `steps`
    intervals; no normalising."""

    weight: float = 100.0  # beside distribution matching; of a sum over the sample
    steps: int = 48  # intervals of the grid
    shift: float = 5.0  # of the grid towards noise
    skip: int = 1  # intervals between the student's two predictions

    def __post_init__(self):
        if not 0 < self.weight < math.inf or not 0 < self.shift < math.inf:
            raise ValueError(f"DCM: weight {self.weight} and shift {self.shift} must be positive")
        if not 1 <= self.skip < self.steps:
            raise ValueError(
                f"DCM: skip {self.skip} must be at least 1 and less than steps {self.steps}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RCMConfig:
    """The defaults are those of the 1.3B text-to-video run."""

    guidance: float = 5.0  # of the teacher; 1 for none
    consistency: SCM | DCM | None = SCM()  # None: distribution matching alone
    dmd_weight: float = (
        1.0  # of distribution matching; 0: consistency alone, without a critic and its turns
    )
    dmd_limit: float | None = (
        None  # greatest root mean square of the distribution-matching direction in a sample
    )
    sample_time: TimeDistribution = (
        UniformShift()
    )  # of the student's simulated steps, and of the noise on its samples
    max_steps: int = 4  # samples are made in 1, 2, ... this many steps in turn
    frequency: int = (
        5  # after the warm-up, the student has one turn in this many and the critic the others
    )
    # student turns at the start, without distribution matching, over which the tangent grows to
    # full length
    warmup: int = 1000
    ema: EMAConfig = EMAConfig()
    accumulate: int = 1  # microbatches in a batch

    def __post_init__(self):
        check_accumulate(self)
        if not 1 <= self.guidance < math.inf:
            raise ValueError(
                f"RCMConfig.guidance is {self.guidance}; allowed: 1 (none) and more (published: 5)"
            )
        if not 0 <= self.dmd_weight < math.inf or (
            self.dmd_limit is not None and not self.dmd_limit > 0
        ):
            raise ValueError(
                f"RCMConfig: dmd_weight {self.dmd_weight} must not be negative, dmd_limit"
                f" {self.dmd_limit} positive or None"
            )
        if self.max_steps < 1 or self.frequency < 1 or self.warmup < 0:
            raise ValueError(
                f"RCMConfig: max_steps {self.max_steps} and frequency {self.frequency} must be at"
                f" least 1, warmup {self.warmup} at least 0"
            )
        if self.frequency == 1 and self.dmd_weight:
            raise ValueError(
                "RCMConfig: frequency 1 gives the critic no turn; distribution matching needs at"
                " least 2"
            )
        if self.consistency is None and (self.warmup or not self.dmd_weight):
            raise ValueError(
                "RCMConfig: without a consistency term, warmup must be 0 and dmd_weight positive"
            )


RCM_1_3B = RCMConfig()
RCM_14B = RCMConfig(consistency=SCM(time=LogNormal(mean=1.5)), frequency=10, warmup=0)


# -- whose turn ------------------------------------------------------------------------------------


def is_student_turn(config: RCMConfig, step: int) -> bool:
    """Whether step 0, 1, ... updates the student; else it updates the critic."""
    return (
        config.dmd_weight == 0
        or step < config.warmup
        or (step - config.warmup) % config.frequency == 0
    )


def student_updates(config: RCMConfig, step):
    """Number of the student's update at its turn; works on traced steps."""
    if config.dmd_weight == 0:
        return step
    return jnp.where(
        step < config.warmup, step, config.warmup + (step - config.warmup) // config.frequency
    )


def critic_updates(config: RCMConfig, step):
    """Number of the critic's update at its turn (-1 before its first)."""
    return step - student_updates(config, step) - 1


# -- student ---------------------------------------------------------------------------------------


def scm_gradient(config: RCMConfig, model, teacher, batch: Batch, draws: dict, r):
    """-> (gradient of the mean, values of each sample) of the continuous-time consistency term."""
    own = config.consistency
    c = flow.from_log_sigma(draws["data_time"])
    x = flow.noisy(batch.latents, draws["data_noise"], flow.per_sample(c))
    v_teacher = guided_teacher(teacher, batch, config.guidance)(x, flow.TIME_SCALE * c.u)
    student = model if own.compute == "own" else with_compute(model, own.compute)
    v, term = consistency.TANGENT[own.tangent](
        velocity(student, batch.text, batch.image), x, v_teacher, c, own.interval
    )
    g = consistency.raw_direction(x, v_teacher - v, term, c, r, own.warmup_form)
    ok = whole(x, v, g)
    x, direction = lax.stop_gradient((keep(ok, x), keep(ok, consistency.normalised(g, own.floor))))

    def loss(model):
        values, again = consistency.consistency_loss(
            velocity(model, batch.text, batch.image), x, c, direction, own.kappa
        )
        values = keep(ok & whole(again), values)
        return values.mean(), values

    grads, values = jax.grad(loss, has_aux=True)(model)
    return grads, {
        "consistency": values,
        "rms_direction": rms(g),
        "rms_tangent": rms(term),
        "ok": ok,
    }


def dcm_gradient(config: RCMConfig, model, teacher, batch: Batch, draws: dict, r):
    """The same of the discrete-time consistency term; r is not used."""
    own = config.consistency
    s = consistency.dcm_times(draws["place"], own.steps, own.shift, own.skip)
    c, last = flow.from_log_sigma(s[0]), flow.from_log_sigma(s[-1])
    x = flow.noisy(batch.latents, draws["data_noise"], flow.per_sample(c))
    there = consistency.teacher_steps(guided_teacher(teacher, batch, config.guidance), x, s)
    target = data_of(velocity(model, batch.text, batch.image), there, last)
    ok = whole(x, target)
    x, target = lax.stop_gradient((keep(ok, x), keep(ok, target)))

    def loss(model):
        values = keep(
            ok,
            own.weight
            * consistency.dcm_loss(velocity(model, batch.text, batch.image), x, c, target),
        )
        return values.mean(), values

    grads, values = jax.grad(loss, has_aux=True)(model)
    return grads, {"consistency": values, "ok": ok}


def dmd_gradient(config: RCMConfig, state: DistillState, teacher, batch: Batch, draws: dict, count):
    """-> (gradient of the mean, values of each sample) of the distribution-matching term; only the
    last step has a gradient."""
    student = velocity(state.model, batch.text, batch.image)
    critic = velocity(state.critic, batch.text, batch.image)
    x, s = rollout(student, draws["noise"], draws["time"], count)
    ok = whole(x)

    def loss(model):
        made = data_of(
            velocity(model, batch.text, batch.image), keep(ok, x), flow.from_log_sigma(s)
        )
        guided = guided_teacher(teacher, batch, config.guidance)
        d, gap = lax.stop_gradient(
            dmd_direction(
                lax.stop_gradient(made),
                guided,
                critic,
                draws["renoise"],
                draws["renoise_time"],
                config.dmd_limit,
            )
        )
        good = ok & whole(made, d)
        values = config.dmd_weight * keep(good, dmd_loss(made, keep(good, d)))
        return values.mean(), {"dmd": values, "rms_dmd": rms(d), "dmd_distance": gap, "ok": good}

    return jax.grad(loss, has_aux=True)(state.model)


def rms(x):  # [b ...] -> [b]
    return jnp.sqrt(jnp.mean(jnp.square(x), tuple(range(1, x.ndim))))


def only_when(active, gradient: Callable):
    """gradient() -> (gradient, values of each sample) where `active` bool[] holds, else zeros and
    samples that are fine."""
    grads, samples = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradient))
    return lax.cond(active, gradient, lambda: (grads, samples | {"ok": ~samples["ok"]}))


def student_gradient(config: RCMConfig, state: DistillState, teacher, batch: Batch, draws: dict):
    """Both terms of a microbatch, one backward pass after the other."""
    parts = []
    if config.consistency is not None:
        term = scm_gradient if isinstance(config.consistency, SCM) else dcm_gradient
        r = jnp.minimum(1.0, state.step / config.warmup) if config.warmup else 1.0
        parts.append(term(config, state.model, teacher, batch, draws, r))
    if config.dmd_weight:
        count = student_updates(config, state.step) % config.max_steps + 1
        dmd = lambda: dmd_gradient(config, state, teacher, batch, draws, count)
        parts.append(only_when(state.step >= config.warmup, dmd) if config.warmup else dmd())
    grads = jax.tree.map(lambda *g: sum(g), *(grads for grads, _ in parts))
    samples = {name: value for _, values in parts for name, value in values.items()}
    loss = sum(samples[name] for name in ("consistency", "dmd") if name in samples)
    return grads, samples | {
        "loss": loss,
        "ok": jnp.stack([values["ok"] for _, values in parts]).all(0),
    }


def data_draws(config: RCMConfig, keys: dict, shape) -> dict:
    """Noise and time (log sigma; for DCM a place between 0 and 1) of the consistency term, batch
    axis first."""
    noise = {"data_noise": normal(keys["data_noise"], shape)}
    if isinstance(config.consistency, SCM):
        return noise | {"data_time": config.consistency.time.draw(keys["data_time"], shape[:1])}
    return noise | {"place": jax.random.uniform(keys["data_time"], shape[:1])}


def sample_draws(config: RCMConfig, keys: dict, shape) -> dict:
    """What `rollout` and the comparison of its result take, batch axis first."""
    b, n = shape[0], config.max_steps
    return {
        "noise": normal(keys["noise"], (b, n, *shape[1:])),
        "time": config.sample_time.draw(keys["time"], (b, n)).at[:, 0].set(jnp.inf),
        "renoise": normal(keys["renoise"], shape),
        "renoise_time": config.sample_time.draw(keys["renoise_time"], (b,)),
    }


def begin(config: RCMConfig, state: DistillState, batch: Batch):
    """Checks and the random keys of a step -> (batch in float32, keys)."""
    if (state.critic is None) != (config.dmd_weight == 0):
        raise UsageError(
            f"dmd_weight is {config.dmd_weight:g} and the state has"
            f" {'no' if state.critic is None else 'a'} critic",
            "distribution matching needs a critic, and consistency alone has none",
            "create the state with critic and critic_optimizer exactly where dmd_weight is not 0",
        )
    keys = named_keys(state, "data_noise", "data_time", "noise", "time", "renoise", "renoise_time")
    return dataclasses.replace(batch, latents=batch.latents.astype(jnp.float32)), keys


def make_student_step(config: RCMConfig, optimizer) -> Callable:
    """step(state, teacher, batch) -> (state, metrics), for the turns of `is_student_turn`."""

    def step(state, teacher, batch):
        batch, keys = begin(config, state, batch)
        draws = data_draws(config, keys, batch.latents.shape) if config.consistency else {}
        draws |= sample_draws(config, keys, batch.latents.shape) if config.dmd_weight else {}
        gradient = lambda arrays: student_gradient(config, state, teacher, *arrays)
        grads, samples = accumulated(gradient, (batch, draws), config.accumulate)
        model, opt, metrics = apply(optimizer, grads, state.opt, state.model)
        ema = ema_update(state.ema, model, student_updates(config, state.step), config.ema)
        state = dataclasses.replace(state, step=state.step + 1, model=model, ema=ema, opt=opt)
        return state, summary(samples) | metrics

    return step


# -- critic ----------------------------------------------------------------------------------------


def critic_gradient(config: RCMConfig, state: DistillState, batch: Batch, draws: dict):
    """-> (gradient of the mean, values of each sample) of the critic's loss on fresh samples of the
    student."""
    student = velocity(state.model, batch.text, batch.image)
    count = critic_updates(config, state.step) % config.max_steps + 1
    x, s = rollout(student, draws["noise"], draws["time"], count)
    made = data_of(student, x, flow.from_log_sigma(s))
    ok = whole(made)
    made = keep(ok, made)

    def loss(critic):
        values, v = critic_loss(
            velocity(critic, batch.text, batch.image), made, draws["renoise"], draws["renoise_time"]
        )
        good = ok & whole(v)
        return keep(good, values).mean(), {"loss": keep(good, values), "ok": good}

    return jax.grad(loss, has_aux=True)(state.critic)


def make_critic_step(config: RCMConfig, optimizer) -> Callable:
    """step(state, teacher, batch) -> (state, metrics), for the other turns. The teacher and the
    batch's latents are not used, only the shape of the latents is."""
    if not config.dmd_weight:
        raise ValueError("make_critic_step: dmd_weight is 0, and consistency alone has no critic")

    def step(state, teacher, batch):
        batch, keys = begin(config, state, batch)
        draws = sample_draws(config, keys, batch.latents.shape)
        gradient = lambda arrays: critic_gradient(config, state, *arrays)
        grads, samples = accumulated(gradient, (batch, draws), config.accumulate)
        critic, opt, metrics = apply(optimizer, grads, state.critic_opt, state.critic)
        state = dataclasses.replace(state, step=state.step + 1, critic=critic, critic_opt=opt)
        return state, summary(samples) | metrics

    return step
