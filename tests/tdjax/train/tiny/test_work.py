"""The runner of a stage: chunks, checks, a cut run that goes on to the same bits; and what the
settings become."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tdjax.errors import NotFinite
from tdjax.progress import Stages
from tdjax.train.tiny import work


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    step: jax.Array
    x: jax.Array
    key: jax.Array


def state():
    return State(jnp.int32(0), jnp.zeros(3), jax.random.key(5))


def step(state, bonus):
    noise = jax.random.normal(jax.random.fold_in(state.key, state.step), (3,))
    x = 0.9 * state.x + noise + bonus
    return dataclasses.replace(state, step=state.step + 1, x=x), {"loss": jnp.square(x).mean()}


def a_run(folder, **more):
    return work.Run(folder=folder, settings={}, stages=Stages(False), **more)


PROGRAM = work.repeated(step, 5)


def test_a_cut_run_goes_on_to_the_same_bits(tmp_path):
    bonus = (jnp.float32(0.5),)
    whole = work.train(a_run(tmp_path / "a"), "stage", state(), PROGRAM, 20, 5, bonus)
    with pytest.raises(work.OutOfTime, match="stopped at step 5 of 20"):
        work.train(a_run(tmp_path / "b", until=0.0), "stage", state(), PROGRAM, 20, 5, bonus)
    again = work.train(a_run(tmp_path / "b"), "stage", state(), PROGRAM, 20, 5, bonus)
    assert int(again.step) == 20 and np.array_equal(whole.x, again.x)
    rows = [
        json.loads(line)
        for line in (tmp_path / "b/work/stage/metrics.jsonl").read_text().splitlines()
    ]
    assert [row["step"] for row in rows] == [5, 10, 15, 20] and all(row["loss"] > 0 for row in rows)


def test_one_program_serves_all_chunks(tmp_path):
    """Also where the first state is bound to no device, and the data are."""
    program, bonus = work.repeated(step, 5), (jax.device_put(jnp.float32(0.5), jax.devices()[0]),)
    work.train(a_run(tmp_path), "stage", jax.jit(state)(), program, 15, 5, bonus)
    assert program._cache_size() == 1


def test_checks_and_a_loss_that_is_not_finite(tmp_path):
    seen = []
    bad = lambda state, bonus: PROGRAM(
        dataclasses.replace(state, x=jnp.where(state.step < 10, state.x, jnp.nan)), bonus
    )
    check = lambda state, done: seen.append((done, int(state.step))) or {"score": float(done)}
    run, bonus = a_run(tmp_path), (jnp.float32(0),)
    work.train(run, "good", state(), PROGRAM, 15, 5, bonus, check, 10)
    assert seen == [(10, 10), (15, 15)]
    with pytest.raises(NotFinite, match="step 15"):
        work.train(run, "bad", state(), bad, 15, 5, bonus)


def test_keys_of_different_uses_differ(tmp_path):
    keys = [
        a_run(tmp_path, seed=seed).key(use) for seed in (0, 1) for use in ("vae steps", "sla steps")
    ]
    assert len({tuple(np.asarray(jax.random.key_data(key)).tolist()) for key in keys}) == 4
