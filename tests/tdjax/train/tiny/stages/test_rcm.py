"""A cycle of few-step distillation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_cases
import train_cases
from tolerances import assert_close

from tdjax.models.wan_dit import DiT, with_compute
from tdjax.precision import FLOAT32
from tdjax.train import metrics
from tdjax.train.optimizer import adamw
from tdjax.train.state import DistillState
from tdjax.train.tiny import settings, work
from tdjax.train.tiny.data import encoded
from tdjax.train.tiny.stages import rcm


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return tiny_cases.tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def some(tokens):
    return tiny_cases.shades(tokens)


@pytest.fixture(scope="module")
def text():
    return tiny_cases.text()


@pytest.fixture(scope="module")
def ran(some, text, tokens, tmp_path_factory):
    """ran(a network, a mesh, settings) -> (numbers of two cycles in the loop of a stage, its last
    state, what was seen at its checks: devices of the state, how often the cycle was traced)."""
    negative = encoded.embed(text, encoded.negative(tokens)[None])[0]

    def run(model, mesh=None, **more):
        fixed = {"batch": 4, "steps": 2, "chunk": 1, "warmup": 0, "compute": "float32"}
        cfg = settings.RCMStage(**fixed, **more)
        student_rates, critic_rates = (adamw(rcm.rates(cfg, 1e-3, n)) for n in (2, 8))
        run, checked, traced = work.Run(folder=tmp_path_factory.mktemp("rcm"), settings={}), [], []
        critic = {"critic": model, "critic_optimizer": critic_rates} if cfg.dmd_weight else {}
        create = lambda: DistillState.create(model, student_rates, jax.random.key(0), **critic)
        state = tiny_cases.jit(create)()
        cycle = rcm.make_cycle(cfg, student_rates, critic_rates)
        program = work.repeated(lambda *args: traced.append(1) or cycle(*args), 1, mesh)
        check = lambda state, step: checked.append((devices_of(state), len(traced))) or {}
        data = some, model, text, negative
        state = work.train(run, "rcm", state, program, 2, 1, data, check, 1, mesh)
        return metrics.read(run.work("rcm"))[0::2], state, checked

    return run


@pytest.fixture(scope="module")
def single(ran):
    """(the network that two cycles on one device began with, what `ran` says of them), without the
    consistency term."""
    model = tiny_cases.dit()
    return model, ran(model, kappa=0.0)


def moved(after, before):
    return max(
        float(np.abs(np.asarray(a) - np.asarray(b)).max())
        for a, b in zip(*map(jax.tree.leaves, (after, before)), strict=True)
    )


@pytest.mark.slow
def test_a_cycle_is_a_turn_of_the_student_and_four_of_the_critic(single):
    model, (rows, state, _) = single
    assert int(state.step) == 10
    assert len(rows) == 2 and all(np.isfinite(list(row.values())).all() for row in rows)
    assert moved(state.model, model) > 1e-4 and moved(state.critic, model) > 1e-4
    assert not any("consistency" in row for row in rows)


@pytest.mark.slow
def test_consistency_alone_has_no_critic(ran):
    """Every turn is the student's. Both terms in one step are in tests/tdjax/train."""
    model = tiny_cases.dit()
    rows, state, _ = ran(model, dmd_weight=0.0)
    assert int(state.step) == 2 and state.critic is None
    assert len(rows) == 2 and all(np.isfinite(list(row.values())).all() for row in rows)
    assert moved(state.model, model) > 1e-4
    assert all("consistency" in row and "dmd" not in row for row in rows)


@pytest.mark.slow
def test_the_tangent_may_run_in_another_dtype():
    model = tiny_cases.dit(
        dataclasses.replace(tiny_cases.DIT, policy=dataclasses.replace(FLOAT32, compute="bfloat16"))
    )
    exact = with_compute(model, "float32")
    assert exact.cfg.policy.compute == "float32" == exact.blocks.self_attn.cfg.policy.compute
    x = np.random.default_rng(0).normal(size=(1, 3, 4, 4, 8)).astype(np.float32)
    inputs, run = (x, jnp.float32([500]), jnp.ones((1, 32, 16))), tiny_cases.jit(DiT.__call__)
    assert_close(run(exact, *inputs), run(tiny_cases.dit(), *inputs), "float32")
    assert all(a is b for a, b in zip(jax.tree.leaves(exact), jax.tree.leaves(model), strict=True))


@pytest.mark.slow
def test_cycles_over_two_devices_are_those_of_one(single, ran):
    """The loop of a stage: its state goes back to the first device for a check and at the end, and
    one program serves all calls. The consistency term over devices is in tests/tdjax/train."""
    model, (one, before, alone) = single
    two, after, halved = ran(model, train_cases.mesh(data=2), kappa=0.0)
    for state, checked in ((before, alone), (after, halved)):
        assert checked[0] == checked[1] and checked[0][0] == devices_of(state)
        assert devices_of(state) == {jax.devices()[0]}
    for a, b in zip(one, two, strict=True):
        for key in a.keys() - {"step", "seconds_per_step"}:
            assert np.isclose(a[key], b[key], 1e-5, 0), (key, a[key], b[key])
    start = jax.tree.leaves(model)
    trained = jax.device_get((before.model, after.model))
    for x, y, z in zip(*map(jax.tree.leaves, trained), jax.device_get(start), strict=True):
        # Adam makes a step of full length of a gradient that is rounding.
        assert np.abs(x - y).mean() <= 0.01 * np.abs(x - z).mean() + 1e-9


def devices_of(tree):
    return {device for leaf in jax.tree.leaves(tree) for device in leaf.devices()}
