"""The loop of training: which step runs when, checkpoints, reports, stopping.

The host runs ahead of the device: numbers are fetched once in `log_every` steps, states are copied
for checkpoints, and nothing else waits for a step.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tdjax.errors import OutOfMemory
from tdjax.parallel import hosts
from tdjax.pipeline.memory import GIB, memory_limit
from tdjax.progress import Stages
from tdjax.train import checkpoints
from tdjax.train.checkpoints import Saver
from tdjax.train.configs import RunConfig
from tdjax.train.interrupt import Interrupt
from tdjax.train.metrics import Metrics
from tdjax.train.report import Report, Work, not_finite
from tdjax.train.samples import Samples
from tdjax.train.shards import DataError
from tdjax.train.state import Batch
from tdjax.train.stream import Position, ReadAhead, Stream, on_device
from tdjax.train.turns import Turns

_START = Position()
Step = Callable[[Any, Any, Any], tuple[Any, dict[str, jax.Array]]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """Which step runs in which iteration: the first of `cycle` for `warmup` iterations, then the
    cycle for ever."""

    cycle: tuple[str, ...]
    warmup: int = 0

    def phase(self, iteration: int) -> str:
        """Returns the name of the step of iteration 0, 1, ..."""
        place = max(0, iteration - self.warmup)
        return self.cycle[place % len(self.cycle)]


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
    position: Position = _START,
    mesh: Mesh | None = None,
    metadata: dict[str, Any] | None = None,
    stages: Stages | None = None,
    work: Work | None = None,
    on_save: Callable[[Any, int], None] | None = None,
    samples: Samples | None = None,
    unused: Mapping[str, tuple[str, ...]] | None = None,
) -> Outcome:
    """Runs iterations state.step to run.steps and saves the state; the state given is consumed, and
    with `unused` the teacher.

    steps: {phase: step(state, teacher, batch) -> (state, metrics)}; metrics are scalars, one of
    them "loss". position: place of the first batch in the stream. metadata: JSON values for the
    manifests. work: what the report says of speed. on_save: called with the state and its step
    after each checkpoint, in the thread that wrote it. samples: makes videos before the first step
    and every so many. unused: {phase: what of state and teacher waits on the host meanwhile}, as
    `turns.Turns` has it.
    Raises NotFinite after run.patience losses of one phase in a row that are not finite, DataError
    for a bad sample after saving. Ctrl-C and SIGTERM end the run after the iteration, with a
    checkpoint; a second Ctrl-C at once.
    """
    stages = stages or Stages()
    folder = Path(run.folder)
    done = int(state.step)
    programs = _Programs(steps, mesh, stages)
    saved = done if checkpoints.folder(folder, done).exists() else None

    def told(state, step: int) -> None:
        stages.note(f"saved {checkpoints.folder(folder, step)}")
        if on_save is not None:
            on_save(state, step)

    with contextlib.ExitStack() as stack:
        interrupt = stack.enter_context(Interrupt(stages))
        saver = stack.enter_context(Saver(folder, run.keep, told))
        metrics = None
        if hosts.first():
            settings = (metadata or {}).get("settings")
            metrics = stack.enter_context(Metrics(folder, done, run.wandb, settings))
        before = collections.Counter(map(schedule.phase, range(done)))
        about = {"batch": stream.size, "work": work, "updates": before, "saver": saver}
        report = Report(run, done, metrics, stages, **about)
        place = partial(on_device, mesh=mesh, size=stream.size)
        batches = stack.enter_context(ReadAhead(stream, position, place))
        poll = hosts.Poll(mesh)
        ahead = _Ahead(batches, poll.lag + 1)
        answer = _GO_ON
        turns = Turns(unused or {})

        def save():
            nonlocal state, teacher
            report.flush(done)
            with report.pause(), stages("save"):
                saver.wait()
                state, teacher = turns.whole(state, teacher)
                _check_finite(state, done, folder)
                manifest = {"data": stream.saved(position), **(metadata or {})}
                saver.save(done, state, manifest)
            return done

        def sample():
            nonlocal state, teacher
            with report.pause():
                state, teacher = turns.whole(state, teacher)
                sheet = samples.make(state, teacher, done)
            if metrics is not None:
                metrics.show(done, sheet)

        if samples is not None and done == 0:
            sample()
        first = done
        while done < run.steps:
            saver.check()
            with report.waiting():
                ahead.fill(run.steps - done)
            own = _NO_DATA if ahead.error else _STOP if interrupt.asked else _GO_ON
            answer = poll.greatest(own, wait=done == first)
            if answer != _GO_ON:
                break
            batch, position = ahead.next()
            phase = schedule.phase(done)
            state, teacher = turns.begin(phase, state, teacher)
            step = programs.get(phase, state, teacher, batch, report)
            state, numbers = step(state, teacher, batch)
            done += 1
            report.add(phase, numbers)
            if done % run.log_every == 0:
                report.flush(done)
            if samples is not None and done % samples.every == 0:
                sample()
            if done % run.save_every == 0:
                saved = save()
        if saved != done:
            saved = save()
        if answer == _NO_DATA:  # the weights are good; a later run can go on from here
            raise ahead.error or DataError(
                "another process of this run could not read its data",
                f"all stopped at step {done}, with a checkpoint",
                "what that process writes says which sample it was",
            )
    return Outcome(
        state=state,
        step=done,
        checkpoint=checkpoints.folder(folder, done),
        interrupted=answer == _STOP,
    )


# What a process answers before each step; the greatest answer is done by all.
_GO_ON, _STOP, _NO_DATA = range(3)


class _Ahead:
    """The batches of the next `count` steps, and the error that comes after them. A process that
    meets one says so early enough for all to stop at the same step."""

    def __init__(self, batches: ReadAhead, count: int):
        self.batches = batches
        self.count = count
        self.error: DataError | None = None
        self._ready: collections.deque = collections.deque()

    def fill(self, left: int) -> None:
        """Reads on, but no more than the `left` steps that are still to come."""
        while self.error is None and len(self._ready) < min(self.count, left):
            try:
                self._ready.append(self.batches.next())
            except DataError as error:
                self.error = error

    def next(self) -> tuple[Batch, Position]:
        """Returns the batch of the next step, and the place behind it."""
        return self._ready.popleft()


class _Programs:
    """One executable for each phase and size of samples, compiled when its turn comes; the state's
    memory is given to the new state."""

    def __init__(self, steps: dict[str, Step], mesh: Mesh | None, stages: Stages):
        self.steps = steps
        self.mesh = mesh
        self.stages = stages
        self.compiled: dict[Any, Any] = {}

    def get(self, phase: str, state, teacher, batch, report: Report):
        key = phase, batch.latents.shape
        if key not in self.compiled:
            out = None
            if self.mesh is not None:
                whole = NamedSharding(self.mesh, PartitionSpec())
                out = (jax.tree.map(lambda x: x.sharding, state), whole)
            around = contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)
            with report.pause(), self.stages(f"compile {phase}"), around:
                jitted = jax.jit(self.steps[phase], donate_argnums=0, out_shardings=out)
                self.compiled[key] = jitted.lower(state, teacher, batch).compile()
        return self.compiled[key]


# -- what goes wrong -------------------------------------------------------------------------------


@jax.jit
def finite(state) -> jax.Array:
    """Returns whether every float of a state is finite."""
    floats = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.stack([jnp.isfinite(x).all() for x in floats]).all()


def _check_finite(state, step: int, run: Path) -> None:
    """A checkpoint with a NaN in it would be worse than none."""
    if not finite(state):
        raise not_finite(
            f"the state holds NaN or infinity after step {step}, and was not saved", run
        )


def out_of_memory(state, teacher) -> OutOfMemory:
    """Returns the error of a step that ran out of device memory. state, teacher: shapes are
    enough."""
    limit = memory_limit()
    usable = "unknown" if limit is None else f"{limit / GIB:.1f} GiB"
    size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)) / GIB
    return OutOfMemory(
        "out of device memory in a training step",
        f"state {size(state):.1f} GiB and teacher {size(teacher):.1f} GiB, over all devices, beside"
        f" gradients and activations; usable on one device: {usable}",
        "in this order: loss.accumulate=N, the batch in N parts (data.per_device=1 is as many as"
        " there can be); run.mesh=fsdp=N over more devices, and sp=M to divide a clip; a smaller"
        " data.batch; fewer data.frames",
    )
