"""Shards with a file beside each that says what it was made of: who makes the same again finds it
there, and what was made otherwise is not written over."""

from __future__ import annotations

import collections
import itertools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tdjax.config.parsing import json_object
from tdjax.errors import UsageError
from tdjax.files import write_text
from tdjax.train.shards import write_shard


def sidecar(path: Path) -> dict[str, Any]:
    """Returns what the file beside a shard says of it; nothing where there is none. Raises
    UsageError for a damaged one."""
    file = path.with_suffix(".json")
    try:
        return json_object(file.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UsageError(f"{file} cannot be read", str(error), "remove it") from error


def differing(about: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Returns the names of what a sidecar says otherwise, or not at all."""
    wanted = json.loads(json.dumps(wanted))
    return [name for name in wanted if about.get(name) != wanted[name]]


def finished(path: Path, wanted: dict[str, Any]) -> bool:
    """Returns whether a shard is there, made of what is wanted; of samples that are all damaged
    there is the sidecar alone. Raises UsageError for a shard that was made otherwise."""
    about = sidecar(path)
    other = differing(about, wanted)
    if not path.exists():
        return not other and not about["samples"]
    if other:
        why = f"other {', '.join(other)}" if about else "nothing says how it was made"
        raise UsageError(
            f"{path} is there and is not the shard that would be made",
            f"{why}: files, texts or options have changed",
            "give another folder, or the same files and options",
        )
    return True


def write(
    path: Path, samples: Iterator[tuple], first: int, about: Callable[[], dict[str, Any]]
) -> None:
    """Writes a shard, arguments as those of `write_shard`; and, just before it has its name, its
    sidecar: what `about` returns once all samples were made, their number as "samples"."""

    def complete() -> Iterator[tuple]:
        yield from samples
        write_text(path.with_suffix(".json"), json.dumps(about(), indent=1) + "\n")

    one = next(samples, None)
    if one is None:
        collections.deque(complete(), maxlen=0)
        return
    samples = itertools.chain([one], samples)
    write_shard(path, complete(), first)


def parse_part(text: str | None) -> tuple[int, int]:
    """ "2/8" -> (1, 8): the place, from 0, and the count of processes that share the work. Raises
    UsageError."""
    if text is None:
        return 0, 1
    match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise UsageError(
            f"--part is {text[:80]!r}",
            "it is I/N, I from 1 to N",
            "for example --part 1/8 on the first of eight GPUs",
        )
    return int(match[1]) - 1, int(match[2])
