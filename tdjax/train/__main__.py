"""`python -m tdjax.train PRESET key=value ...`: settings to a run. jax is imported after everything
cheap is checked."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from tdjax import cli
from tdjax.errors import UsageError
from tdjax.files import near, near_files
from tdjax.progress import Silent, Stages, say
from tdjax.text.rows import read_prompts
from tdjax.train.metrics import check_wandb
from tdjax.train.presets import METHODS, PRESETS
from tdjax.train.settings import Tree, build, lines, put, table
from tdjax.train.storage import find_shards, is_remote


def build_parser() -> argparse.ArgumentParser:
    presets = "\n".join(f"  {name:17} {preset.about}" for name, preset in PRESETS.items())
    p = cli.Parser(
        "tdjax train",
        usage="%(prog)s PRESET [key=value ...] [options]",
        description=(
            "Fine-tune with sparse-linear attention, distil to a few steps, or train by flow"
            " matching."
        ),
        epilog=(f"presets:\n{presets}\n\n`tdjax train PRESET --help` lists the keys of a preset."),
        add_help=False,
    )
    p.add_argument("preset", nargs="?", help="where the settings begin")
    p.add_argument(
        "settings",
        nargs="*",
        metavar="key=value",
        help="changes, for example data.path=shards optimizer.learning_rate=2e-5",
    )
    p.add_argument(
        "--resume",
        action="store_true",
        help="go on from the last checkpoint of run.folder, or begin if there is none",
    )
    p.add_argument(
        "--dry_run",
        action="store_true",
        help="print the resolved settings, say what they need, and stop",
    )
    p.add_argument("-q", "--quiet", action="store_true", help="no progress")
    p.add_argument(
        "-v", "--verbose", action="store_true", help="progress also where stderr is not a terminal"
    )
    cli.add_hosts(p)
    p.add_argument("-h", "--help", action="store_true", help="this text; after a preset, its keys")
    return p


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 ok, 2 usage, 3 checkpoint or data, 4 out of memory, 5 not finite, 130
    interrupted."""
    kept = "checkpoints are whole; the same command with --resume goes on from the last one"
    return cli.main(_command, argv, parser=build_parser, interrupted=kept)


def _command(argv: list[str]) -> int:
    parser = build_parser()
    args = parser.parse_intermixed_args(argv)
    if args.preset is None:
        print(parser.format_help(), end="", file=sys.stdout if args.help else sys.stderr)
        return 0 if args.help else 2
    parts = resolve(args.preset, args.settings)
    if args.help:
        print(parser.format_usage() + "\n" + help_of(args.preset, parts))
        return 0
    return run(args, parts)


def resolve(name: str, settings: list[str]) -> dict[str, Tree]:
    """The settings of a preset with those of the command line over them, by part. Raises UsageError
    for a wrong key or type."""
    if name.lower() not in PRESETS:
        close = near(name.lower(), PRESETS)
        fix = (
            f"did you mean {close[0]}?"
            if close
            else "for example: tdjax train sla-1.3b data.path=shards"
        )
        raise UsageError(f"unknown preset {name!r}", f"known presets: {', '.join(PRESETS)}", fix)
    preset = PRESETS[name.lower()]
    parts = {first: Tree(cls) for first, cls in METHODS[preset.method].items()}
    for key, value in preset.values.items():
        put(parts, key, value)
    for word in settings:
        key, equals, value = word.partition("=")
        if not equals:
            raise UsageError(
                f"cannot read {word!r}",
                "settings are key=value, without blanks",
                "for example run.steps=1000",
            )
        put(parts, key, value)
    model = parts["model"].values
    if model.get("weights"):
        model.pop("dit", None)
        given = next((word for word in settings if word.startswith("model.dit.")), None)
        if given:
            raise UsageError(
                f"{given} with model.weights",
                "the sizes are those of the file",
                "leave it away, or give model.weights=",
            )
    if not parts["run"].values.get("folder"):
        parts["run"].values["folder"] = f"output/{name.lower()}"
    return parts


def help_of(name: str, parts: dict[str, Tree]) -> str:
    """Every key of a preset with the value it has there and what is said of it."""
    skipped = (
        "model.dit." if parts["model"].values.get("weights") else "model.student"
    )  # says nothing here
    rows = [
        (f"  {key}={value}", note)
        for key, (value, note) in table(parts).items()
        if not key.startswith(skipped)
    ]
    wide = max(len(left) for left, note in rows if note)
    text = [f"{left:{wide}}  # {note}" if note else left for left, note in rows]
    return "\n".join([f"{name.lower()}: {PRESETS[name.lower()].about}", "", *text])


def check_early(args, config: dict[str, Any]) -> None:
    """Whatever can be wrong with paths, found before jax is imported."""
    run, data = config["run"], config["data"]
    if not data.path:
        raise UsageError(
            "data.path is not given",
            "it is the folder of shard_000000.tar, shard_000001.tar, ...",
            "give data.path=FOLDER",
        )
    if not is_remote(data.path) and not find_shards(Path(data.path)):
        what = "has no shard*.tar" if Path(data.path).is_dir() else "is not a folder"
        raise UsageError(
            f"data.path: {data.path} {what}",
            "shards are named shard_000000.tar, ...",
            near_files(Path(data.path)),
        )
    if data.negative and not Path(data.negative).is_file():
        raise UsageError(
            f"data.negative: {data.negative} does not exist",
            "it is one prompt's embedding",
            near_files(Path(data.negative)),
        )
    _check_prompts(config["sample"].prompts)
    check_wandb(run.wandb)
    found = sorted(path.parent for path in Path(run.folder).glob("step_*/manifest.json"))
    if found and not args.resume:
        raise UsageError(
            f"{found[-1]} exists",
            "a run does not begin over another one",
            "go on with --resume, or give another run.folder",
        )


def _check_prompts(prompts: str) -> None:
    """Raises UsageError for a file of prompts to sample that cannot be read; of embeddings, for one
    that is not there."""
    path = Path(prompts)
    if path.suffix != ".safetensors":
        if prompts:
            read_prompts(path)
    elif not path.is_file():
        raise UsageError(
            f"sample.prompts: {path} does not exist", "it holds embeddings", near_files(path)
        )


def needs(method: str, config: dict[str, Any]) -> int:
    """Says what a run needs, beside its settings."""
    cli.start_jax(lambda line: None)
    from tdjax.train import plan

    for line in plan.lines(method, config):
        say(line)
    return 0


def run(args, parts: dict[str, Tree]) -> int:
    config = {first: build(tree) for first, tree in parts.items()}
    if not args.dry_run:
        check_early(args, config)
    text = [line for first in parts for line in lines(first, config[first])]
    text = [
        line for line in text if not (config["model"].weights and line.startswith("model.dit."))
    ]  # those are the file's
    if args.dry_run:
        print("\n".join(text))
        return needs(PRESETS[args.preset.lower()].method, config)
    cache_note = cli.set_compile_cache()
    from tdjax.parallel import hosts

    hosts.join(args.coordinator, args.processes, args.process_id)
    stages = Stages(False if args.quiet else args.verbose or None)
    if not hosts.first():  # the others say what ends them, and nothing else
        stages = Silent()
    if cache_note:
        stages.note(cache_note)
    cli.start_jax(stages.note)
    if note := hosts.share_compile_cache():
        stages.note(note)
    from tdjax.train.run import TrainingRun

    preset = PRESETS[args.preset.lower()]
    settings = dict(line.split("=", 1) for line in text)
    with hosts.lost(), hosts.held(Path(config["run"].folder)):
        training = TrainingRun(args.preset.lower(), preset.method, config, settings, stages)
        outcome = training.train(args.resume)
        if not outcome.interrupted:
            exported = training.export(outcome)
    hosts.leave()
    if outcome.interrupted:
        stages.note(
            f"stopped at step {outcome.step} of {config['run'].steps}; --resume goes on from"
            f" {outcome.checkpoint}"
        )
        return 130
    if hosts.first():
        for path in exported:
            print(path)
    return 0


if __name__ == "__main__":
    cli.run(main)
