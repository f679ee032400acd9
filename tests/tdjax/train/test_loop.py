"""The loop on a toy of two leaves: order of steps, exact resuming, checkpoints, reports, stopping;
and shardings."""

import dataclasses
import json
import os
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from tdjax.config import DiTConfig
from tdjax.errors import CheckpointError, NotFinite
from tdjax.models.wan_dit import DiT
from tdjax.precision import FLOAT32
from tdjax.progress import Stages
from tdjax.train import checkpoints, loop, metrics, rcm
from tdjax.train.data import ArraySource, Position, Stream
from tdjax.train.loop import Schedule, train
from tdjax.train.optimizer import OptimizerConfig, adamw
from tdjax.train.presets import RunConfig
from tdjax.train.shards import DataError
from tdjax.train.state import DistillState, TrainState

OPTIMIZER = optax.adam(1e-2)
SAMPLES = 7


def numbers(bad=()):
    """A source of samples that are their own numbers, those in `bad` NaN."""
    x = np.arange(SAMPLES, dtype=np.float32)
    x[list(bad)] = np.nan
    return ArraySource(
        np.broadcast_to(x[:, None, None, None, None], (SAMPLES, 1, 1, 1, 2)),
        np.zeros((SAMPLES, 1, 1)),
    )


def state():
    model = {"w": jnp.full((2,), 0.5), "b": jnp.zeros((3, 2))}
    return TrainState(
        step=jnp.int32(0),
        model=model,
        ema=jax.tree.map(jnp.copy, model),
        opt=OPTIMIZER.init(model),
        key=jax.random.key(3),
    )


def step(state, teacher, batch):
    """Uses all that a step may depend on: the key, the number of the step, data, momentum."""
    noise = jax.random.normal(jax.random.fold_in(state.key, state.step), batch.latents.shape)
    loss = lambda model: jnp.mean(
        (batch.latents * model["w"] + model["b"].mean(0) - noise - teacher) ** 2
    )
    value, grads = jax.value_and_grad(loss)(state.model)
    with jax.numpy_dtype_promotion("standard"):
        updates, opt = OPTIMIZER.update(grads, state.opt, state.model)
    model = optax.apply_updates(state.model, updates)
    ema = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, state.ema, model)
    return dataclasses.replace(state, step=state.step + 1, model=model, ema=ema, opt=opt), {
        "loss": value
    }


def total(state, teacher, batch):
    """Changes no weight; its loss is the sum of the batch."""
    return dataclasses.replace(state, step=state.step + 1), {"loss": batch.latents.sum()}


def run(
    folder,
    start=None,
    *,
    phases=None,
    cycle=None,
    stream=None,
    position=loop.START,
    show=False,
    **config,
):
    config = RunConfig(
        folder=str(folder), **{"steps": 8, "log_every": 2, "save_every": 100, **config}
    )
    phases = phases or {"train": step}
    return train(
        start or state(), jnp.float32(1.5), phases, cycle or Schedule(cycle=tuple(phases)), stream or Stream(numbers(), batch=3),
        config, position=position, stages=Stages(show),
    )  # fmt: skip


def resumed(folder, **config):
    last, stream = checkpoints.latest(folder), Stream(numbers(), batch=3)
    position = stream.restored(checkpoints.inspect(last)["data"])
    return run(
        folder,
        checkpoints.restore(last, jax.eval_shape(state)),
        stream=stream,
        position=position,
        **config,
    )


def same_bits(a, b):
    a, b = checkpoints.arrays(a), checkpoints.arrays(b)
    assert a.keys() == b.keys()
    for name in a:
        assert np.asarray(a[name]).tobytes() == np.asarray(b[name]).tobytes(), name


# Order of steps
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("warmup", "frequency"), [(0, 5), (3, 2), (1000, 5), (4, 3)])
def test_the_schedule_is_that_of_rcm(warmup, frequency):
    config = rcm.RCMConfig(warmup=warmup, frequency=frequency)
    schedule = Schedule(cycle=("student", *["critic"] * (frequency - 1)), warmup=warmup)
    for i in (*range(30), *range(995, 1030)):
        assert (schedule.phase(i) == "student") == rcm.is_student_turn(config, i)


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


# Resuming
# ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [1, 3, 5])
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(tmp_path, cut):
    whole = run(tmp_path / "whole")
    first = run(tmp_path / "cut", steps=cut)
    assert first.checkpoint == tmp_path / "cut" / f"step_{cut:06}"
    second = resumed(tmp_path / "cut")
    same_bits(whole.state, second.state)
    assert checkpoints.inspect(whole.checkpoint) == checkpoints.inspect(
        second.checkpoint
    )  # with the place in the data
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


def test_the_last_checkpoints_stay(tmp_path):
    run(tmp_path, save_every=1, keep=3)
    assert checkpoints.steps(tmp_path) == [6, 7, 8]
    run(tmp_path / "all", save_every=3, keep=0)
    assert checkpoints.steps(tmp_path / "all") == [3, 6, 8]


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


# Reports
# -----------------------------------------------------------------------------------------------------------------


def test_nothing_is_fetched_between_reports(tmp_path, monkeypatch):
    fetched = []
    get = jax.device_get
    monkeypatch.setattr(loop.jax, "device_get", lambda rows: fetched.append(len(rows)) or get(rows))
    run(tmp_path, steps=10, log_every=4)
    assert fetched == [4, 4, 2]
    assert [row["step"] for row in metrics.read(tmp_path)] == [4, 8, 10]


def test_reports_after_the_checkpoint_are_forgotten(tmp_path):
    run(tmp_path, steps=4)
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write(
            '{"step": 6, "train/loss": 1.0}\n{"step": 8, "tra'
        )  # a killed run got further than its checkpoint
    resumed(tmp_path)
    assert [row["step"] for row in metrics.read(tmp_path)] == [2, 4, 6, 8]


def test_metrics_that_json_does_not_know(tmp_path):
    with metrics.Metrics(tmp_path) as out:
        out.write(3, {"a": 1.5, "b": float("nan"), "c": float("inf")})
    assert json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail) == {
        "step": 3,
        "a": 1.5,
        "b": None,
        "c": None,
    }


def test_tensorboard_where_its_writer_is_installed(tmp_path, monkeypatch):
    with metrics.Metrics(tmp_path / "without") as out:
        assert out.board is None
    package = tmp_path / "packages" / "tensorboardX"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        "class SummaryWriter:\n"
        "    def __init__(self, folder, purge_step): self.calls = [(folder, purge_step)]\n"
        "    def add_scalar(self, *row): self.calls.append(row)\n"
        "    def close(self): self.calls.append('closed')\n"
    )
    monkeypatch.syspath_prepend(package.parent)
    with metrics.Metrics(tmp_path / "run", 4) as out:
        out.write(6, {"a": 1.0})
    assert out.board.calls == [(str(tmp_path / "run" / "tensorboard"), 5), ("a", 1.0, 6), "closed"]
    monkeypatch.delitem(sys.modules, "tensorboardX")


def test_the_progress_line(tmp_path, capsys, monkeypatch):
    run(tmp_path / "quiet", steps=4)
    assert [line for line in capsys.readouterr().err.splitlines() if "saved" not in line] == []
    run(tmp_path / "shown", steps=4, show=True)
    err = capsys.readouterr().err
    assert "compile train" in err and "step 2/4  train/loss" in err and "steps/s  0:00 left" in err
    assert [loop.clock(s) for s in (0, 61, 3725)] == ["0:00", "1:01", "1:02:05"]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    run(tmp_path / "terminal", steps=4, show=True)
    err = capsys.readouterr().err
    assert "\r  step 2/4" in err and "\ntdjax: saved" in err


def test_compiling_and_saving_are_no_training_time(tmp_path):
    with metrics.Metrics(tmp_path) as out:
        report = loop.Report(RunConfig(folder=str(tmp_path)), 0, out, Stages(False), batch=3)
        report.start -= 10.0
        report.paused = 8.0
        report.add("train", {"loss": np.float32(1)})
        report.add("train", {"loss": np.float32(3)})
        report.flush(2)
    (row,) = metrics.read(tmp_path)
    assert row["steps_per_second"] == pytest.approx(1.0, rel=0.05) and row["train/loss"] == 2.0


# Not finite
# --------------------------------------------------------------------------------------------------------------


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


# Stopping
# ----------------------------------------------------------------------------------------------------------------


class Signals:
    """A stream that sends this process signals while the step's batch is read."""

    def __init__(self, at, count=1, kind=signal.SIGINT):
        self.stream, self.at, self.count, self.kind = Stream(numbers(), batch=3), at, count, kind
        self.saved, self.size = self.stream.saved, self.stream.size
        self.read = 0

    def batch(self, position):
        self.read += 1
        if self.read == self.at:
            for _ in range(self.count):
                os.kill(os.getpid(), self.kind)
        return self.stream.batch(position)


@pytest.fixture
def listening():
    """SIGINT as in a terminal, also where these tests run in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_the_step_and_saves(tmp_path, capsys, kind, listening):
    before = signal.getsignal(kind)
    done = run(
        tmp_path, stream=Signals(at=20, kind=kind), steps=10**6, log_every=10**6, save_every=10**6
    )
    assert done.interrupted and 0 < done.step <= 20
    assert signal.getsignal(kind) is before
    assert checkpoints.steps(tmp_path) == [done.step]
    assert "stopping after this step" in capsys.readouterr().err
    same_bits(resumed(tmp_path, steps=25).state, run(tmp_path / "whole", steps=25).state)


def test_a_second_interrupt_is_at_once(listening):
    interrupt = loop.Interrupt(Stages(False))
    with pytest.raises(KeyboardInterrupt), interrupt:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.asked
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_ignored_signal_stays_ignored(listening):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with loop.Interrupt(Stages(False)) as interrupt:
        os.kill(os.getpid(), signal.SIGINT)
    assert not interrupt.asked


# Shardings
# ---------------------------------------------------------------------------------------------------------------


def mesh(**axes):
    return jax.make_mesh(
        tuple(axes.values()), tuple(axes), axis_types=(jax.sharding.AxisType.Auto,) * len(axes)
    )


def test_averages_moments_and_critics_lie_as_their_weights_do():
    cfg = DiTConfig(
        dim=32,
        heads=2,
        ffn_dim=48,
        layers=2,
        in_channels=4,
        out_channels=4,
        freq_dim=16,
        text_dim=6,
        policy=FLOAT32,
    )
    model = jax.eval_shape(lambda: DiT(cfg, rngs=nnx.Rngs(0)))
    key, plain, masked = (
        jax.random.key(0),
        adamw(OptimizerConfig(b1=0.9)),
        adamw(OptimizerConfig(b1=0.9, train=r"blocks\..*")),
    )
    for optimizer in (plain, masked):
        shapes = jax.eval_shape(
            lambda m, o=optimizer: DistillState.create(m, o, key, critic=m, critic_optimizer=o),
            model,
        )
        found = checkpoints.names(loop.shardings(shapes, mesh(fsdp=2, tensor=2)))
        kernels = [name for name in found if name.endswith("blocks.self_attn.q.kernel")]
        assert len(kernels) == 7  # model, ema, critic, two moments of two optimizers
        assert {found[name].spec for name in kernels} == {P(None, "fsdp", "tensor")}
        assert found["step"].spec == found["key"].spec == P()


def test_a_state_is_made_and_restored_over_a_mesh(tmp_path):
    """Leaves named like a network's, so that the table lays them out."""
    w = jnp.arange(64.0).reshape(2, 4, 8)
    create = lambda w: TrainState.create(
        {"blocks": {"up": {"kernel": w}}}, OPTIMIZER, jax.random.key(1)
    )
    over = mesh(fsdp=2, tensor=2)
    laid, plain = loop.made(create, w, mesh=over), loop.made(create, w)
    same_bits(laid, plain)
    kernel = lambda state: state.model["blocks"]["up"]["kernel"]
    assert (
        kernel(laid).sharding.spec == P(None, "fsdp", "tensor")
        and kernel(plain).sharding.is_fully_replicated
    )
    path = checkpoints.save(tmp_path, 1, laid, {})
    back = checkpoints.restore(path, loop.abstract(jax.eval_shape(create, w), over))
    same_bits(back, plain)
    assert (
        kernel(back).sharding == kernel(laid).sharding
        and back.opt[0].mu["blocks"]["up"]["kernel"].sharding == kernel(laid).sharding
    )
    assert not kernel(laid).is_deleted() and w.shape == (2, 4, 8)
