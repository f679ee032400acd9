"""What a run is doing, how long each stage took, and the memory it reached: lines on stderr,
numbers in a table."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections.abc import Iterator
from pathlib import Path

GIB = 2**30


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


class Stages:
    """Collects stages. `with stages("decode"):` shows the name while it runs."""

    def __init__(self, show: bool | None = None):
        self.show = sys.stderr.isatty() if show is None else show
        self.rows: list[Stage] = []
        self.begun = time.perf_counter()
        self.line_open = False  # a stage's name stands on the terminal, without its time

    def __call__(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Times what runs within, as a row of that name."""
        return self._stage(name)

    @contextlib.contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        if self.show:
            print(f"  {name} ...", end="", flush=True, file=sys.stderr)
            self.line_open = True
        reset_host_peak()
        start = time.perf_counter()
        try:
            yield
        except BaseException:
            if self.show:
                print("\n" if self.line_open else "", end="", file=sys.stderr)
            self.line_open = False
            raise
        seconds = time.perf_counter() - start
        device = device_bytes()
        self.rows.append(Stage(name, seconds, device[1] if device else None, host_peak_bytes()))
        if self.show:
            back = "\r" if self.line_open else ""
            print(f"{back}  {name}: {seconds:.1f} s   ", file=sys.stderr)
        self.line_open = False

    def note(self, text: str) -> None:
        """One line on stderr that a user should see even in a log file."""
        ended = "\n" if self.line_open else ""
        print(f"{ended}tdjax: {text}", file=sys.stderr)
        self.line_open = False

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
