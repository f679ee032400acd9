"""Check a checkpoint: `python -m convert.validate CKPT [--level keys|values|forward] [--against
FILE]`, or --golden FILE.npz."""

from __future__ import annotations

import argparse
import math
import sys

from convert.cli import INTERRUPTED, finish, known
from tdjax import cli
from tdjax.errors import UsageError

EPILOG = """\
keys     every key of the file is claimed once and every leaf of the model filled, shapes and
         dtypes fit
values   also every value is read and finite; with --against every leaf is compared with another
         file, whatever its layout
forward  also the network runs on random input and its output is finite; with --against both
         outputs are compared
--golden runs a file of golden vectors of the official code through our modules in float32

Exit codes: 0 ok, 2 usage, 3 something is over tolerance, or a file is damaged or another model."""


def build_parser() -> argparse.ArgumentParser:
    """Every option of the command."""
    p = cli.Parser(
        "tdjax validate",
        usage="%(prog)s CKPT [options]",
        description=__doc__,
        epilog=EPILOG,
    )
    p.add_argument(
        "checkpoint",
        metavar="CKPT",
        type=cli.path,
        nargs="?",
        help="a published file, or a folder that python -m convert wrote",
    )
    p.add_argument(
        "--level",
        choices=("keys", "values", "forward"),
        default="values",
        help="how deep to look (default: values)",
    )
    p.add_argument(
        "--against",
        type=cli.path,
        metavar="FILE",
        help="another file of the same weights, published or ours",
    )
    p.add_argument(
        "--golden",
        type=cli.path,
        metavar="FILE",
        action="append",
        default=[],
        help="golden vectors, or a folder of them; may be repeated",
    )
    p.add_argument(
        "--atol",
        type=float,
        help="--against: largest absolute difference (default: 0 for values, 1e-2 for outputs)",
    )
    p.add_argument(
        "--rtol",
        type=float,
        help="--against: beside it, relative to the value (default: 0 and 1e-2)",
    )
    p.add_argument(
        "--impl",
        default="auto",
        choices=("auto", "reference", "triton", "mosaic", "interpret"),
        help="kernels of attention: auto, reference, triton, mosaic, interpret",
    )
    p.add_argument(
        "--heads", type=int, metavar="N", help="attention heads, where the head width is not 128"
    )
    p.add_argument("--json", action="store_true", help="one JSON line on stdout")
    return p


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 ok, 2 usage, 3 checkpoint, 130 interrupted, 143 terminated."""
    return cli.main(
        lambda words: validate(build_parser().parse_args(words)),
        argv,
        parser=build_parser,
        interrupted=INTERRUPTED,
    )


def check(args) -> None:
    """Raises UsageError for options that make no sense, before anything is opened."""
    known(args)
    for name in ("atol", "rtol"):
        value = getattr(args, name)
        if value is None:
            continue
        if not 0 <= value < math.inf:
            raise UsageError(
                f"--{name} is {value:g}", "a finite number is needed, not negative", "such as 1e-2"
            )
        if args.against is None or args.level == "keys":
            raise UsageError(
                f"--{name} {value:g} compares nothing",
                "it is the tolerance of --against, at the levels values and forward",
                "add --against FILE, or leave it away",
            )


def validate(args) -> int:
    """Runs the golden vectors and the levels that were asked for; 3 where one fails."""
    from convert import checks, golden

    check(args)
    cli.start_jax(lambda text: print(f"tdjax: {text}", file=sys.stderr))
    if not args.golden and args.checkpoint is None:
        raise UsageError(
            "nothing to validate",
            "a checkpoint or --golden FILE is needed",
            "python -m convert.validate CKPT",
        )
    facts, lines, failed = {}, [], 0
    for path in [file for given in args.golden for file in golden.files(given)]:
        rows = golden.run(path, args.impl)
        bad = sum(r.failed for r in rows)
        facts[str(path)] = {
            "failed": bad,
            "values": {
                r.name: {"error": r.error, "allowed": r.allowed, "note": r.note} for r in rows
            },
        }
        lines += [f"{path}", golden.table(rows), f"{len(rows)} values, {bad} over tolerance", ""]
        failed += bad
    if args.checkpoint is not None:
        for level in checks.LEVELS[: checks.LEVELS.index(args.level) + 1]:
            found, text, bad = checks.CHECKS[level](args)
            facts[level] = found | {"failed": bad}
            lines += [f"{level}: {text}"]
            failed += bad
            if bad:
                break
    finish(args, {"failed": failed, **facts}, "\n".join(lines).rstrip(), [])
    return 3 if failed else 0


if __name__ == "__main__":
    cli.run(main)
