"""The loop on a toy of two leaves: order of steps, exact resuming, bad samples and states."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from train_cases import (
    SAMPLES,
    numbers,
    resumed,
    run,
    same_bits,
    state,
    step,
    total,
)

from tdjax.errors import NotFinite
from tdjax.train import checkpoints, metrics
from tdjax.train.loop import Schedule
from tdjax.train.shards import DataError
from tdjax.train.stream import Position, Stream


def test_phases_take_turns(tmp_path):
    done = run(
        tmp_path,
        phases={"a": step, "b": total},
        cycle=Schedule(cycle=("a", "b", "b"), warmup=2),
        log_every=8,
    )
    (row,) = metrics.read(tmp_path)
    assert row["step"] == done.step == int(done.state.step) == 8
    sums, position = [], Position()
    for _ in range(8):
        batch, position = Stream(numbers(), batch=3).batch(position)
        sums.append(batch.latents.sum())
    assert row["b/loss"] == pytest.approx(
        np.mean([sums[i] for i in (3, 4, 6, 7)])
    )  # 0 1 warm-up, then a b b a b b
    assert row["a/loss"] > 0 and row["steps_per_second"] > 0


@pytest.mark.parametrize("cut", [1, 3, 5])
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(tmp_path, cut):
    whole = run(tmp_path / "whole")
    first = run(tmp_path / "cut", steps=cut)
    assert first.checkpoint == tmp_path / "cut" / f"step_{cut:06}"
    second = resumed(tmp_path / "cut")
    same_bits(whole.state, second.state)
    manifests = [checkpoints.inspect(outcome.checkpoint) for outcome in (whole, second)]
    for manifest in manifests:
        manifest.pop("files")  # Orbax names its data files at random
    assert manifests[0] == manifests[1]  # with the place in the data
    same_bits(
        *(
            checkpoints.restore(outcome.checkpoint, jax.eval_shape(state))
            for outcome in (whole, second)
        )
    )
    assert not np.array_equal(whole.state.model["w"], first.state.model["w"])


def test_the_state_given_is_consumed_and_the_end_is_saved_once(tmp_path):
    start = state()
    done = run(tmp_path, start, steps=4, save_every=2)
    assert start.model["w"].is_deleted()
    assert checkpoints.steps(tmp_path) == [2, 4] and done.checkpoint.name == "step_000004"
    before = (done.checkpoint / "manifest.json").stat().st_mtime_ns
    again = resumed(tmp_path, steps=4)  # nothing is left to do
    assert again.step == 4 and (done.checkpoint / "manifest.json").stat().st_mtime_ns == before


class Spoilt(Stream):
    """A stream with a bad sample in its fifth batch."""

    def batch(self, position):
        if position.offset + SAMPLES * position.epoch >= 12:
            raise DataError("shard_000000.tar: 000000012.latent.pt cannot be read")
        return super().batch(position)


def test_a_bad_sample_ends_the_run_after_a_checkpoint(tmp_path):
    with pytest.raises(DataError, match="000000012.latent.pt"):
        run(tmp_path, stream=Spoilt(numbers(), batch=3))
    assert checkpoints.steps(tmp_path) == [4]
    same_bits(resumed(tmp_path).state, run(tmp_path / "whole").state)


def test_a_state_that_is_not_finite_is_not_saved(tmp_path):
    spoil = lambda state, teacher, batch: (
        dataclasses.replace(
            state, step=state.step + 1, model=jax.tree.map(lambda x: x * jnp.nan, state.model)
        ),
        {"loss": jnp.float32(0)},
    )
    with pytest.raises(
        NotFinite,
        match="state holds NaN or infinity after step 2.*\nno checkpoint had been written",
    ):
        run(tmp_path, phases={"train": spoil}, save_every=2)
    assert checkpoints.steps(tmp_path) == []
