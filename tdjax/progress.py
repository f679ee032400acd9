"""What a run is doing, how long each stage took, and the memory it reached: lines on stderr,
numbers in a table."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tdjax.errors import Cancelled

GIB = 2**30
LOGGER = logging.getLogger("tdjax")


def say(text: str, end: str = "\n") -> None:
    """Writes on stderr. Where that cannot be written to, nothing is told and the work goes on: a
    reader that has gone (`2>&1 | tee log` ends at Ctrl-C too) must not cost a checkpoint."""
    with contextlib.suppress(OSError):
        print(text, end=end, file=sys.stderr, flush=True)


def host_peak_bytes() -> int | None:
    """Largest resident size of this process since the last `reset_host_peak` (Linux; None
    elsewhere)."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    for line in status.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None


def reset_host_peak() -> None:
    """Begins the system's counter anew; where it cannot be (not Linux, or a sandbox without the
    file), the peak covers the whole process."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def device_bytes() -> tuple[int, int] | None:
    """(in use now, peak since the process began) of the first device, or None where the backend
    does not say (CPU)."""
    import jax

    stats = jax.local_devices()[0].memory_stats()
    return (stats["bytes_in_use"], stats["peak_bytes_in_use"]) if stats else None


@dataclasses.dataclass
class Stage:
    """One row of the table: seconds, and bytes that were in use at most.

    device_peak: since the process began, as the backend's counter cannot be reset. host_peak:
                 within the stage.
    """

    name: str
    seconds: float
    device_peak: int | None = None
    host_peak: int | None = None


class Listener:
    """What a call of a pipeline is asked to tell, and whether it should go on.

    on_stage: called with the name of each stage as it begins. on_step: called with (number of the
              step that is done, steps) of each video, or of those that are made together.
              on_preview: called with (that number, frames uint8 [T H W 3] of the first of them).
              Each ends the call by returning False.
    cancel:   a threading.Event, which ends the call once it is set.
    first, count: the number of the video of the call that is made, and how many are made together.
    """

    def __init__(
        self,
        on_stage: Callable[[str], Any] | None = None,
        on_step: Callable[[int, int], Any] | None = None,
        cancel: threading.Event | None = None,
        on_preview: Callable[[int, Any], Any] | None = None,
    ):
        self.on_stage, self.on_step, self.cancel = on_stage, on_step, cancel
        self.on_preview = on_preview
        self.notes: list[str] = []
        self.first = self.count = 0

    def stage(self, name: str) -> None:
        """Tells that a stage begins. Raises Cancelled."""
        self.check(f"before {name}")
        if self.on_stage is not None and _ends(self.on_stage(name)):
            raise cancelled(f"before {name}")

    def step(self, step: int, steps: int) -> None:
        """Tells that a step is done. Raises Cancelled."""
        where = f"after step {step} of {steps}"
        if self.on_step is not None and _ends(self.on_step(step, steps)):
            raise cancelled(where)
        self.check(where)

    def preview(self, step: int, frames: Any) -> None:
        """Hands the preview of a step over. Raises Cancelled."""
        if self.on_preview is not None and _ends(self.on_preview(step, frames)):
            raise cancelled(f"after the preview of step {step}")

    def check(self, where: str) -> None:
        """Raises Cancelled where the event is set."""
        if self.cancel is not None and self.cancel.is_set():
            raise cancelled(where)


def _ends(answer: Any) -> bool:
    """Whether a listener has returned False, also as numpy and JAX have it."""
    if answer is False:
        return True
    kind = getattr(getattr(answer, "dtype", None), "kind", None)
    return kind == "b" and answer.shape == () and not answer


def cancelled(where: str) -> Cancelled:
    """Returns the error of a call that its caller has ended."""
    return Cancelled(
        f"the call was cancelled {where}",
        "on_step, on_stage or on_preview returned False, or `cancel` was set",
        "the pipeline can be called again",
    )


class Stages:
    """Collects stages. `with stages("decode"):` shows the name while it runs.

    show: lines on stderr; None: where it is a terminal.
    """

    def __init__(self, show: bool | None = None):
        self.show = sys.stderr.isatty() if show is None else show
        self.rows: list[Stage] = []
        self.begun = time.perf_counter()
        self.line_open = False  # a line stands on the terminal that the next one replaces
        self.listener = Listener()

    def __call__(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Times what runs within, as a row of that name."""
        return self._stage(name)

    @contextlib.contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        self.listener.stage(name)
        self.began(name)
        reset_host_peak()
        start = time.perf_counter()
        try:
            yield
        except BaseException:
            self.failed(name)
            raise
        seconds = time.perf_counter() - start
        device = device_bytes()
        self.rows.append(Stage(name, seconds, device[1] if device else None, host_peak_bytes()))
        self.ended(name, seconds)

    @contextlib.contextmanager
    def listening(self, listener: Listener, videos: int, steps: int) -> Iterator[None]:
        """One call of a pipeline, which makes so many videos in so many steps each."""
        before, self.listener = self.listener, listener
        try:
            yield
        finally:
            self.listener = before

    def next_video(self, count: int = 1) -> None:
        """Tells that the noise of another video is about to be drawn, or of `count` together."""
        self.listener.first += self.listener.count
        self.listener.count = count

    def expect(self, videos: int, steps: int) -> None:
        """Tells what a command will make in all, in one call of a pipeline or several."""

    def close(self) -> None:
        """Tells that all of it is made."""

    def aside(self) -> contextlib.AbstractContextManager[None]:
        """A place in which lines may be printed."""
        return contextlib.nullcontext()

    # -- what is shown -----------------------------------------------------------------------------

    def began(self, name: str) -> None:
        """Shows that a stage runs: a line that its end replaces, on a terminal."""
        if self.show and sys.stderr.isatty():
            say(f"  {name} ...", end="")
            self.line_open = True

    def ended(self, name: str, seconds: float) -> None:
        """Shows how long a stage took."""
        if self.show:
            say(f"{self._erased()}  {name}: {seconds:.1f} s")

    def failed(self, name: str) -> None:
        """Shows in which stage something went wrong."""
        if self.show:
            say(f"{self._erased()}  {name}: failed")

    def step(self, step: int, steps: int) -> None:
        """Tells that a step of the sampler is done. Raises Cancelled."""
        self.listener.step(step, steps)

    def note(self, text: str) -> None:
        """One line that a user should see even in a log file."""
        self.listener.notes.append(text)
        self.tell(text)

    def tell(self, text: str) -> None:
        """Shows a note: on stderr."""
        say(f"{self._erased()}tdjax: {text}")

    def _erased(self) -> str:
        """What replaces the open line, if there is one."""
        open_, self.line_open = self.line_open, False
        return "\r\033[K" if open_ else ""

    def seconds(self, first: int = 0) -> dict[str, float]:
        """Total seconds by stage name, in order of appearance, from row `first` on."""
        out: dict[str, float] = {}
        for row in self.rows[first:]:
            out[row.name] = out.get(row.name, 0.0) + row.seconds
        return {name: round(value, 4) for name, value in out.items()}

    def table(self) -> str:
        """The `--timings` table: seconds, device peak so far, host peak within the stage."""
        from rich.console import Console
        from rich.table import Table

        table = Table("stage", "seconds", "device peak so far", "host peak")
        size = lambda n: "-" if n is None else f"{n / GIB:.2f} GiB"
        for row in self.rows:
            peaks = size(row.device_peak), size(row.host_peak)
            table.add_row(row.name, f"{row.seconds:.3f}", *peaks)
        table.add_row("sum of the stages", f"{sum(r.seconds for r in self.rows):.3f}", "", "")
        # More than the sum: programs are compiled and files read beside and between stages.
        clock = time.perf_counter() - self.begun
        table.add_row("by the clock", f"{clock:.3f}", "", "")
        once = ("load", "compile")
        again = sum(r.seconds for r in self.rows if not r.name.startswith(once))
        table.add_row("again, with weights and programs in memory", f"{again:.3f}", "", "")
        console = Console(width=100, file=sys.stderr, record=False)
        with console.capture() as capture:
            console.print(table)
        return capture.get()


class Silent(Stages):
    """Stages of which nothing is shown, notes neither."""

    def __init__(self):
        super().__init__(False)

    def tell(self, text: str) -> None:
        """Shows nothing."""


class Bar(Stages):
    """Stages as one bar with the time left: a share for each step of each video, and one for its
    frames. What stands before it is the video, where there are several, and the stage."""

    def __init__(self, show: bool | None = None):
        super().__init__(show)
        self.bar: Any = None
        self.videos = self.video = self.steps = 0  # how many, which one, and of how many steps
        self.together = 1  # so many, of which that one is the last
        self._closed = threading.Event()

    def expect(self, videos: int, steps: int) -> None:
        """Draws the bar of so many videos, in one call of a pipeline or several."""
        if self.show and self.bar is None:
            self.videos, self.video, self.steps, self.together = videos, 0, steps, 1
            self.bar = _drawn(videos * (steps + 1))
            self._closed = threading.Event()
            threading.Thread(target=_tick, args=(self.bar, self._closed), daemon=True).start()

    def close(self) -> None:
        """Takes the bar away."""
        if self.bar is not None:
            self._closed.set()
            self.bar.close()
            self.bar = None

    @contextlib.contextmanager
    def listening(self, listener: Listener, videos: int, steps: int) -> Iterator[None]:
        """As of `Stages`; draws a bar for this call alone where none is expected to go on."""
        alone = self.bar is None
        self.expect(videos, steps)
        try:
            with super().listening(listener, videos, steps):
                yield
        finally:
            if alone:
                self.close()

    def next_video(self, count: int = 1) -> None:
        """Counts videos; the frames of those before are there."""
        super().next_video(count)
        self.video, self.together = self.video + count, count
        if self.bar is not None:
            self.bar.n = (self.video - count) * (self.steps + 1)

    def began(self, name: str) -> None:
        """Shows the stage before the bar."""
        if self.bar is not None:
            several = f"{self._which()} of {self.videos}: " if self.videos > 1 else ""
            self.bar.set_description_str(f"{several}{name.partition(':')[0]}")

    def _which(self) -> str:
        """The video that is made, or those that are made together."""
        last = max(self.video, 1)
        return (
            f"video {last}" if self.together == 1 else f"videos {last - self.together + 1}-{last}"
        )

    def ended(self, name: str, seconds: float) -> None:
        """Shows nothing: the next stage is shown, or the bar goes."""

    def failed(self, name: str) -> None:
        """Takes the bar away."""
        self.close()

    def step(self, step: int, steps: int) -> None:
        """Moves the bar on. Raises Cancelled."""
        if self.bar is not None:
            self.bar.update(self.together)
        super().step(step, steps)

    def aside(self) -> contextlib.AbstractContextManager[None]:
        """A place in which lines may be printed: the bar is out of their way there."""
        return contextlib.nullcontext() if self.bar is None else self.bar.external_write_mode()

    def tell(self, text: str) -> None:
        """Shows a note above the bar."""
        with self.aside():
            super().tell(text)


class LibraryStages(Bar):
    """Those of `tdjax.load`: a bar in a notebook and on a terminal, notes by `logging` ("tdjax"),
    and rows of the call that runs only."""

    def __init__(self, show: bool | None = None):
        notebook = "ipykernel" in sys.modules
        super().__init__(notebook or None if show is None else show)

    @contextlib.contextmanager
    def listening(self, listener: Listener, videos: int, steps: int) -> Iterator[None]:
        """As of `Bar`; the rows of this call are dropped at its end."""
        first = len(self.rows)
        try:
            with super().listening(listener, videos, steps):
                yield
        finally:
            del self.rows[first:]

    def tell(self, text: str) -> None:
        """Hands a note to the logger."""
        with self.aside():
            LOGGER.warning(text)


def _drawn(total: int) -> Any:
    """A bar of tqdm, as a widget where there are some."""
    import tqdm

    layout = "{desc} {percentage:3.0f}% {bar} {elapsed}, {remaining} left"
    with warnings.catch_warnings():
        # Of widgets that are not installed; said when the module is imported.
        warnings.simplefilter("ignore", tqdm.TqdmWarning)
        from tqdm.auto import tqdm as kind

        return kind(total=total, bar_format=layout, leave=False, dynamic_ncols=True)


def _tick(bar: Any, closed: threading.Event) -> None:
    """Has the bar's clock go on while nothing else moves."""
    while not closed.wait(1):
        bar.refresh()
