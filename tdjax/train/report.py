"""What a run says of itself: numbers of its steps, checked, written, and shown as one line."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import math
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from tdjax.errors import NotFinite
from tdjax.progress import GIB, Stages, device_bytes, say
from tdjax.train import checkpoints
from tdjax.train.checkpoints import Saver
from tdjax.train.configs import RunConfig
from tdjax.train.cost import TERA
from tdjax.train.metrics import Metrics


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What is known of a method's steps beside what they return.

    flops: {phase: of one sample}. warmup: steps of which a phase named "PHASE, warm-up" tells more.
    rates: {phase: learning rate of update 0, 1, ...}. peak: TFLOP/s of all devices, if known.
    """

    flops: Mapping[str, float] = dataclasses.field(default_factory=dict)
    rates: Mapping[str, Callable[[int], Any]] = dataclasses.field(default_factory=dict)
    warmup: int = 0
    peak: float | None = None

    def of_step(self, phase: str, number: int) -> float:
        """Returns the FLOPs of step 1, 2, ... for one sample."""
        begun = self.flops.get(f"{phase}, warm-up") if number <= self.warmup else None
        return self.flops.get(phase, 0.0) if begun is None else begun


class Report:
    """Numbers of the steps since the last report, left on the device until `flush`.

    step: where the run begins. metrics: None in a process that does not write them. batch: samples
    of a step, to know that none of them was good. updates: {phase: how many there were before}.
    saver: of the checkpoints, the last of which an error names.
    """

    def __init__(
        self,
        run: RunConfig,
        step: int,
        metrics: Metrics | None,
        stages: Stages,
        *,
        batch: int,
        work: Work | None = None,
        updates: Mapping[str, int] | None = None,
        saver: Saver | None = None,
    ):
        self.run = run
        self.metrics = metrics
        self.stages = stages
        self.batch = batch
        self.work = work or Work()
        self.updates = collections.Counter(updates or {})
        self.saver = saver
        self.bad: dict[str, int] = {}  # losses in a row that were not finite, by phase
        self._begin(step)

    def _begin(self, step: int) -> None:
        self.pending: list[tuple[str, dict[str, jax.Array]]] = []
        self.first = step
        self.start = time.perf_counter()
        self.paused = 0.0
        self.waited = 0.0

    def add(self, phase: str, numbers: dict[str, jax.Array]) -> None:
        """Takes the numbers of one step; one of them is "loss"."""
        self.pending.append((phase, numbers))

    @contextlib.contextmanager
    def pause(self):
        """Leaves the time inside out of the rate: compiling and saving are no training."""
        start = time.perf_counter()
        yield
        self.paused += time.perf_counter() - start

    @contextlib.contextmanager
    def waiting(self):
        """Counts the time inside as waiting for data."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    def flush(self, step: int) -> None:
        """Fetches, checks, writes and shows what is pending.

        Raises NotFinite after `run.patience` losses of one phase in a row that are not finite.
        """
        if not self.pending:
            return
        rows = [(phase, self._checked(numbers)) for phase, numbers in jax.device_get(self.pending)]
        seconds = time.perf_counter() - self.start - self.paused
        rate = (step - self.first) / max(seconds, 1e-9)
        self.updates.update(phase for phase, _ in rows)
        values = _means(rows) | {"steps_per_second": rate} | self._speed(rows, rate)
        if self.metrics is not None:
            self.metrics.write(step, values)
        self._show(step, values, rate)
        for number, (phase, numbers) in enumerate(rows, self.first + 1):
            self.bad[phase] = 0 if math.isfinite(numbers["loss"]) else self.bad.get(phase, 0) + 1
            if self.bad[phase] >= self.run.patience:
                what = (
                    f"{phase}: the loss was not finite in {self.bad[phase]} steps in a row, up to"
                    f" step {number}"
                )
                if self.saver is not None:
                    self.saver.wait()
                raise not_finite(what, Path(self.run.folder))
        self._begin(step)

    def _speed(self, rows: list, rate: float) -> dict[str, float]:
        """Learning rates, and how much of the machine is used."""
        work = self.work
        with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes in its schedules
            values = {
                f"{phase}/learning_rate": float(work.rates[phase](self.updates[phase] - 1))
                for phase in dict(rows)
                if phase in work.rates
            }
        values |= {"samples_per_second": rate * self.batch, "data_wait_seconds": self.waited}
        each = [work.of_step(phase, n) for n, (phase, _) in enumerate(rows, self.first + 1)]
        if all(each):
            values["tflops_per_second"] = sum(each) / len(each) * self.batch * rate / TERA
            if work.peak:
                values["share_of_peak"] = values["tflops_per_second"] / work.peak
        held = device_bytes()
        if held is not None:
            values |= {"memory_gib": held[0] / GIB, "peak_memory_gib": held[1] / GIB}
        return values

    def _checked(self, numbers: dict[str, Any]) -> dict[str, float]:
        """The numbers of a step on the host. Steps leave bad samples out of their loss; without a
        good one it is no number."""
        out = {name: float(value) for name, value in numbers.items()}
        return out | {"loss": math.nan} if out.get("bad_samples", 0.0) >= self.batch else out

    def _show(self, step: int, values: dict[str, float], rate: float) -> None:
        """One line that stays in place on a terminal; nothing where progress is not shown."""
        if not self.stages.show:
            return
        losses = "  ".join(
            f"{name} {value:.4g}" for name, value in values.items() if name.endswith("loss")
        )
        left = (self.run.steps - step) / rate
        text = f"  step {step}/{self.run.steps}  {losses}  {rate:.3g} steps/s  {_clock(left)} left"
        if sys.stderr.isatty():
            width = shutil.get_terminal_size().columns - 1
            say(f"\r{text:{width}}", end="")
            self.stages.line_open = True
        else:
            say(text)


def _means(rows: list[tuple[str, dict[str, float]]]) -> dict[str, float]:
    """{"phase/name": mean over the steps of the phase}; that of the finite values, if there are
    any, with a count of the others."""
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


def _clock(seconds: float) -> str:
    """3725 -> "1:02:05" """
    minutes, s = divmod(max(0, round(seconds)), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


def not_finite(what: str, run: Path) -> NotFinite:
    """Returns the error of a run whose numbers are no longer finite, with the way back."""
    last = checkpoints.latest(run)
    if last is None:
        return NotFinite(
            what,
            "no checkpoint had been written",
            "begin again with a smaller optimizer.learning_rate",
        )
    return NotFinite(
        what,
        f"last good checkpoint: {last}",
        "go on from there with --resume and a smaller optimizer.learning_rate",
    )
