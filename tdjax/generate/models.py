"""`tdjax models`: the models that have a name, with their sizes and files. Imports no jax."""

from __future__ import annotations

import argparse
import json

from tdjax import cli
from tdjax.presets import PRESETS, SHARED_GB

_COLUMNS = ("name", "task", "size", "steps", "GB", "hub id and files")


def build_parser() -> argparse.ArgumentParser:
    """Every option of the command."""
    p = cli.Parser(
        "tdjax models", description="Models that have a name; give it as --model of other commands."
    )
    p.add_argument("--json", action="store_true", help="the same as a JSON list")
    return p


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 ok, 2 usage."""
    return cli.main(_command, argv, parser=build_parser)


def _command(argv: list[str]) -> int:
    args = build_parser().parse_args(argv)
    print(json.dumps(listing(), indent=1) if args.json else table())
    return 0


def listing() -> list[dict]:
    """Every named model as JSON values; `gigabytes` are all that it downloads."""
    return [
        {
            "name": name,
            "task": preset.config.task,
            "resolution": preset.resolution,
            "num_steps": preset.sampler.num_steps,
            "gigabytes": round(preset.gigabytes + SHARED_GB, 1),
            "repo": preset.repo,
            "files": list(preset.dit),
            "shared": {preset.base_repo: [preset.vae, preset.text], preset.tokenizer: []},
        }
        for name, preset in PRESETS.items()
    ]


def table() -> str:
    """The listing for people."""
    rows = [_COLUMNS, ("demo", "t2v", "64x64", "4", "0", "comes with the package, runs anywhere")]
    for each in listing():
        where = f"{each['repo']}: {', '.join(each['files'])}"
        first = (each["name"], each["task"], each["resolution"])
        rows.append((*first, str(each["num_steps"]), f"{each['gigabytes']:.1f}", where))
    wide = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS) - 1)]
    lines = [
        "  ".join([*(text.ljust(n) for text, n in zip(row, wide, strict=False)), row[-1]])
        for row in rows
    ]
    shared = next(iter(PRESETS.values()))
    common = f"{shared.vae} and {shared.text} of {shared.base_repo}, and {shared.tokenizer}"
    below = [
        f"GB: all that is downloaded; {SHARED_GB:g} of it are shared by all models:",
        f"{common}.",
        "`tdjax generate --model NAME --dry_run` says what memory it needs; nothing is downloaded.",
    ]
    return "\n".join([*lines, "", *below])


if __name__ == "__main__":
    cli.run(main)
