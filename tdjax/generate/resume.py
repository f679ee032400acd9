"""Which rows of a prompt file are done: told by the metadata beside their videos, not by a name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tdjax.config.parsing import json_object
from tdjax.generate.again import is_metadata
from tdjax.pipeline.result import sidecar

# What metadata says of the software and the run, and not of the video.
_NOT_COMPARED = ("tdjax", "versions", "device", "timings", "index")
_WORDS = {"prompts": "prompt", "files": "weights", "given": "image or array"}


def shown(paths: list[Path]) -> str:
    """The files of a row as a note names them."""
    more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
    return f"{paths[0]}{more}"


def finished(args, paths: list[Path], facts: dict[str, Any], note: Callable[[str], None]) -> bool:
    """Whether all files of a row are there as its facts say, or such as nothing is known of: what
    was made in another way, and an empty file, do not count."""
    facts = json.loads(json.dumps({**facts, "fps": args.fps}))
    whole = all(map(_holds_something, paths))
    others = set()
    for path in paths:
        about = _about(path)
        known = (about or {}).keys() & facts.keys() - set(_NOT_COMPARED)
        others |= {_WORDS.get(key, key) for key in known if about[key] != facts[key]}
        if about is None and whole and args.metadata == "on":
            note(f"{path} is there already, and nothing says how it was made: skipped")
            return True
    if others:
        note(f"{shown(paths)} was made with another {', '.join(sorted(others))}: made anew")
    elif whole:
        note(f"{shown(paths)} is there already: skipped")
    return whole and not others


def replaceable(args, paths: list[Path]) -> bool:
    """Whether nothing is lost where the files of a row are replaced."""
    full = [path for path in paths if _holds_something(path)]
    return args.metadata == "off" or all(_about(path) is not None for path in full)


def _holds_something(path: Path) -> bool:
    if path.is_dir():
        return any(path.iterdir())
    return path.exists() and path.stat().st_size > 0


def _about(path: Path) -> dict[str, Any] | None:
    """The metadata beside a file; None where there is none that tdjax wrote."""
    try:
        about = json_object(sidecar(path).read_bytes())
    except (OSError, ValueError):
        return None
    return about if is_metadata(about) else None
