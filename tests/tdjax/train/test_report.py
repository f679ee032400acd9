"""What a run says: when numbers are fetched, the line of progress, losses that are not finite."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from train_cases import (
    SAMPLES,
    numbers,
    run,
    state,
    total,
)

from tdjax.errors import NotFinite
from tdjax.progress import Stages
from tdjax.train import checkpoints, metrics, report
from tdjax.train.configs import RunConfig
from tdjax.train.report import Report, Work
from tdjax.train.stream import Stream


def test_nothing_is_fetched_between_reports(tmp_path, monkeypatch):
    fetched = []
    get = jax.device_get
    monkeypatch.setattr(
        report.jax, "device_get", lambda rows: fetched.append(len(rows)) or get(rows)
    )
    run(tmp_path, steps=10, log_every=4)
    assert fetched == [4, 4, 2]
    assert [row["step"] for row in metrics.read(tmp_path)] == [4, 8, 10]


def test_the_progress_line(tmp_path, capsys, monkeypatch):
    run(tmp_path / "quiet", steps=4)
    assert [line for line in capsys.readouterr().err.splitlines() if "saved" not in line] == []
    run(tmp_path / "shown", steps=4, show=True)
    err = capsys.readouterr().err
    assert "compile train" in err and "step 2/4  train/loss" in err and "steps/s  0:00 left" in err
    assert [report._clock(s) for s in (0, 61, 3725)] == ["0:00", "1:01", "1:02:05"]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    run(tmp_path / "terminal", steps=4, show=True)
    err = capsys.readouterr().err
    assert "\r  step 2/4" in err and "\ntdjax: saved" in err


def test_compiling_and_saving_are_no_training_time(tmp_path):
    with metrics.Metrics(tmp_path) as out:
        report = Report(RunConfig(folder=str(tmp_path)), 0, out, Stages(False), batch=3)
        report.start -= 10.0
        report.paused = 8.0
        report.add("train", {"loss": np.float32(1)})
        report.add("train", {"loss": np.float32(3)})
        report.flush(2)
    (row,) = metrics.read(tmp_path)
    assert row["steps_per_second"] == pytest.approx(1.0, rel=0.05) and row["train/loss"] == 2.0


def test_losses_that_are_not_finite_stop_the_run(tmp_path):
    run(tmp_path, steps=2)
    bad = Stream(numbers(bad=range(SAMPLES)), batch=3)
    start = checkpoints.restore(checkpoints.latest(tmp_path), jax.eval_shape(state))
    with pytest.raises(
        NotFinite, match="train: the loss was not finite in 3 steps in a row, up to step 5"
    ) as error:
        run(tmp_path, start, phases={"train": total}, stream=bad, steps=20, patience=3)
    assert (
        f"last good checkpoint: {tmp_path / 'step_000002'}" in str(error.value)
        and "--resume" in error.value.fix
    )
    assert error.value.exit_code == 5
    assert checkpoints.steps(tmp_path) == [2]
    assert metrics.read(tmp_path)[-1]["train/loss_not_finite"] == 2


def test_a_few_bad_losses_do_not(tmp_path):
    stream = Stream(numbers(bad=[3]), batch=1)  # one step in seven
    done = run(tmp_path, phases={"train": total}, stream=stream, steps=14, log_every=7, patience=2)
    assert done.step == 14
    assert [row["train/loss_not_finite"] for row in metrics.read(tmp_path)] == [1, 1]
    assert [row["train/loss"] for row in metrics.read(tmp_path)] == [
        pytest.approx(2 * (21 - 3) / 6)
    ] * 2


def test_phases_are_counted_apart(tmp_path):
    zero = lambda state, teacher, batch: (
        dataclasses.replace(state, step=state.step + 1),
        {"loss": jnp.float32(0)},
    )
    bad = Stream(numbers(bad=range(SAMPLES)), batch=3)
    with pytest.raises(
        NotFinite, match="b: the loss was not finite in 2 steps in a row, up to step 4"
    ):
        run(tmp_path, phases={"a": zero, "b": total}, stream=bad, patience=2)


def test_a_batch_without_one_good_sample_is_a_bad_loss(tmp_path):
    """Steps leave bad samples out of their loss, which is then 0 and finite."""
    skip = lambda state, teacher, batch: (
        dataclasses.replace(state, step=state.step + 1),
        {"loss": jnp.float32(0), "bad_samples": teacher + 1.5},
    )
    with pytest.raises(NotFinite, match="not finite in 4 steps"):
        run(tmp_path, phases={"train": skip}, patience=4)
    assert metrics.read(tmp_path)[0]["train/loss"] is None


def test_speed_and_learning_rates(tmp_path, monkeypatch):
    """Of ten steps a second with batches of three: the first of four is of the warm-up."""
    work = Work(
        flops={"a": 4e12, "b": 1e12, "a, warm-up": 2e12},
        warmup=1,
        rates={"a": lambda n: 0.5 * n, "b": lambda n: 7.0},
        peak=100.0,
    )
    monkeypatch.setattr(report, "device_bytes", lambda: (2**30, 2**31))
    with metrics.Metrics(tmp_path) as out:
        config = RunConfig(folder=str(tmp_path))
        shown = Report(config, 0, out, Stages(False), batch=3, work=work, updates={"a": 5})
        shown.start -= 0.4
        for phase in "abaa":
            shown.add(phase, {"loss": np.float32(1)})
        shown.waited = 0.25
        shown.flush(4)
    (row,) = metrics.read(tmp_path)
    rate = row["steps_per_second"]
    assert rate == pytest.approx(10, rel=0.05)
    assert row["samples_per_second"] == pytest.approx(3 * rate)
    assert row["tflops_per_second"] == pytest.approx((2 + 1 + 4 + 4) / 4 * 3 * rate)
    assert row["share_of_peak"] == pytest.approx(row["tflops_per_second"] / 100)
    assert row["a/learning_rate"] == 0.5 * 7 and row["b/learning_rate"] == 7.0
    assert row["data_wait_seconds"] == 0.25
    assert (row["memory_gib"], row["peak_memory_gib"]) == (1.0, 2.0)
