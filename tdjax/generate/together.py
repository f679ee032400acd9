"""`tdjax generate` in several processes that make each video together.

All run the same command. The first one decides what is made, writes and speaks; the others take
from it what it has found, and print errors of their own alone. In one process everything here is
what it stands for.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from tdjax.errors import NotFinite, UsageError
from tdjax.generate import __main__ as generate
from tdjax.generate import outputs
from tdjax.generate.jobs import Job
from tdjax.parallel import hosts
from tdjax.parallel.mesh import parse_mesh
from tdjax.progress import Silent

T = TypeVar("T")


def run(args: argparse.Namespace) -> int:
    """Joins the processes and makes what the command asks for; the exit code."""
    hosts.join(args.coordinator, args.processes, args.process_id)
    stages = generate.command_stages(args.quiet, args.verbose) if hosts.first() else Silent()
    try:
        with hosts.lost():
            decided(lambda: check_early(args))
            generate.settle_format(args)
            code = generate.run(args, stages)
    except hosts.OtherProcessError as error:
        if not error.told:
            raise
        return error.exit_code  # another one has said why
    except NotFinite as error:  # which all have found
        hosts.leave()
        if hosts.first():
            raise
        return error.exit_code
    hosts.leave()
    return code


def check_early(args: argparse.Namespace) -> None:
    """Raises UsageError for what several processes do not do together, and for whatever else is
    wrong without knowing the model."""
    alone = {
        "serve": "prompts of one process's standard input would be read by all",
        "ray": "processes of a Ray cluster make a video each",
    }
    for name, why in alone.items():
        if getattr(args, name):
            raise UsageError(
                f"--{name} in several processes",
                why,
                f"leave --{name} away, or --coordinator, --processes and --process_id",
            )
    if args.mesh not in (None, "auto"):
        parse_mesh(args.mesh)
    generate.check_early(args)


# -- what the first process decides ----------------------------------------------------------------


def decided(make: Callable[[], T]) -> T:
    """Returns make() of the first process, a JSON value, in every one. Where it raises, all end."""
    return json.loads(_in_order(hosts.agreed, lambda: json.dumps(make())))


def every(make: Callable[[], T]) -> T:
    """Returns make() of each process. Where it raises in one, all end."""
    return _in_order(hosts.every, make)


def _in_order(how: Callable[[Callable[[], Any]], Any], make: Callable[[], Any]) -> Any:
    """how(make); after an error that all processes know of, they take leave of each other before it
    is raised, so that none is taken for lost."""
    own: list[BaseException] = []

    def tried() -> Any:
        try:
            return make()
        except BaseException as error:
            own.append(error)
            raise

    try:
        return how(tried)
    except BaseException as error:
        if error in own or isinstance(error, hosts.OtherProcessError):
            hosts.leave()
        raise


def share_cache(note: Callable[[str], None]) -> None:
    """Has all processes use one compile cache, or none."""
    if line := hosts.share_compile_cache():
        note(line)


def jobs(make: Callable[[], list[Job]]) -> list[Job]:
    """Returns the jobs of the first process."""
    return [Job(**job) for job in decided(lambda: [dataclasses.asdict(job) for job in make()])]


def tasks(make: Callable[[], list[outputs.Task]]) -> list[outputs.Task]:
    """Returns the tasks of the first process."""
    written = lambda task: [dataclasses.asdict(task.job), _texts(task.paths), task.overwrite]
    return [
        outputs.Task(job=Job(**job), paths=list(map(Path, paths)), overwrite=overwrite)
        for job, paths, overwrite in decided(lambda: [written(task) for task in make()])
    ]


@contextlib.contextmanager
def claimed(
    args: argparse.Namespace, task: outputs.Task, note: Callable[[str], None]
) -> Iterator[list[Path] | None]:
    """The files of a task, as of `outputs.claimed`, which the first process holds."""
    with contextlib.ExitStack() as held:
        own = lambda: held.enter_context(outputs.claimed(args, task, note))
        paths = decided(lambda: None if (found := own()) is None else _texts(found))
        yield None if paths is None else list(map(Path, paths))


def listening(made: list[outputs.Files]) -> dict[str, Callable]:
    """Returns what a call tells the files of its jobs: in the first process."""
    return outputs.listening(made) if hosts.first() else {}


def finish(made: outputs.Files, result) -> None:
    """Completes the files of a job: in the first process."""
    decided(lambda: made.finish(result))


def _texts(paths: list[Path]) -> list[str]:
    return list(map(str, paths))
