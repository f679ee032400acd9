"""`python -m tdjax.train.tiny`: the whole recipe, or some of its stages, in one folder."""

from __future__ import annotations

import argparse
import importlib
import math
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from tdjax import cli
from tdjax.errors import UsageError
from tdjax.files import refuse_unwritable
from tdjax.train.settings import Tree, build, put
from tdjax.train.tiny import settings

if TYPE_CHECKING:
    from jax.sharding import Mesh

STAGES = {  # name -> module of tdjax.train.tiny.stages and its function
    "vae": ("vae", "run_stage"),
    "teacher": ("teacher", "run_stage"),
    "sla": ("sla", "run_stage"),
    "rcm": ("rcm", "run_stage"),
    "merge": ("merge", "run_stage"),
    "evaluate": ("evaluate", "run_stage"),
    "timing": ("evaluate", "timing_stage"),
    "package": ("package", "run_stage"),
}
# Folders that say that a stage is finished.
_RESULT = {"vae": "vae", "teacher": "teacher", "sla": "sla", "merge": "merged"}


def build_parser() -> argparse.ArgumentParser:
    p = cli.Parser(
        "python -m tdjax.train.tiny",
        usage="%(prog)s [stage.key=value ...] [options]",
        description="Train the tiny model from nothing, stage by stage.",
    )
    p.add_argument(
        "settings",
        nargs="*",
        metavar="stage.key=value",
        help="changes, for example teacher.steps=8000",
    )
    p.add_argument(
        "--stage",
        help=(
            f"stages with commas between, of {', '.join(STAGES)}; default: all. Those that have"
            " their result are skipped"
        ),
    )
    p.add_argument(
        "--folder",
        type=cli.path,
        default="runs/tiny",
        help="where results, states and metrics are kept",
    )
    p.add_argument(
        "--scale",
        type=float,
        default=1.0,
        help="of every number of steps and clips; 0.01 for a trial",
    )
    p.add_argument(
        "--mesh",
        help="several devices, such as dp=2 or fsdp=2; default: one",
    )
    p.add_argument("--seconds", type=float, help="stop, with the state saved, after this time")
    p.add_argument("--seed", type=int, default=0, help="of weights and data")
    p.add_argument(
        "--again", action="store_true", help="run the named stages also where they are finished"
    )
    p.add_argument(
        "--compile_cache_dir", type=os.path.expanduser, help="folder of compiled programs, or none"
    )
    p.add_argument("-q", "--quiet", action="store_true", help="no progress")
    return p


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 all is done, 2 usage, 3 checkpoint, 5 not finite, 75 stopped by --seconds."""
    begun = time.monotonic()

    def command(words: list[str]) -> int:
        args = build_parser().parse_intermixed_args(words)
        check_early(args)
        chosen = chosen_stages(args.stage)
        return run(args, chosen, resolve(args.settings, args.scale), begun)

    kept = "the same command goes on from the last saved state"
    return cli.main(command, argv, parser=build_parser, interrupted=kept)


def check_early(args) -> None:
    """Raises UsageError for a time that is none, a seed that is none, or a folder that cannot be
    written."""
    if args.seconds is not None and not 0 < args.seconds < math.inf:
        raise UsageError(
            f"--seconds is {args.seconds:g}", "a positive time is needed", "leave it away for none"
        )
    if not 0 <= args.seed < 2**32:
        raise UsageError(f"--seed is {args.seed}", "a whole number from 0 to 4294967295", "use 0")
    refuse_unwritable(args.folder / "vae")


def chosen_stages(given: str | None) -> tuple[str, ...]:
    """Returns the stages named, in their order; all where none is. Raises UsageError."""
    names = tuple(given.split(",") if given else STAGES)
    wrong = [name for name in names if name not in STAGES]
    if wrong:
        raise UsageError(
            f"unknown stage {', '.join(wrong)}",
            f"stages: {', '.join(STAGES)}",
            "for example --stage vae,teacher",
        )
    return tuple(name for name in STAGES if name in names)


def resolve(words: list[str], scale: float) -> dict:
    """Returns the settings of every stage, scaled, with those of the command line over them. Raises
    UsageError."""
    if not 0 < scale <= 10:
        raise UsageError(
            f"--scale is {scale:g}",
            "it multiplies steps and clips; greater than 0, at most 10",
            "use 1",
        )
    trees = {name: Tree(cls) for name, cls in settings.STAGES.items()}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise UsageError(
                f"cannot read {word!r}",
                "settings are stage.key=value, without blanks",
                "for example teacher.steps=8000",
            )
        put(trees, key, value)
    base = {name: settings.scaled(cls(), scale) for name, cls in settings.STAGES.items()}
    parts = {name: settings.scaled(build(tree, base[name]), 1) for name, tree in trees.items()}
    for name, stage in parts.items():
        steps = getattr(stage, "heal", getattr(stage, "steps", None))
        if steps and stage.warmup > steps:
            raise UsageError(
                f"{name}.warmup is {stage.warmup}, of {steps} steps",
                "rates rise over the warm-up, and then fall",
                f"give {name}.warmup=0, or more steps",
            )
    return parts


def mesh_of(given: str | None, parts: dict) -> Mesh | None:
    """Returns the mesh that the command names, or None. Raises UsageError for one that there is
    not, or that does not divide the batch of a stage that runs over it."""
    if given is None:
        return None
    from tdjax.parallel.mesh import make_mesh
    from tdjax.train import plan
    from tdjax.train.tiny import configs

    plan.axes_of(given)
    mesh = make_mesh(given, configs.DIT)
    groups = plan.groups(dict(mesh.shape))
    for name in ("teacher", "sla", "rcm", "merge"):
        if parts[name].batch % groups:
            raise UsageError(
                f"--mesh {given} with {name}.batch={parts[name].batch}",
                f"it divides a batch over dp x fsdp = {groups}",
                f"use a multiple of {groups}",
            )
    return mesh


def stage_function(name: str) -> Callable:
    """Returns what runs a stage; its module, and jax, are imported here."""
    module, function = STAGES[name]
    return getattr(importlib.import_module(f"tdjax.train.tiny.stages.{module}"), function)


def run(args, chosen: tuple[str, ...], parts: dict, begun: float) -> int:
    note = cli.set_compile_cache(args.compile_cache_dir)
    from tdjax.progress import Stages

    stages = Stages(not args.quiet)
    if note:
        stages.note(note)
    cli.start_jax(stages.note)
    from tdjax.train.tiny import work

    until = begun + args.seconds if args.seconds else math.inf
    tiny = work.Run(
        folder=args.folder,
        settings=parts,
        seed=args.seed,
        until=until,
        mesh=mesh_of(args.mesh, parts),
        stages=stages,
    )
    for name in chosen:
        result = parts["rcm"].name if name == "rcm" else _RESULT.get(name)
        if result and work.finished(tiny, result) and not args.again:
            stages.note(f"{name}: finished already")
            continue
        start = time.monotonic()
        try:
            stage_function(name)(tiny)
        except work.OutOfTime as end:
            stages.note(str(end))
            return 75
        stages.note(f"{name}: {time.monotonic() - start:.0f} s")
    return 0


if __name__ == "__main__":
    cli.run(main)
