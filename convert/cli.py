"""What the three commands share: exit codes, progress on a terminal, one JSON line or text."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from tdjax.errors import TdjaxError, UsageError

INTERRUPTED = 130


def run(command: Callable[[], int]) -> int:
    """The command's exit code: 0 ok, 2 usage, 3 checkpoint mismatch, 130 interrupted. What, why and
    fix go to stderr."""
    try:
        return command()
    except TdjaxError as e:
        print(f"error: {e}", file=sys.stderr)
        return e.exit_code
    except KeyboardInterrupt:
        print("interrupted: nothing was written under the final name", file=sys.stderr)
        return INTERRUPTED


def known(args) -> dict[str, int]:
    """Config fields given on the command line."""
    return {} if args.heads is None else {"heads": args.heads}


def weighted(text: str) -> tuple[str, float]:
    """FILE or FILE:0.8"""
    path, colon, weight = text.rpartition(":")
    if colon and re.fullmatch(r"-?\d+(\.\d*)?(e-?\d+)?", weight):
        return path, float(weight)
    return text, 1.0


def bar(total: int, name: str):
    """A bar of bytes on stderr, silent where nobody looks."""
    from tqdm import tqdm

    return tqdm(
        total=total,
        desc=name,
        unit="B",
        unit_scale=True,
        disable=not sys.stderr.isatty(),
        leave=False,
        file=sys.stderr,
    )


@contextlib.contextmanager
def reading(leaves, name: str) -> Iterator:
    """The same leaves, with a bar that moves as they are read."""
    with bar(sum(x.nbytes for x in leaves.lazy.values()), name) as progress:

        def watched(lazy):
            def read():
                out = lazy.read()
                progress.update(out.nbytes)
                return out

            return dataclasses.replace(lazy, read=read)

        yield dataclasses.replace(
            leaves, lazy={name: watched(lazy) for name, lazy in leaves.lazy.items()}
        )


def save(leaves, target: Path, naming: str | None, overwrite: bool) -> Path:
    """A .safetensors file where the name says so, else a folder in our layout."""
    from convert.export import export
    from tdjax.checkpoints import orbax

    if target.suffix == ".safetensors":
        return export(leaves, target, naming, overwrite)
    return orbax.save(
        target, leaves.lazy, leaves.kind, leaves.config, source=leaves.facts, overwrite=overwrite
    )


def refuse_existing(target: Path, overwrite: bool) -> None:
    """Before any work: a destination that exists is an error, not something to find out after an
    hour."""
    if target.exists() and not overwrite:
        raise UsageError(
            f"{target} exists",
            "nothing is overwritten by itself",
            "give another name, or --overwrite",
        )


def finish(args, facts: dict, text: str, written: list[Path]) -> int:
    """Text to stderr and the paths to stdout, or one JSON line."""
    if args.json:
        print(json.dumps(facts))
    else:
        print(text, file=sys.stderr)
        for path in written:
            print(path)
    return 0
