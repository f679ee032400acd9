"""Whole steps: on a flow in the plane, where training takes seconds, and through the video
transformer."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from einops import rearrange
from flax import nnx
from tolerances import assert_close

from pallas_kernels import flash_attention
from pallas_kernels.derivatives import with_derivatives
from tdjax.config import DiTConfig, SamplerConfig, SLAConfig
from tdjax.errors import UsageError
from tdjax.models.wan_dit import DiT
from tdjax.precision import FLOAT32
from tdjax.sampling import few_step, flow
from tdjax.train import flow_matching, rcm, sla
from tdjax.train.optimizer import OptimizerConfig, adamw
from tdjax.train.state import Batch, DistillState, EMAConfig, Teacher, TrainState, velocity
from tdjax.train.times import LogNormal, UniformShift

SAMPLES = 1000
jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)  # compiled quickly rather than well


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
    config = flow_matching.FlowMatchingConfig(
        time=UniformShift(shift=1.0), ema=EMAConfig(decay=0.98)
    )
    step = flow_matching.make_step(config, adamw(rates))
    state = TrainState.create(plane(), adamw(rates), jax.random.key(0))
    state, metrics = many(lambda state, i: step(state, None, batch(i)), state, 400)
    return state, {name: np.asarray(value) for name, value in metrics.items()}


@jit
def two_steps(model):
    noise = jax.random.normal(jax.random.key(5), (2, SAMPLES, 1, 1, 1, 2))
    times = flow.times(SamplerConfig(steps=2, mid=(1.0,)))
    return few_step.sample(velocity(model, text(SAMPLES)), noise, times, "sde")[0]


@jit
def many_steps(model):
    noise = jax.random.normal(jax.random.key(5), (SAMPLES, 1, 1, 1, 2))
    cfg = SamplerConfig(mode="euler", steps=50, shift=1.0)
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

    assert not config.dmd_weight or [rcm.is_student_turn(config, i) for i in range(4)] == [
        True,
        False,
        True,
        False,
    ]
    state, metrics = many(cycle, state, turns)
    assert (
        all(np.isfinite(value).all() for value in metrics.values())
        and (metrics["bad_samples"] == 0).all()
    )
    return state


@pytest.mark.parametrize(
    "config",
    [
        rcm.RCMConfig(consistency=rcm.SCM(kappa=1.0, time=LogNormal(mean=0.0)), **PLANE),
        rcm.RCMConfig(
            consistency=rcm.DCM(weight=1.0, steps=24, shift=1.0), dmd_weight=0.0, **PLANE
        ),
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


# -- properties of steps ---------------------------------------------------------------------------

RCM = rcm.RCMConfig(guidance=2.0, consistency=rcm.SCM(kappa=1.0), warmup=4, max_steps=2)
FLOW = flow_matching.FlowMatchingConfig(dropout=0.3)
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


def difference(a, b):
    return jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), a, b)


def norm(tree):
    return float(
        np.sqrt(sum(np.square(np.asarray(x, np.float64)).sum() for x in jax.tree.leaves(tree)))
    )


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
        jnp.zeros((3, 2, 1)), jnp.ones((3, 2, 1)), jnp.array([True, False, True])
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
            flow_matching.make_step(flow_matching.FlowMatchingConfig(dropout=0.1), PLAIN),
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


@pytest.mark.parametrize(
    "message, make",
    [
        ("accumulate is 0", lambda: rcm.RCMConfig(accumulate=0)),
        ("accumulate is 0", lambda: sla.SLATrainingConfig(accumulate=0)),
        ("dropout is 1; it is a probability", lambda: flow_matching.FlowMatchingConfig(dropout=1)),
        (
            "target is 'student'; allowed: teacher, data",
            lambda: sla.SLATrainingConfig(target="student"),
        ),
        ("guidance is 0.5", lambda: rcm.RCMConfig(guidance=0.5)),
        ("dmd_weight -1 must not be negative", lambda: rcm.RCMConfig(dmd_weight=-1)),
        ("max_steps 0 and frequency 5", lambda: rcm.RCMConfig(max_steps=0)),
        ("frequency 1 gives the critic no turn", lambda: rcm.RCMConfig(frequency=1)),
        ("without a consistency term, warmup must be 0", lambda: rcm.RCMConfig(consistency=None)),
        ("kappa 0 must be positive", lambda: rcm.SCM(kappa=0)),
        ("tangent is 'fd'; allowed: exact, semidiscrete, discrete", lambda: rcm.SCM(tangent="fd")),
        ("warmup_form is 'code'; allowed: paper, code2026", lambda: rcm.SCM(warmup_form="code")),
        ("interval is 0; allowed", lambda: rcm.SCM(interval=0)),
        ("skip 48 must be at least 1 and less than steps 48", lambda: rcm.DCM(skip=48)),
    ],
)
def test_refused_settings(message, make):
    with pytest.raises(ValueError, match=message):
        make()


def test_published_settings():
    assert (rcm.RCM_1_3B.frequency, rcm.RCM_1_3B.warmup, rcm.RCM_1_3B.consistency.time) == (
        5,
        1000,
        LogNormal(mean=0.7, deviation=1.6),
    )
    assert (rcm.RCM_14B.frequency, rcm.RCM_14B.warmup, rcm.RCM_14B.consistency.time) == (
        10,
        0,
        LogNormal(mean=1.5, deviation=1.6),
    )
    size = 16 * 20 * 60 * 104
    np.testing.assert_allclose(rcm.SCM().kappa * size**0.5, 100, rtol=0.02)
    np.testing.assert_allclose(rcm.SCM().floor * size**0.5, 0.1, rtol=0.02)
    assert sla.SLATrainingConfig().time == LogNormal(mean=1.5, deviation=1.6)


# -- the video transformer -------------------------------------------------------------------------

TINY = DiTConfig(dim=16, heads=2, ffn_dim=12, layers=2, in_channels=3, out_channels=3, freq_dim=8, text_dim=5, text_len=4,
                 round_time=False, policy=FLOAT32, sla=SLAConfig(topk=0.34, block_q=64, block_k=64))  # fmt: skip


def dit(seed=0, **changes):
    """A model whose every leaf is random but the projection of the linear branch, which starts at
    zero."""
    cfg = dataclasses.replace(TINY, **changes)
    names = jax.eval_shape(lambda: DiT(cfg, rngs=nnx.Rngs(0)))
    draw = np.random.default_rng(seed).normal
    value = lambda path, x: (
        jnp.zeros(x.shape)
        if "proj" in str(path) and "core" in str(path)
        else jnp.asarray(draw(size=x.shape) / 4, x.dtype)
    )
    return jax.tree_util.tree_map_with_path(value, names)


def clip(t, h, w, b=2):
    draw = np.random.default_rng(3).normal
    return Batch(
        jnp.asarray(draw(size=(b, t, h, w, 3)), jnp.float32),
        jnp.asarray(draw(size=(b, 4, 5)), jnp.float32),
    )


network = jit(lambda model, x, timestep, text: model(x, timestep, text))


def test_white_box_loss_is_the_distance_to_dense_attention():
    """Nothing for itself, nothing but rounding when every block is chosen, more when one of three
    is."""
    data = clip(3, 16, 16)  # 192 tokens
    eps, s = (
        jnp.asarray(np.random.default_rng(4).normal(size=data.latents.shape), jnp.float32),
        jnp.array([0.3, 1.9]),
    )
    dense = lambda x, timestep: network(dit(), x, timestep, data.text)

    def loss(**own):
        model = dit(attention="sla", sla=dataclasses.replace(TINY.sla, **own))
        student = lambda x, timestep: network(model, x, timestep, data.text)
        return [
            sla.white_box_loss(student, other, data.latents, eps, s)[0]
            for other in (student, dense)
        ]

    same, rounding = loss(topk=1.0)
    assert (np.asarray(same) == 0).all() and (np.asarray(rounding) < 1e-10).all()
    same, sparse = loss(topk=0.34)
    assert (np.asarray(same) == 0).all() and (np.asarray(sparse) > 1e-5).all()


def test_sla_step_brings_the_student_to_the_teacher():
    data, optimizer = (
        clip(3, 16, 16, 1),
        adamw(OptimizerConfig(learning_rate=3e-4, b1=0.9, warmup=0)),
    )
    step = jit(sla.make_step(sla.SLATrainingConfig(), optimizer), donate_argnums=0)
    state = TrainState.create(dit(attention="sla"), optimizer, jax.random.key(0))
    losses = []
    for _ in range(10):
        state = dataclasses.replace(state, step=jnp.int32(0))  # the same noise and times
        state, metrics = step(state, Teacher(dit()), data)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.7 * losses[0]
    assert (
        norm(state.model.blocks.self_attn.core.proj.kernel[...]) > 0
    )  # the linear branch has begun to learn


def opaque(q, k, v, scale=None):
    """Attention that JAX cannot look into, as kernels are: derivatives are what is declared."""
    run = flash_attention.reference.attention
    return with_derivatives(
        lambda *args: (run(*args), None),
        tangent=lambda args, _, tangents: jax.jvp(run, args, tangents)[1],
        grad=lambda args, _, cotangent: jax.vjp(run, *args)[1](cotangent),
    )(q, k, v)


def test_kernels_with_declared_derivatives_can_be_distilled(monkeypatch):
    """Tangent outside the loss, gradient inside, blocks scanned and recomputed: as with attention
    that JAX differentiates itself.

    The whole step, with microbatches and both terms, is traced; the consistency term, which has the
    tangent, is also computed.
    """
    monkeypatch.setitem(flash_attention.IMPLEMENTATIONS["attention"], "opaque", opaque)
    data, teacher = clip(1, 4, 4), lambda impl: Teacher(dit(2, impl=impl), jnp.ones((4, 5)))
    config = rcm.RCMConfig(warmup=1, accumulate=2)
    student = dit(0, impl="opaque")
    state = DistillState.create(
        student, PLAIN, jax.random.key(0), critic=student, critic_optimizer=PLAIN
    )
    for make in (rcm.make_student_step, rcm.make_critic_step):
        after, _ = jax.eval_shape(make(config, PLAIN), state, teacher("opaque"), data)
        assert jax.tree.structure(after) == jax.tree.structure(state)
    noise = jnp.asarray(np.random.default_rng(5).normal(size=data.latents.shape), jnp.float32)
    draws = {"data_noise": noise, "data_time": jnp.array([0.2, 1.7])}
    run = jit(lambda model, teacher: rcm.scm_gradient(config, model, teacher, data, draws, 1.0))
    (expected, one), (actual, two) = (
        run(dit(0, impl=impl), teacher(impl)) for impl in ("reference", "opaque")
    )
    expected, actual = jax.tree.leaves(expected), jax.tree.leaves(actual)
    assert norm(expected) > 1e-3 and one["ok"].all()
    assert norm(difference(actual, expected)) < 1e-4 * norm(expected)
    for name in one:
        np.testing.assert_allclose(two[name], one[name], rtol=1e-4)
