"""The loop of training: which step runs when, checkpoints, reports, stopping.

The host runs ahead of the device: numbers are fetched once in `log_every` steps, and nothing else
waits for a step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tdjax.errors import NotFinite, OutOfMemory
from tdjax.parallel.sharding import axes_of, leaf_name, spec
from tdjax.pipeline.memory import GIB, memory_limit
from tdjax.progress import Stages
from tdjax.train import checkpoints
from tdjax.train.data import Position, ReadAhead, Stream, on_device
from tdjax.train.metrics import Metrics
from tdjax.train.presets import RunConfig
from tdjax.train.shards import DataError

START = Position()
Step = Callable[[Any, Any, Any], tuple[Any, dict[str, jax.Array]]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """Which step runs in which iteration: the first of `cycle` for `warmup` iterations, then the
    cycle for ever."""

    cycle: tuple[str, ...]
    warmup: int = 0

    def phase(self, iteration: int) -> str:
        return self.cycle[
            0 if iteration < self.warmup else (iteration - self.warmup) % len(self.cycle)
        ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """Where a run ended. checkpoint: the folder that holds the state."""

    state: Any
    step: int
    checkpoint: Path
    interrupted: bool


def train(
    state,
    teacher,
    steps: dict[str, Step],
    schedule: Schedule,
    stream: Stream,
    run: RunConfig,
    *,
    position: Position = START,
    mesh: Mesh | None = None,
    facts: dict[str, Any] | None = None,
    stages: Stages | None = None,
) -> Outcome:
    """Run iterations state.step to run.steps and save the state; the state given is consumed.

    steps: {phase: step(state, teacher, batch) -> (state, metrics)}; metrics are scalars, one of
           them "loss".
    position: place of the first batch in the stream. facts: JSON values for the manifests.
    Raises NotFinite after run.patience losses of one phase in a row that are not finite; DataError
        for a bad sample, after
    saving. Ctrl-C and SIGTERM end the run after the iteration, with a checkpoint; a second Ctrl-C
    at once.
    """
    stages, folder, done = stages or Stages(), Path(run.folder), int(state.step)
    programs, saved = (
        Programs(steps, mesh, stages),
        done if checkpoints.folder(folder, done).exists() else None,
    )

    with contextlib.ExitStack() as stack:
        interrupt = stack.enter_context(Interrupt(stages))
        stack.enter_context(contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh))
        report = Report(
            run, done, stack.enter_context(Metrics(folder, done)), stages, batch=stream.size
        )
        batches = stack.enter_context(ReadAhead(stream, position, partial(on_device, mesh=mesh)))

        def save():
            report.flush(done)
            with report.pause(), stages("save"):
                check_finite(state, done, folder)
                path = checkpoints.save(
                    folder, done, state, {"data": stream.saved(position), **(facts or {})}, run.keep
                )
            stages.note(f"saved {path}")
            return done

        while done < run.steps and not interrupt.asked:
            phase = schedule.phase(done)
            try:
                batch, position = batches.next()
            except DataError:  # the weights are good; a later run can go on from here
                if saved != done:
                    save()
                raise
            step = programs.get(phase, state, teacher, batch, report)
            state, numbers = step(state, teacher, batch)
            done += 1
            report.add(phase, numbers)
            if done % run.log_every == 0:
                report.flush(done)
            if done % run.save_every == 0:
                saved = save()
        if saved != done:
            saved = save()
    return Outcome(
        state=state,
        step=done,
        checkpoint=checkpoints.folder(folder, done),
        interrupted=interrupt.asked,
    )


# Programs and placement
# --------------------------------------------------------------------------------------------------


class Programs:
    """One executable for each phase, compiled when its turn comes; the state's memory is given to
    the new state."""

    def __init__(self, steps: dict[str, Step], mesh: Mesh | None, stages: Stages):
        self.steps, self.mesh, self.stages = steps, mesh, stages
        self.compiled: dict[str, Any] = {}

    def get(self, phase: str, state, teacher, batch, report: Report):
        if phase not in self.compiled:
            whole = None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec())
            out = None if self.mesh is None else (jax.tree.map(lambda x: x.sharding, state), whole)
            with report.pause(), self.stages(f"compile {phase}"):
                jitted = jax.jit(self.steps[phase], donate_argnums=0, out_shardings=out)
                self.compiled[phase] = jitted.lower(state, teacher, batch).compile()
        return self.compiled[phase]


def shardings(state, mesh: Mesh):
    """A NamedSharding for every leaf of an (abstract) state or teacher, as the same pytree.

    Whatever ends in the name of a network's leaf (its average, its moments) lies as that leaf does;
    the rest is whole.
    """
    sizes = dict(mesh.shape)

    def one(path, leaf):
        words = leaf_name(path).split(".")
        for i in range(len(words)):
            axes = known_axes(".".join(words[i:]))
            if axes is not None and len(axes) <= leaf.ndim:
                return NamedSharding(mesh, spec(leaf.shape, axes, sizes))
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(one, state)


def known_axes(name: str) -> tuple[str | None, ...] | None:
    try:
        return axes_of(name)
    except ValueError:
        return None


def made(create: Callable, *models, mesh: Mesh | None = None):
    """create(*models), a state, laid out over the mesh from the start: it is never whole on one
    device."""
    where = None if mesh is None else shardings(jax.eval_shape(create, *models), mesh)
    return jax.jit(create, out_shardings=where)(*models)


def abstract(state, mesh: Mesh | None):
    """Shapes, with shardings under a mesh, for `saves.restore`."""
    if mesh is None:
        return state
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        state,
        shardings(state, mesh),
    )


@jax.jit
def finite(state) -> jax.Array:
    """Whether every float of a state is finite."""
    floats = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.stack([jnp.isfinite(x).all() for x in floats]).all()


def check_finite(state, step: int, run: Path) -> None:
    """A checkpoint with a NaN in it would be worse than none."""
    if not finite(state):
        raise not_finite(
            f"the state holds NaN or infinity after step {step}, and was not saved", run
        )


def not_finite(what: str, run: Path) -> NotFinite:
    last = checkpoints.latest(run)
    return NotFinite(
        what,
        f"last good checkpoint: {last}" if last else "no checkpoint had been written",
        (
            "go on from there with --resume and a smaller optimizer.learning_rate"
            if last
            else "begin again with a smaller optimizer.learning_rate"
        ),
    )


def out_of_memory(state, teacher) -> OutOfMemory:
    """The error of a step that ran out of device memory. state, teacher: shapes are enough."""
    limit, size = (
        memory_limit(),
        lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)) / GIB,
    )
    return OutOfMemory(
        "out of device memory in a training step",
        f"state {size(state):.1f} GiB and teacher {size(teacher):.1f} GiB, over all devices, beside"
        " gradients and activations; usable on one device:"
        f" {'unknown' if limit is None else f'{limit / GIB:.1f} GiB'}",
        "in this order: a smaller data.batch; run.mesh=fsdp=N over more devices; fewer data.frames",
    )


# Reports
# -----------------------------------------------------------------------------------------------------------------


class Report:
    """Numbers of the steps since the last report, left on the device until `flush`."""

    def __init__(self, run: RunConfig, step: int, metrics: Metrics, stages: Stages, *, batch: int):
        self.run, self.metrics, self.stages, self.batch = run, metrics, stages, batch
        self.pending: list[tuple[str, dict[str, jax.Array]]] = []
        self.bad: dict[str, int] = {}  # losses in a row that were not finite, by phase
        self.first, self.start, self.paused = step, time.perf_counter(), 0.0

    def add(self, phase: str, numbers: dict[str, jax.Array]) -> None:
        self.pending.append((phase, numbers))

    @contextlib.contextmanager
    def pause(self):
        """Time that is not training: compiling, saving."""
        start = time.perf_counter()
        yield
        self.paused += time.perf_counter() - start

    def flush(self, step: int) -> None:
        """Fetch, check, write and show what is pending."""
        if not self.pending:
            return
        rows = [(phase, self.checked(numbers)) for phase, numbers in jax.device_get(self.pending)]
        seconds = time.perf_counter() - self.start - self.paused
        rate = (step - self.first) / max(seconds, 1e-9)
        values = means(rows) | {"steps_per_second": rate}
        self.metrics.write(step, values)
        self.show(step, values, rate)
        for number, (phase, numbers) in enumerate(rows, self.first + 1):
            self.bad[phase] = 0 if math.isfinite(numbers["loss"]) else self.bad.get(phase, 0) + 1
            if self.bad[phase] >= self.run.patience:
                what = (
                    f"{phase}: the loss was not finite in {self.bad[phase]} steps in a row, up to"
                    f" step {number}"
                )
                raise not_finite(what, Path(self.run.folder))
        self.pending, self.first, self.start, self.paused = [], step, time.perf_counter(), 0.0

    def checked(self, numbers: dict[str, Any]) -> dict[str, float]:
        """The numbers of a step on the host. Steps leave bad samples out of their loss; without a
        good one it is no number."""
        out = {name: float(value) for name, value in numbers.items()}
        return out | {"loss": math.nan} if out.get("bad_samples", 0.0) >= self.batch else out

    def show(self, step: int, values: dict[str, float], rate: float) -> None:
        """One line that stays in place on a terminal; nothing where progress is not shown."""
        if not self.stages.show:
            return
        losses = "  ".join(
            f"{name} {value:.4g}" for name, value in values.items() if name.endswith("loss")
        )
        left = (self.run.steps - step) / rate
        text = f"  step {step}/{self.run.steps}  {losses}  {rate:.3g} steps/s  {clock(left)} left"
        if sys.stderr.isatty():
            print(
                f"\r{text:{shutil.get_terminal_size().columns - 1}}",
                end="",
                flush=True,
                file=sys.stderr,
            )
            self.stages.line_open = True
        else:
            print(text, file=sys.stderr)


def means(rows: list[tuple[str, dict[str, float]]]) -> dict[str, float]:
    """{"phase/name": mean over the steps of the phase}; of the finite values, if there are any,
    with a count of the others."""
    columns: dict[str, list[float]] = {}
    for phase, numbers in rows:
        for name, value in numbers.items():
            columns.setdefault(f"{phase}/{name}", []).append(value)
    out = {}
    for name, values in columns.items():
        good = [v for v in values if math.isfinite(v)]
        out[name] = sum(good) / len(good) if good else math.nan
        if len(good) < len(values):
            out[f"{name}_not_finite"] = float(len(values) - len(good))
    return out


def clock(seconds: float) -> str:
    """3725 -> "1:02:05" """
    minutes, s = divmod(max(0, round(seconds)), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


# Stopping
# ----------------------------------------------------------------------------------------------------------------


class Interrupt:
    """While entered, the first Ctrl-C or SIGTERM only sets `asked`; the second raises
    KeyboardInterrupt.

    Signals reach the main thread alone; in another one nothing is changed, and an ignored signal (a
    job in the background of a shell) stays ignored.
    """

    def __init__(self, stages: Stages):
        self.stages, self.asked, self.before = stages, False, {}

    def ask(self, *_) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        self.stages.note("stopping after this step, with a checkpoint; once more stops at once")

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            heard = [
                n
                for n in (signal.SIGINT, signal.SIGTERM)
                if signal.getsignal(n) is not signal.SIG_IGN
            ]
            self.before = {number: signal.signal(number, self.ask) for number in heard}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)
