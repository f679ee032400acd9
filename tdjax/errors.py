"""The errors a user can meet. Each says what happened, why, and what to do; each has the exit code
of the commands."""

from __future__ import annotations

import difflib
import os
import sys
from pathlib import Path


class TdjaxError(Exception):
    """what: one line; why: one line; fix: one line (what to do, or the nearest thing that
    works)."""

    exit_code = 1

    def __init__(self, what: str, why: str = "", fix: str = ""):
        self.what, self.why, self.fix = what, why, fix
        super().__init__("\n".join(line for line in (what, why, fix) if line))


class UsageError(TdjaxError, ValueError):
    """An argument is not allowed, or contradicts another one or the checkpoint's task."""

    exit_code = 2


class CheckpointError(TdjaxError):
    """A weight file is missing, damaged, hostile, or not the model that was asked for."""

    exit_code = 3


class KernelError(TdjaxError):
    """A kernel does not compute on this device what its reference computes."""


class OutOfMemory(TdjaxError):
    """A stage does not fit; names the stage, the estimate and the remedies in order."""

    exit_code = 4


class NotFinite(TdjaxError):
    """A network or the sampler returned NaN or infinity."""

    exit_code = 5


def near_files(path: Path) -> str:
    """The names beside a missing file that are most like it, as the last line of an error."""
    names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, 3)
    return f"in {path.parent} there is: {', '.join(near)}" if near else "check the path"


def leave(code: int) -> None:
    """Exit a command with its code, at once: files are closed by then, taking the libraries down in
    order takes most of a second, and after a failure threads may still be compiling or loading."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
