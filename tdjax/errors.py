"""The errors a user can meet. Each says what happened, why, and what to do; each has the exit code
of the commands.

Messages speak of arguments: `num_frames`, or, where the name is a common word as well, the same
between backticks. A command shows those that it has as options (tdjax.cli.spelled).
"""

from __future__ import annotations


def first_line(error: Exception) -> str:
    """Returns what a library says of an error as one line of a message, at most 300 characters; its
    kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


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


class Cancelled(TdjaxError):
    """A call was ended by who made it."""


class NotFinite(TdjaxError):
    """A network or the sampler returned NaN or infinity."""

    exit_code = 5
