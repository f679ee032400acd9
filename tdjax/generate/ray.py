"""`tdjax generate --prompt_file FILE --ray N`: rows made by processes of a Ray cluster.

The process of the command reads the file, holds its rows against other commands, and prints what
has been made. It opens no model: which rows are done is found out on a host like theirs, as the
metadata has a precision that goes by the device.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import math
import os
import pickle
import signal
import sys
from collections.abc import Iterator
from typing import Any

import ray
import ray.data
from ray.data import ActorPoolStrategy

from tdjax.errors import TdjaxError, UsageError, first_line
from tdjax.generate import outputs
from tdjax.generate.__main__ import (
    GROUP,
    asked,
    assigned,
    command_stages,
    encoded,
    make_files,
    open_model,
    start,
)
from tdjax.generate.jobs import Job, read_jobs


def run(args: argparse.Namespace) -> int:
    """Makes the rows; the exit code. Raises the error of the first one that went wrong."""
    stages = command_stages(args.quiet, args.verbose)
    jobs = read_jobs(args, note=stages.note)
    out = sys.stdout
    with contextlib.redirect_stdout(sys.stderr), _cluster(args):  # Ray tells of itself on stdout
        _check_gpus(args)
        remote = ray.remote(num_gpus=args.ray_gpus, max_calls=1)(_assigned)
        todo, notes = _got(remote.remote(args, jobs, os.getcwd()))
        for note in notes:
            stages.note(note)
        with contextlib.ExitStack() as held:
            claim = lambda task: held.enter_context(outputs.claimed(args, task, stages.note))
            own = [task for task in todo if claim(task) is not None]
            for said in _made(args, own):
                print(said, end="", file=out, flush=True)
    return 0


@contextlib.contextmanager
def _cluster(args: argparse.Namespace) -> Iterator[None]:
    ended = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(log_to_driver=not args.quiet, logging_level="WARNING", include_dashboard=False)
    except ConnectionError as error:
        raise UsageError(
            "the Ray cluster is not reached",
            first_line(error),
            "start one (ray start --head), or unset RAY_ADDRESS for this machine alone",
        ) from error
    signal.signal(signal.SIGTERM, ended)  # which Ray takes for itself
    try:
        yield
    finally:
        ray.shutdown()


def _check_gpus(args: argparse.Namespace) -> None:
    there = int(ray.cluster_resources().get("GPU", 0))
    if there < args.ray_gpus:
        raise UsageError(
            f"--ray_gpus is {args.ray_gpus}",
            f"the Ray cluster has {there} GPUs now",
            "use --ray_gpus 0 for CPUs, or give the address of another cluster (RAY_ADDRESS)",
        )


def _assigned(
    args: argparse.Namespace, jobs: list[Job], folder: str
) -> tuple[list[outputs.Task], list[str]]:
    """(what is to be made, lines for the user), on a host like those of the rows."""
    os.chdir(folder)
    notes: list[str] = []
    stages = command_stages(True, False)
    pipe = open_model(args, stages, start(args, stages, makes=False))
    return assigned(args, pipe, jobs, notes.append), notes


def _got(reference: ray.ObjectRef) -> Any:
    """The value of a remote call. Raises its error as it was."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error


def _made(args: argparse.Namespace, todo: list[outputs.Task]) -> Iterator[str]:
    """What the command prints of rows, a group of them at a time, as they come back. Raises the
    error of a row."""
    if not todo:
        return
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = sys.stderr.isatty() and not args.quiet
    size = min(GROUP, math.ceil(len(todo) / args.ray))
    groups = [todo[begin : begin + size] for begin in range(0, len(todo), size)]
    # Items need no task to be read, which would want a CPU beside those of the processes.
    numbers = [{"group": number} for number in range(len(groups))]
    made = ray.data.from_items(numbers, override_num_blocks=len(groups)).map_batches(
        Rows,
        fn_constructor_args=(args, groups, os.getcwd()),
        batch_size=1,
        compute=ActorPoolStrategy(size=args.ray, max_tasks_in_flight_per_actor=1),
        num_gpus=args.ray_gpus,
    )
    for row in made.iter_rows():
        yield row["said"]
        if row["error"]:
            raise pickle.loads(row["error"])


class Rows:
    """A process that makes groups of rows, with the model opened once. folder: the command's."""

    def __init__(self, args: argparse.Namespace, groups: list[list[outputs.Task]], folder: str):
        os.chdir(folder)
        self.args, self.groups = args, groups
        stages = command_stages(args.quiet, args.verbose)
        self.pipe = open_model(args, stages, start(args, stages))

    def __call__(self, batch: dict[str, Any]) -> dict[str, list]:
        """Returns what the command would print of a group, and the error that ended it."""
        error = b""
        with contextlib.redirect_stdout(io.StringIO()) as said:
            try:
                self._make(self.groups[batch["group"].item()])
            except TdjaxError as reason:
                error = pickle.dumps(reason)
        return {"said": [said.getvalue()], "error": [error]}

    def _make(self, group: list[outputs.Task]) -> None:
        """Makes a group, or the rest of one whose process was lost: Ray gives it out again."""
        args, pipe = self.args, self.pipe
        embeds = encoded(args, pipe, group)
        facts = lambda job: asked(args, pipe, job)
        for task in group:
            rest = outputs.remaining(args, task.job, task.paths, pipe.stages.note, facts)
            if rest is not None:
                make_files(args, pipe, [rest], embeds)
                continue
            for index, path in enumerate(task.paths):
                outputs.tell(args, path, task.job.seed, index, {})
