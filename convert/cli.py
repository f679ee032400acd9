"""What the three commands share: their options for sources, progress on a terminal, one JSON line
or text."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from tdjax.errors import UsageError

# What Ctrl-C leaves behind.
INTERRUPTED = "nothing was written under the final name"


def known(args) -> dict[str, int]:
    """Config fields given on the command line. Raises UsageError."""
    if args.heads is not None and not 1 <= args.heads <= 1024:
        raise UsageError(
            f"--heads is {args.heads}",
            "a network has 1 to 1024 of them",
            "leave it away where the head width is 128",
        )
    return {} if args.heads is None else {"heads": args.heads}


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


def check_target(target: Path, overwrite: bool, inputs: Iterable[Path]) -> None:
    """Before any work: a destination that may not be written is an error, not something to find out
    after an hour. Raises UsageError."""
    from tdjax.checkpoints.folders import is_model
    from tdjax.files import refuse_existing, refuse_inputs, refuse_unwritable

    refuse_unwritable(target)
    refuse_existing(target, overwrite, owned=is_model)
    refuse_inputs(target, inputs)


def finish(args, facts: dict, text: str, written: list[Path]) -> int:
    """Text to stderr and the paths to stdout, or one JSON line."""
    if args.json:
        print(json.dumps(facts))
    else:
        print(text, file=sys.stderr)
        for path in written:
            print(path)
    return 0
