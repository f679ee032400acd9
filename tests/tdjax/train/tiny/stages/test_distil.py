"""Sparse attention follows the teacher; a cycle of few-step distillation; merging adds up."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_cases
from tolerances import assert_close

from tdjax.checkpoints import orbax
from tdjax.models.wan_dit import with_compute
from tdjax.precision import FLOAT32
from tdjax.train.optimizer import OptimizerConfig, adamw
from tdjax.train.sla import SLATrainingConfig
from tdjax.train.state import DistillState, TrainState
from tdjax.train.tiny import settings
from tdjax.train.tiny.data import encoded
from tdjax.train.tiny.evaluation import sampling
from tdjax.train.tiny.stages import distil


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return tiny_cases.tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def some(tokens):
    return tiny_cases.shades(tokens)


@pytest.fixture(scope="module")
def text():
    return tiny_cases.text()


@pytest.mark.slow
def test_sparse_attention_follows_the_teacher(some, text):
    """Latents of three frames of 16 tokens are one block: its linear branch alone differs, and
    begins at nothing."""
    optimizer = adamw(OptimizerConfig(learning_rate=1e-3, b1=0.9, warmup=0))
    dense = tiny_cases.dit()
    student = distil.sparse(dense, tiny_cases.SLA, "float32")
    x, t, rows = (
        jax.random.normal(jax.random.key(0), (1, 3, 4, 4, 8)),
        jnp.float32([500]),
        jnp.zeros((1, 32, 16)),
    )
    assert_close(student(x, t, rows), dense(x, t, rows), "float32")
    start = tiny_cases.dit(seed=4)
    state = TrainState.create(
        distil.sparse(start, tiny_cases.SLA, "float32"), optimizer, jax.random.key(1)
    )
    program = tiny_cases.repeated(distil.make_sla_step(SLATrainingConfig(), optimizer, 8), 20)
    state, numbers = program(state, some, dense, text)
    losses = np.asarray(numbers["loss"])
    assert losses[-5:].mean() < 0.7 * losses[:5].mean()


@pytest.mark.slow
@pytest.mark.parametrize("kappa", [1.0, 0.0])
def test_a_cycle_is_a_turn_of_the_student_and_four_of_the_critic(some, text, tokens, kappa):
    cfg = settings.RCMStage(
        batch=2,
        steps=6,
        warmup=0,
        compute="float32",
        tangent="float32",
        kappa=kappa,
        learning_rate=1e-3,
    )
    student_rates, critic_rates = (adamw(distil.rates(cfg, 1e-3, n)) for n in (6, 24))
    model = tiny_cases.dit()
    state = DistillState.create(
        model, student_rates, jax.random.key(0), critic=model, critic_optimizer=critic_rates
    )
    negative = distil.embed(text, encoded.negative(tokens)[None])[0]
    state, numbers = tiny_cases.repeated(
        distil.make_rcm_cycle(cfg, student_rates, critic_rates), 2
    )(state, some, model, text, negative)
    assert int(state.step) == 10 and all(np.isfinite(np.asarray(x)).all() for x in numbers.values())
    moved = lambda after: max(
        float(jnp.abs(a - b).max())
        for a, b in zip(*map(jax.tree.leaves, (after, model)), strict=True)
    )
    assert moved(state.model) > 1e-4 and moved(state.critic) > 1e-4
    assert ("consistency" in numbers) == (kappa > 0)


def test_the_tangent_may_run_in_another_dtype():
    model = tiny_cases.dit(
        dataclasses.replace(tiny_cases.DIT, policy=dataclasses.replace(FLOAT32, compute="bfloat16"))
    )
    exact = with_compute(model, "float32")
    assert exact.cfg.policy.compute == "float32" == exact.blocks.self_attn.cfg.policy.compute
    x, t, rows = (
        jax.random.normal(jax.random.key(0), (1, 3, 4, 4, 8)),
        jnp.float32([500]),
        jnp.ones((1, 32, 16)),
    )
    assert_close(exact(x, t, rows), tiny_cases.dit()(x, t, rows), "float32")
    assert all(a is b for a, b in zip(jax.tree.leaves(exact), jax.tree.leaves(model), strict=True))


def test_merging_adds_what_sparse_attention_changed():
    student, before = tiny_cases.dit(seed=1), tiny_cases.dit(seed=2)
    after = distil.sparse(tiny_cases.dit(seed=3), tiny_cases.SLA, "float32")
    leaves = orbax.named_leaves(after)
    leaves["blocks.self_attn.core.proj.bias"] = leaves["blocks.self_attn.core.proj.bias"] + 0.5
    after = orbax.assemble(orbax.abstract("dit", tiny_cases.SLA), leaves)
    out = orbax.named_leaves(distil.merged(student, before, after, tiny_cases.SLA, "float32"))
    name = "blocks.up.kernel"
    a, b, c = (orbax.named_leaves(model)[name] for model in (student, before, after))
    assert_close(out[name], a + c - b, "float32")
    assert np.all(np.asarray(out["blocks.self_attn.core.proj.bias"]) == 0.5)


def test_healing_takes_the_times_of_the_sampler():
    times = np.asarray(distil.StudentTimes().draw(jax.random.key(0), (400,)))
    grid = sampling.student(4)
    wanted = np.log(np.tan([np.arctan(grid.sigma_max), *grid.mid]))
    assert np.allclose(np.unique(times), np.sort(wanted), atol=1e-5)
