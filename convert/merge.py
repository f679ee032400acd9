"""Weight arithmetic on published files: base + w (target - diff_base). Float32 inside, cast back to
the base's dtype of 16 or 32 bits.

Tensors are matched by the leaf and layer that they fill, so prefixes and naming (Wan's or
diffusers') do not matter.
Arithmetic: thu-ml/TurboDiffusion turbodiffusion/scripts/merge_models.py.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import numpy as np

from tdjax.checkpoints.published.lora import Slot, floats_only
from tdjax.checkpoints.published.rules import row_of, slots
from tdjax.checkpoints.published.tensor import changed
from tdjax.config.values import parse_real, path, shown
from tdjax.errors import CheckpointError, UsageError
from tdjax.files import near_files


def merged_files(text: str) -> tuple[list[Path], float]:
    """BASE,DIFF_BASE,TARGET[,W] -> (the three paths, W or 1). Raises UsageError."""
    fields = text.split(",")
    *names, weight = fields if len(fields) == 4 else [*fields, "1"]
    if len(names) != 3 or not all(names):
        raise UsageError(
            f"--merge {text[:80]}",
            "three files and a weight, separated by commas",
            "--merge rcm.pth,wan.safetensors,sla.pth,1.0",
        )
    try:
        number = parse_real(weight)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UsageError(
            f"--merge: the weight is {shown(weight)}", "it must be a number", "such as 1.0"
        )
    paths = [Path(path("--merge", name)).expanduser() for name in names]
    for place in paths:
        if not place.exists():
            raise UsageError(
                f"--merge: {place} does not exist", "it is a source", near_files(place)
            )
    return paths, number


def merge(base, diff_base, target, weight: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """Three opened checkpoints -> (the base's tensors changed, counts).

    matched: changed. kept: in the base alone, or of another shape elsewhere (the wider patch
             embedding of
    image-to-video). copied: in the target alone (the SLA projection). Raises unless most of the
    base matched.
    """
    for other in (base, diff_base, target):
        floats_only(other.tensors, other.name)
        if other.kind != base.kind:
            raise CheckpointError(
                f"{other.name} is a {other.kind}, {base.name} a {base.kind}",
                "only like can be merged",
                "check the three files",
            )
    ours, before, after = (slots(c.tensors, c.found.rows)[0] for c in (base, diff_base, target))
    out, kept = dict(base.tensors), []
    for slot, (_, key) in ours.items():
        pair = [
            c.tensors[found[slot][1]]
            for c, found in ((diff_base, before), (target, after))
            if slot in found
        ]
        if len(pair) == 2 and all(_same_values(base.tensors[key].shape, t.shape) for t in pair):
            out[key] = changed(base.tensors[key], functools.partial(_add_difference, *pair, weight))
        else:
            kept.append(key)
    copied = {
        _key_of(slot, base): target.tensors[key]
        for slot, (_, key) in after.items()
        if slot not in ours
    }
    matched = len(ours) - len(kept)
    if 2 * matched < len(ours):
        raise CheckpointError(
            f"only {matched} of {len(ours)} tensors of {base.name} are in both {diff_base.name} and"
            f" {target.name}",
            "the others are missing or of another shape there, and a merge would leave them as"
            " they are",
            "check that the three files are of one model size",
        )
    counts = {
        "merge": [base.name, diff_base.name, target.name, weight],
        "matched": matched,
        "kept": len(kept),
        "copied": len(copied),
    }
    return out | copied, counts | {"kept_keys": sorted(kept)}


def _add_difference(diff_base, target, weight: float, x: np.ndarray) -> np.ndarray:
    after, before = (t.read().astype(np.float32).reshape(x.shape) for t in (target, diff_base))
    return x + np.float32(weight) * (after - before)


def _same_values(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Equal shapes, or a patch embedding once as a convolution and once flat: the order of values
    is the same."""
    return a == b or ({len(a), len(b)} == {2, 5} and a[0] == b[0] and np.prod(a) == np.prod(b))


def _key_of(slot: Slot, like) -> str:
    """The name that a slot would have in a file like this one."""
    leaf, layer = slot
    return row_of(leaf, like.found.rows).key(leaf, layer)
