"""Checkpoints on disk: complete or absent, refused with their differences, back to the bit."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from train_cases import (
    run,
    same_bits,
    state,
)

from tdjax.errors import CheckpointError
from tdjax.train import checkpoints


@pytest.mark.slow
def test_the_last_checkpoints_stay(tmp_path):
    run(tmp_path, save_every=1, keep=3)
    assert checkpoints.steps(tmp_path) == [6, 7, 8]
    run(tmp_path / "all", save_every=3, keep=0)
    assert checkpoints.steps(tmp_path / "all") == [3, 6, 8]


def test_checkpoints_are_deleted(tmp_path):
    for number in (1, 2, 3):
        checkpoints.save(tmp_path, number, state(), {})
    checkpoints.delete(tmp_path, keep=1)
    assert checkpoints.steps(tmp_path) == [3]
    checkpoints.delete(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_is_whole_or_not_there(tmp_path, monkeypatch):
    checkpoints.save(tmp_path, 1, state(), {})
    monkeypatch.setattr(
        checkpoints.json, "dumps", lambda *_, **__: 1 / 0
    )  # the manifest is written last
    with pytest.raises(ZeroDivisionError):
        checkpoints.save(tmp_path, 2, state(), {})
    assert [p.name for p in tmp_path.iterdir()] == ["step_000001"]
    assert checkpoints.latest(tmp_path).name == "step_000001"
    assert checkpoints.latest(tmp_path / "none") is None


def test_another_state_is_refused_with_its_differences(tmp_path):
    checkpoints.save(tmp_path, 1, state(), {})
    shapes = jax.eval_shape(state)
    wrong = dataclasses.replace(
        shapes, model=shapes.model | {"w": jax.ShapeDtypeStruct((4,), jnp.float32)}
    )
    with pytest.raises(
        CheckpointError,
        match=r"another train state.*\ndifferent   model.w \[2\] float32, expected \[4\] float32",
    ) as error:
        checkpoints.restore(tmp_path / "step_000001", wrong)
    assert error.value.exit_code == 3


def test_a_damaged_checkpoint_is_refused(tmp_path):
    path = checkpoints.save(tmp_path, 1, state(), {})
    for part in (path / "state").rglob("*"):
        if part.is_file():
            part.write_bytes(b"")
    with pytest.raises(CheckpointError, match="state cannot be read"):
        checkpoints.restore(path, jax.eval_shape(state))
    (path / "manifest.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no checkpoint of a run"):
        checkpoints.inspect(path)


def test_random_keys_of_every_kind_come_back(tmp_path):
    for number, kind in enumerate(("threefry2x32", "rbg")):
        start = dataclasses.replace(state(), key=jax.random.key(5, impl=kind))
        shapes = jax.eval_shape(lambda start=start: start)
        same_bits(checkpoints.restore(checkpoints.save(tmp_path, number, start, {}), shapes), start)
    with pytest.raises(CheckpointError, match=r"different   key \[4\] uint32, expected \[2\]"):
        checkpoints.restore(tmp_path / "step_000001", jax.eval_shape(state))
