"""`python -m convert SRC... DST`: published checkpoints to tdjax's layout, or back to
safetensors."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from convert.cli import INTERRUPTED, check_target, finish, known
from tdjax import cli
from tdjax.cli import lora_pair
from tdjax.errors import UsageError

EPILOG = """\
SRC   a .pth or .safetensors file, a shard index, a folder of shards, or a folder that this command
      wrote. Several files, or a folder with a whole model, make DST a model folder: dit/ (or
      dit_high/ and dit_low/), vae/, text/, the tokenizer.
DST   a folder in tdjax's layout, or NAME.safetensors to export under the published names.

The kind, size, task, attention and quantisation are read from the keys. Only paths go to stdout,
the report to stderr.
Exit codes: 0 ok, 2 usage, 3 the checkpoint is damaged or another model, 130 interrupted."""


def build_parser() -> argparse.ArgumentParser:
    """Every option of the command."""
    p = cli.Parser(
        "tdjax convert",
        usage="%(prog)s SRC... DST [options]",
        description=__doc__,
        epilog=EPILOG,
    )
    p.add_argument(
        "paths",
        metavar="SRC... DST",
        nargs="+",
        type=cli.path,
        help="what to convert, and where to; with --merge only DST",
    )
    p.add_argument(
        "--to", choices=("orbax", "safetensors"), help="form of DST (default: by its suffix)"
    )
    p.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        help="storage of weights (default: bfloat16)",
    )
    p.add_argument(
        "--names", choices=("turbo", "wan", "diffusers", "transformers"), help="names in an export"
    )
    p.add_argument(
        "--lora",
        action="append",
        default=[],
        type=os.path.expanduser,
        metavar="FILE[:WEIGHT]",
        help="add a LoRA to the transformer; may be repeated",
    )
    p.add_argument(
        "--merge",
        metavar="BASE,DIFF_BASE,TARGET[,W]",
        help="convert BASE + W (TARGET - DIFF_BASE) instead of SRC",
    )
    p.add_argument(
        "--heads", type=int, metavar="N", help="attention heads, where the head width is not 128"
    )
    p.add_argument("--overwrite", action="store_true", help="replace DST")
    p.add_argument("--no_hash", action="store_true", help="do not compute the sources' SHA-256")
    p.add_argument("--json", action="store_true", help="the report as one JSON line on stdout")
    return p


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 ok, 2 usage, 3 checkpoint, 130 interrupted, 143 terminated."""
    return cli.main(
        lambda words: convert(build_parser().parse_intermixed_args(words)),
        argv,
        parser=build_parser,
        interrupted=INTERRUPTED,
    )


def convert(args) -> int:
    """Converts one file or a whole model, and reports."""
    from convert.merge import merged_files
    from convert.model import components, convert_model, convert_one
    from convert.report import text

    *sources, target = args.paths
    check(args, sources, target)
    known(args)
    merged = merged_files(args.merge)[0] if args.merge else ()
    loras = (Path(lora_pair(text)[0]) for text in args.lora)
    check_target(target, args.overwrite, [*sources, *merged, *loras])
    parts = components(sources) if sources else {"dit": None}
    one = len(parts) == 1 and "tokenizer" not in parts
    reports = (
        [convert_one(args, next(iter(parts.values())), target)]
        if one
        else convert_model(args, parts, target)
    )
    return finish(
        args, {"out": str(target), "parts": reports}, "\n\n".join(map(text, reports)), [target]
    )


def check(args, sources: list[Path], target: Path) -> None:
    """Refuse contradictions before anything is opened."""
    if args.merge and sources:
        raise UsageError(
            f"--merge and a source ({sources[0]})",
            "BASE is the source",
            f"python -m convert --merge {args.merge} {target}",
        )
    if not args.merge and not sources:
        raise UsageError(
            f"one path ({target})",
            "a source and a destination are needed",
            "python -m convert SRC DST",
        )
    if args.to and (args.to == "safetensors") != (target.suffix == ".safetensors"):
        raise UsageError(
            f"--to {args.to} and {target.name}",
            "an export is named .safetensors, a folder is not",
            "change one of them",
        )
    if args.names and target.suffix != ".safetensors":
        raise UsageError(
            f"--names {args.names} and the folder {target}",
            "our layout has its own names",
            "give NAME.safetensors",
        )


if __name__ == "__main__":
    cli.run(main)
