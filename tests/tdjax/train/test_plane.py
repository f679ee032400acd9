"""Whole steps on a flow in the plane, where training takes seconds."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from arrays import put
from dit_cases import difference, jit, norm
from einops import rearrange
from flax import nnx
from tolerances import assert_close

from tdjax.config import SamplerConfig
from tdjax.errors import UsageError
from tdjax.sampling import few_step, schedules
from tdjax.train import flow_matching, methods, rcm
from tdjax.train.configs import (
    DCM,
    SCM,
    EMAConfig,
    FlowMatchingConfig,
    LogNormal,
    OptimizerConfig,
    RCMConfig,
    UniformShift,
)
from tdjax.train.optimizer import adamw
from tdjax.train.state import Batch, DistillState, Teacher, TrainState
from tdjax.train.step import velocity

SAMPLES = 1000


class Plane(nnx.Module):
    """Velocity of points in the plane, as latents [b 1 1 1 2]; text [b 1 1] is one more input."""

    def __init__(self, width=48, *, rngs):
        kernel = lambda i, o, scale=1.0: nnx.Param(
            scale * jax.random.normal(rngs.params(), (i, o)) * i**-0.5
        )
        self.embed, self.first, self.second = (
            kernel(11, width),
            kernel(width, width),
            kernel(width, width),
        )
        self.out, self.bias = kernel(width, 2, 0.1), nnx.Param(jnp.zeros((3, width)))

    def __call__(self, x, timestep, text, image=None):
        angle = timestep[:, None] / 1000 * jnp.arange(1, 5, dtype=jnp.float32) * (np.pi / 2)
        y = jnp.concatenate(
            [rearrange(x, "b 1 1 1 c -> b c"), jnp.cos(angle), jnp.sin(angle), text[:, 0]], -1
        )
        bias = self.bias[...]
        y = jax.nn.silu(y @ self.embed[...] + bias[0])
        for kernel, b in ((self.first, bias[1]), (self.second, bias[2])):
            y = y + jax.nn.silu(y @ kernel[...] + b)
        return rearrange(y @ self.out[...], "b c -> b 1 1 1 c")


def ring(key, n):
    """Eight small clouds around the origin."""
    which, where = jax.random.split(key)
    angle = jax.random.randint(which, (n,), 0, 8).astype(jnp.float32) * (np.pi / 4)
    return rearrange(
        jnp.stack([jnp.cos(angle), jnp.sin(angle)], -1) * 1.3
        + 0.08 * jax.random.normal(where, (n, 2)),
        "b c -> b 1 1 1 c",
    )


def text(n):
    return jnp.zeros((n, 1, 1))


def batch(i, n=128):
    return Batch(ring(jax.random.fold_in(jax.random.key(7), i), n), text(n))


def plane():
    return Plane(rngs=nnx.Rngs(0))


def many(one, state, turns):
    return jit(lambda state: jax.lax.scan(one, state, jnp.arange(turns)))(state)


@pytest.fixture(scope="module")
def teacher():
    """A flow-matching model of the ring, and its losses."""
    rates = OptimizerConfig(
        learning_rate=3e-3, b1=0.9, warmup=20, decay="linear", steps=400, decay_from=0.5
    )
    config = FlowMatchingConfig(time=UniformShift(shift=1.0), ema=EMAConfig(decay=0.98))
    step = flow_matching.make_step(config, adamw(rates))
    state = TrainState.create(plane(), adamw(rates), jax.random.key(0))
    state, metrics = many(lambda state, i: step(state, None, batch(i)), state, 400)
    return state, {name: np.asarray(value) for name, value in metrics.items()}


@jit
def two_steps(model):
    noise = jax.random.normal(jax.random.key(5), (2, SAMPLES, 1, 1, 1, 2))
    times = schedules.times(SamplerConfig(num_steps=2, mid_t=(1.0,)))
    return few_step.sample(velocity(model, text(SAMPLES)), noise, times, "sde")[0]


@jit
def many_steps(model):
    noise = jax.random.normal(jax.random.key(5), (SAMPLES, 1, 1, 1, 2))
    cfg = SamplerConfig(sampler="euler", num_steps=50, shift=1.0)
    return few_step.sample_teacher(velocity(model, text(SAMPLES)), noise, cfg)[0]


def energy_distance(a, b):
    a, b = (np.asarray(x, np.float64).reshape(-1, 2) for x in (a, b))
    mean = lambda x, y: np.linalg.norm(x[:, None] - y[None], axis=-1).mean()
    return 2 * mean(a, b) - mean(a, a) - mean(b, b)


def off_ring(x):
    """Mean distance to the nearest cloud's centre."""
    angle = np.arange(8) * (np.pi / 4)
    centres = 1.3 * np.stack([np.cos(angle), np.sin(angle)], -1)
    return np.linalg.norm(np.asarray(x).reshape(-1, 1, 2) - centres, axis=-1).min(1).mean()


@pytest.mark.slow
def test_flow_matching_learns_the_ring(teacher):
    """The loss falls to that of the best velocity, which is not zero; samples lie where the data
    lie."""
    state, metrics = teacher
    loss = metrics["loss"]
    assert loss[-50:].mean() < 0.8 * loss[:10].mean()
    assert (
        int(state.step) == 400
        and (metrics["bad_samples"] == 0).all()
        and (metrics["bad_gradients"] == 0).all()
    )
    assert off_ring(many_steps(state.ema)) < 0.6 * off_ring(many_steps(plane()))


PLANE = {
    "guidance": 1.0,
    "sample_time": UniformShift(shift=1.0),
    "warmup": 0,
    "frequency": 2,
    "max_steps": 2,
}


def distilled(config, model, turns):
    rates = OptimizerConfig(
        learning_rate=1e-3, warmup=10, decay="linear", steps=turns, decay_from=0.5
    )
    optimizer, critic_optimizer = (
        adamw(rates),
        adamw(OptimizerConfig(learning_rate=1e-3, warmup=10)),
    )
    critic = {"critic": model, "critic_optimizer": critic_optimizer} if config.dmd_weight else {}
    state = DistillState.create(model, optimizer, jax.random.key(1), **critic)
    student_step = rcm.make_student_step(config, optimizer)

    def cycle(state, i):
        state, metrics = student_step(state, Teacher(model), batch(i))
        if config.dmd_weight:
            state, more = rcm.make_critic_step(config, critic_optimizer)(
                state, Teacher(model), batch(i)
            )
            metrics |= {"critic_loss": more["loss"]}
        return state, metrics

    if config.dmd_weight:  # the cycle is the one that the loop would take
        schedule = methods.rcm_schedule(config)
        assert [schedule.phase(i) for i in range(4)] == ["student", "critic"] * 2
    state, metrics = many(cycle, state, turns)
    assert (
        all(np.isfinite(value).all() for value in metrics.values())
        and (metrics["bad_samples"] == 0).all()
    )
    return state


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        RCMConfig(consistency=SCM(kappa=1.0, time=LogNormal(mean=0.0)), **PLANE),
        RCMConfig(consistency=DCM(weight=1.0, steps=24, shift=1.0), dmd_weight=0.0, **PLANE),
    ],
    ids=["rcm", "dcm"],
)
def test_two_steps_of_the_student_are_better_than_two_of_its_teacher(teacher, config):
    """Energy distance to fifty steps of the teacher."""
    model = teacher[0].ema
    goal = many_steps(model)
    before = energy_distance(two_steps(model), goal)
    after = energy_distance(two_steps(distilled(config, model, 150).ema), goal)
    assert before > 0.1 and after < before / 10


RCM = RCMConfig(guidance=2.0, consistency=SCM(kappa=1.0), warmup=4, max_steps=2)


FLOW = FlowMatchingConfig(dropout=0.3)


PLAIN = optax.sgd(1e-2)  # the update shows the gradient


@functools.cache
def small_step(config, kind):
    make = {
        "flow": flow_matching.make_step,
        "student": rcm.make_student_step,
        "critic": rcm.make_critic_step,
    }[kind]
    return jit(make(config, PLAIN))


def small_state(kind, step=0):
    if kind == "flow":
        state = TrainState.create(plane(), PLAIN, jax.random.key(2))
    else:
        state = DistillState.create(
            plane(), PLAIN, jax.random.key(2), critic=plane(), critic_optimizer=PLAIN
        )
    return dataclasses.replace(state, step=jnp.int32(step))


def guide():
    """A teacher that is not the student, with a negative embedding that matters."""
    other = Plane(rngs=nnx.Rngs(1))
    other.out = nnx.Param(5 * other.out[...])
    return Teacher(other, jnp.ones((1, 1)))


def updates(config, kind, data, step=0):
    """What one step adds to the trained network, and its metrics."""
    state = small_state(kind, step)
    after, metrics = small_step(config, kind)(state, guide(), data)
    name = "critic" if kind == "critic" else "model"
    assert int(after.step) == step + 1
    others = (
        {"critic", "critic_opt"}
        if kind == "student"
        else {"model", "ema", "opt"}
        if kind == "critic"
        else set()
    )
    for other in others:
        jax.tree.map(np.testing.assert_array_equal, getattr(after, other), getattr(state, other))
    return difference(getattr(after, name), getattr(state, name)), metrics


@pytest.mark.slow
@pytest.mark.parametrize(
    "config, kind", [(FLOW, "flow"), (RCM, "student")], ids=["flow", "student"]
)
def test_two_microbatches_are_one_batch(config, kind):
    whole, one = updates(config, kind, batch(0, 8), 4)
    halves, two = updates(dataclasses.replace(config, accumulate=2), kind, batch(0, 8), 4)
    assert norm(whole) > 1e-4
    jax.tree.map(lambda a, b: assert_close(a, b, "float32"), halves, whole)
    assert one.keys() == two.keys() and all(np.isclose(one[k], two[k], rtol=1e-4) for k in one)


@pytest.mark.parametrize(
    "config, kind", [(FLOW, "flow"), (RCM, "student")], ids=["flow", "student"]
)
def test_a_sample_with_a_nan_is_left_out_whole(config, kind):
    """The gradients without one half and without the other add up to that of all; before the end of
    the warm-up only data count."""
    good = batch(0, 8)
    poison = lambda *bad: dataclasses.replace(
        good, latents=good.latents.at[np.array(bad), 0, 0, 0, 0].set(jnp.nan)
    )
    total, clean = updates(config, kind, good, 1)
    first, metrics = updates(config, kind, poison(0, 1, 2), 1)
    second, _ = updates(config, kind, poison(3, 4, 5, 6, 7), 1)
    assert (
        float(metrics["bad_samples"]) == 3
        and float(metrics["bad_gradients"]) == 0
        and float(clean["bad_samples"]) == 0
    )
    assert np.isfinite(metrics["loss"]) and norm(first) > 1e-5 and norm(second) > 1e-5
    jax.tree.map(lambda a, b, c: assert_close(a + b, c, "float32"), first, second, total)
    nothing, metrics = updates(config, kind, poison(*range(8)), 1)
    assert norm(nothing) == 0 and float(metrics["bad_samples"]) == 8 and np.isnan(metrics["loss"])


def test_distribution_matching_waits_for_the_end_of_the_warm_up():
    (_, early), (_, late) = (
        updates(RCM, "student", batch(0, 8), 3),
        updates(RCM, "student", batch(0, 8), 4),
    )
    assert float(early["dmd"]) == 0 and float(early["bad_samples"]) == 0
    assert float(early["loss"]) == float(early["consistency"])
    assert float(late["dmd"]) > 0
    np.testing.assert_allclose(late["loss"], late["consistency"] + late["dmd"], rtol=1e-5)


def test_a_critic_learns_the_students_samples_and_not_the_data():
    first, _ = updates(RCM, "critic", batch(0, 8), 5)
    other, _ = updates(RCM, "critic", batch(1, 8), 5)
    later, _ = updates(RCM, "critic", batch(0, 8), 6)
    jax.tree.map(np.testing.assert_array_equal, first, other)
    assert norm(difference(first, later)) > 1e-4


def test_dropped_captions():
    seen = flow_matching.drop_captions(
        jnp.zeros((3, 2, 1)), jnp.ones((3, 2, 1)), put([True, False, True])
    )
    np.testing.assert_array_equal(seen[:, :, 0], [[1, 1], [0, 0], [1, 1]])
    state, data = small_state("flow"), batch(0, 8)
    other = dataclasses.replace(guide(), negative=2 * jnp.ones((1, 1)))
    models = [
        small_step(FLOW, "flow")(state, teacher, data)[0].model for teacher in (guide(), other)
    ]
    assert norm(difference(*models)) > 1e-5  # the negative embedding was seen


def test_refusals():
    state, data = small_state("student"), batch(0, 4)
    with pytest.raises(UsageError, match="guidance 2 needs the embedding of the negative prompt"):
        jax.eval_shape(rcm.make_student_step(RCM, PLAIN), state, Teacher(plane()), data)
    with pytest.raises(UsageError, match="caption dropout needs the embedding"):
        jax.eval_shape(
            flow_matching.make_step(FlowMatchingConfig(dropout=0.1), PLAIN),
            small_state("flow"),
            None,
            data,
        )
    with pytest.raises(UsageError, match="dmd_weight is 1 and the state has no critic"):
        jax.eval_shape(
            rcm.make_student_step(RCM, PLAIN),
            dataclasses.replace(state, critic=None, critic_opt=None),
            guide(),
            data,
        )
    with pytest.raises(ValueError, match="consistency alone has no critic"):
        rcm.make_critic_step(dataclasses.replace(RCM, dmd_weight=0.0), PLAIN)
