"""LoRA files that requests may name: those in one folder of the operator's."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tdjax.config.values import real, shown, text
from tdjax.errors import UsageError
from tdjax.files import near

SUFFIX = ".safetensors"
EXPERTS = {"high": "lora_high", "low": "lora_low"}  # {end of a name: argument of `set_loras`}
AT_ONCE = 8
STRONGEST = 10.0
EXAMPLE = '[{"name": "sketch", "weight": 0.8}]'


def lora_files(folder: Path | None) -> dict[str, dict[str, str]]:
    """Returns {name: {argument of `Pipeline.set_loras`: file}} of a folder, as it is now.

    NAME.safetensors is for every transformer, NAME.high.safetensors and NAME.low.safetensors are
    for one of two experts, and go by one name.
    """
    found: dict[str, dict[str, str]] = {}
    if folder is None:
        return found
    try:
        names = sorted(os.listdir(folder))
    except OSError:  # a disk that went away: none can be asked for
        return found
    for file in names:
        stem, suffix = os.path.splitext(file)
        if suffix != SUFFIX or file.startswith(".") or not (folder / file).is_file():
            continue
        name, _, end = stem.rpartition(".")
        if not name or end not in EXPERTS:
            name, end = stem, ""
        found.setdefault(name, {})[EXPERTS.get(end, "lora")] = str(folder / file)
    return found


def arguments_of(
    chosen: Iterable[tuple[str, float]], folder: Path | None
) -> dict[str, list[tuple[str, float]]]:
    """Returns the arguments of `Pipeline.set_loras` for (name, weight) pairs; one that is gone
    meanwhile stands there as the file that is missed."""
    files = lora_files(folder)
    out: dict[str, list[tuple[str, float]]] = {}
    for name, weight in chosen:
        missed = {"lora": f"{folder}/{name}{SUFFIX}"}
        for argument, file in files.get(name, missed).items():
            out.setdefault(argument, []).append((file, weight))
    return out


def checked_loras(given: Any, names: tuple[str, ...]) -> list[tuple[str, float]]:
    """Returns (name, weight) pairs of a request's field. Raises UsageError. names: that the server
    has."""
    if not isinstance(given, list) or len(given) > AT_ONCE:
        why = f"it is a list of at most {AT_ONCE} tables with a name and perhaps a weight"
        raise UsageError(f"lora is {shown(given)}", why, f"for example {EXAMPLE}")
    chosen: dict[str, float] = {}
    for each in given:
        if not isinstance(each, dict) or not {"name"} <= set(each) <= {"name", "weight"}:
            why = "each has a name, and perhaps a weight"
            raise UsageError(f"lora has {shown(each)}", why, f"for example {EXAMPLE}")
        name = text("the name of a lora", each["name"])
        if name not in names:
            nearest = near(name, names, cutoff=0.0)
            why = "this server has no LoRA" if not names else f"this server has {listed(names)}"
            fix = f"nearest: {nearest[0]}" if nearest else "leave `lora` away"
            raise UsageError(f"the LoRA {shown(name)} is not known", why, fix)
        if name in chosen:
            raise UsageError(f"the LoRA {shown(name)} is there twice", "once is enough", "add up")
        weight = real("the weight of a lora", each.get("weight", 1.0))
        if not -STRONGEST <= weight <= STRONGEST:
            why = f"-{STRONGEST:g} to {STRONGEST:g} are allowed"
            raise UsageError(f"the weight of {shown(name)} is {weight:g}", why, "use 1")
        chosen[name] = weight
    return list(chosen.items())


def listed(names: tuple[str, ...]) -> str:
    """The first of some names, for an error's line."""
    return ", ".join(names[:8]) + (f" and {len(names) - 8} others" if len(names) > 8 else "")
