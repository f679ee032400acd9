"""Checkpoints on disk: complete or absent, refused with their differences, back to the bit."""

import dataclasses
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from train_cases import (
    numbers,
    run,
    same_bits,
    state,
)

from tdjax.errors import CheckpointError
from tdjax.train import checkpoints
from tdjax.train.checkpoints import Saver
from tdjax.train.stream import Stream


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


# -- written beside the steps that follow ----------------------------------------------------------


class Counted(Stream):
    """A stream that tells when its batch number `at` is asked for."""

    def __init__(self, at):
        super().__init__(numbers(), batch=3)
        self.at, self.reached, self.read = at, threading.Event(), 0

    def batch(self, position):
        self.read += 1
        if self.read == self.at:
            self.reached.set()
        return super().batch(position)


def test_steps_go_on_while_a_checkpoint_is_written(tmp_path):
    """What writes step 6 waits for the batch of step 12, which is read four steps ahead at most;
    it has the state of step 6 all the same."""
    stream, written = Counted(at=12), []

    def on_save(copy, step):
        assert stream.reached.wait(60)
        written.append((step, copy))

    run(tmp_path, stream=stream, steps=12, save_every=6, keep=0, on_save=on_save)
    first = run(tmp_path / "six", steps=6).state
    assert [step for step, _ in written] == [6, 12]
    same_bits(written[0][1], first)
    read = checkpoints.restore(checkpoints.folder(tmp_path, 6), jax.eval_shape(state))
    same_bits(read, first)


def test_one_checkpoint_is_written_at_a_time(tmp_path):
    """The second one begins when the first is done, and the block ends when both are."""
    go_on, order = threading.Event(), []

    def on_save(_, step):
        assert go_on.wait(60)
        order.append(step)

    with Saver(tmp_path, on_save=on_save) as saver:
        saver.save(1, state(), {})
        threading.Timer(0.2, go_on.set).start()
        saver.save(2, state(), {})
        assert order == [1]
    assert order == checkpoints.steps(tmp_path) == [1, 2]


def test_what_the_thread_meets_ends_the_run(tmp_path):
    """At the next step, or at the end of the run where there is none; not at a Ctrl-C."""

    def full(*_):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        run(tmp_path, steps=10**6, save_every=2, on_save=full)
    with pytest.raises(OSError, match="No space left"):
        run(tmp_path / "end", steps=2, on_save=full)
    with pytest.raises(KeyboardInterrupt), Saver(tmp_path / "stopped", on_save=full) as saver:
        saver.save(1, state(), {})
        raise KeyboardInterrupt


def test_a_copy_on_the_host_outlives_the_state(tmp_path):
    start = state()
    copy = checkpoints.on_host(start)
    same_bits(copy, start)
    change = lambda x: x if checkpoints.is_key(x) else x + 1
    jax.block_until_ready(jax.jit(lambda s: jax.tree.map(change, s), donate_argnums=0)(start))
    assert start.model["w"].is_deleted()
    same_bits(copy, state())
    kinds = {type(x) for x in jax.tree.leaves(copy) if not isinstance(x, jax.Array)}
    assert kinds == {np.ndarray}
