"""Weight arithmetic on published files: base + w (target - diff_base), and LoRA. Float32 inside,
cast back to the base's dtype.

Tensors are matched by the leaf and layer that they fill, so prefixes and naming (Wan's or
diffusers') do not matter.
Arithmetic: thu-ml/TurboDiffusion turbodiffusion/scripts/merge_models.py. LoRA: arXiv:2106.09685
            section 4.1.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from convert import detect
from convert.files import open_source
from convert.rules import Row, row_of, slots
from tdjax.errors import CheckpointError

Slot = tuple[str, int | None]


@dataclasses.dataclass(frozen=True)
class Changed:
    """A tensor computed when it is read: `base` in float32, changed by each step in turn, in the
    base's dtype again."""

    base: Any
    steps: tuple[Callable[[np.ndarray], np.ndarray], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def dtype(self) -> np.dtype:
        return self.base.dtype

    @property
    def nbytes(self) -> int:
        return self.base.nbytes

    def read(self) -> np.ndarray:
        x = self.base.read().astype(np.float32)
        for step in self.steps:
            x = step(x)
        return x.astype(self.dtype)


def changed(tensor, step) -> Changed:
    """Two changes of one tensor are made in float32 with a single rounding."""
    if isinstance(tensor, Changed):
        return Changed(tensor.base, (*tensor.steps, step))
    return Changed(tensor, (step,))


def floats_only(tensors: Mapping[str, Any], name: str) -> None:
    key = next((k for k in tensors if k.endswith(".int8_weight")), None)
    if key is not None:
        raise CheckpointError(
            f"{name} holds int8 weights ({key})",
            "weights are added in floating point",
            "merge the float file, then python -m convert.quantize",
        )


# base + w (target - diff_base)
# ------------------------------------------------------------------------------------------


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
        if len(pair) == 2 and all(same_values(base.tensors[key].shape, t.shape) for t in pair):
            out[key] = changed(base.tensors[key], functools.partial(add_difference, *pair, weight))
        else:
            kept.append(key)
    copied = {
        key_of(slot, base): target.tensors[key]
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


def add_difference(diff_base, target, weight: float, x: np.ndarray) -> np.ndarray:
    after, before = (t.read().astype(np.float32).reshape(x.shape) for t in (target, diff_base))
    return x + np.float32(weight) * (after - before)


def same_values(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Equal shapes, or a patch embedding once as a convolution and once flat: the order of values
    is the same."""
    return a == b or ({len(a), len(b)} == {2, 5} and a[0] == b[0] and np.prod(a) == np.prod(b))


def key_of(slot: Slot, like) -> str:
    """The name that a slot would have in a file like this one."""
    leaf, layer = slot
    try:
        return row_of(leaf, like.found.rows).key(leaf, layer)
    except ValueError as e:
        raise CheckpointError(
            f"{like.name} has no name for {leaf}",
            f"it follows the {like.found.naming} names",
            "give the base under Wan's own names",
        ) from e


# LoRA
# -------------------------------------------------------------------------------------------------------------------

PARTS = (  # suffix of a LoRA key -> what it is
    (r"\.(lora_A|lora_down|lora\.down)(\.default)?\.weight$", "down"),
    (r"\.(lora_B|lora_up|lora\.up)(\.default)?\.weight$", "up"),
    (r"\.alpha$", "alpha"),
    (r"\.diff$", "weight"),
    (r"\.diff_b$", "bias"),
    (r"\.diff_m$", "modulation"),
)
PREFIX = re.compile(
    r"(base_model\.model\.|diffusion_model\.|transformer\.|lora_unet_+|lora_transformer_+)+"
)


def add_lora(
    tensors: Mapping[str, Any], found: detect.Detected, file, weight: float
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the tensors with a LoRA added, counts). Every key of the LoRA must find its tensor."""
    source = open_source(file)
    floats_only(tensors, "the base model")
    modules = lora_modules(source.tensors, str(file))
    targets = {slot: key for slot, (_, key) in slots(tensors, found.rows)[0].items()}
    index = Index(found, targets)
    out, lost, counts = (
        dict(tensors),
        [],
        {
            "lora": source.path.name,
            "weight": weight,
            "low_rank": 0,
            "full": 0,
            "tensors": len(source.tensors),
        },
    )
    for module, parts in modules.items():
        for kind in ("down", *(k for k in ("weight", "bias", "modulation") if k in parts)):
            if kind == "down" and "down" not in parts:
                continue
            key = index.find(module, "weight" if kind == "down" else kind)
            full = parts[kind] if kind != "down" else None
            if key is None or (
                full is not None and np.prod(full.shape) != np.prod(tensors[key].shape)
            ):
                lost.append(f"{module} ({kind})")
            elif full is not None:
                out[key] = changed(out[key], functools.partial(add_full, full, weight))
                counts["full"] += 1
            else:
                check_ranks(module, parts, tensors[key].shape, str(file))
                out[key] = changed(out[key], functools.partial(add_product, parts, weight))
                counts["low_rank"] += 1
    if lost:
        raise CheckpointError(
            f"{file}: {len(lost)} of {len(modules)} changes have no tensor in the base model",
            f"first: {', '.join(lost[:3])}",
            "all:\n" + "\n".join(f"  {line}" for line in lost),
        )
    return out, counts


def lora_modules(tensors: Mapping[str, Any], name: str) -> dict[str, dict[str, Any]]:
    """{module: {"down": ..., "up": ..., ...}} from a LoRA file's keys."""
    modules: dict[str, dict[str, Any]] = {}
    unknown = []
    for key, tensor in tensors.items():
        kind, hit = next(
            ((kind, hit) for pattern, kind in PARTS if (hit := re.search(pattern, key))),
            (None, None),
        )
        if hit is None:
            unknown.append(key)
        else:
            modules.setdefault(
                (
                    PREFIX.sub("", key[: hit.start()], count=1)
                    if PREFIX.match(key)
                    else key[: hit.start()]
                ),
                {},
            )[kind] = tensor
    odd = [
        m
        for m, parts in modules.items()
        if ("down" in parts) != ("up" in parts) or parts.keys() == {"alpha"}
    ]
    if unknown or odd or not modules:
        lines = (
            unknown
            or [f"{m}: only {', '.join(modules[m])}" for m in odd]
            or ["it holds no tensors"]
        )
        raise CheckpointError(
            f"{name} is not a LoRA that is understood: {len(lines)} odd keys",
            f"first: {', '.join(lines[:3])}",
            "known keys end in lora_A/lora_B or lora_up/lora_down .weight, .alpha, .diff, .diff_b,"
            " .diff_m\n" + "\n".join(f"  {x}" for x in lines),
        )
    return modules


class Index:
    """Finds the base's key for a module named as in Wan, in diffusers, or with underscores for dots
    (kohya)."""

    def __init__(self, found: detect.Detected, targets: dict[Slot, str]):
        self.targets = targets
        names = detect.NAMINGS[found.kind].ROWS
        self.rows: list[tuple[Row, ...]] = [
            found.rows,
            *(detect.rows(found.kind, n, found.config) for n in names if n != found.naming),
        ]
        self.flat: dict[str, str] = {}
        for slot, key in targets.items():
            for rows in self.rows:
                for row in rows:
                    name = row.key(*slot) if row.path is not None else None
                    if name:
                        self.flat.setdefault(name.replace(".", "_"), key)

    def find(self, module: str, kind: str) -> str | None:
        for rows in self.rows:
            found, _, _ = slots([f"{module}.{kind}"], rows)
            for slot in found:
                if slot in self.targets:
                    return self.targets[slot]
        return self.flat.get(f"{module}.{kind}".replace(".", "_"))


def check_ranks(module: str, parts: dict[str, Any], shape: tuple[int, ...], name: str) -> None:
    up, down = parts["up"].shape, parts["down"].shape
    inputs = int(np.prod(shape[1:]))
    if (
        len(up) < 2
        or len(down) < 2
        or up[0] != shape[0]
        or up[1] != down[0]
        or np.prod(up[2:]) != 1
        or np.prod(down[1:]) != inputs
    ):
        raise CheckpointError(
            f"{name}: {module} has factors {list(up)} and {list(down)}",
            f"the tensor is {list(shape)}",
            "it is a LoRA of another model size",
        )


def add_product(parts: dict[str, Any], weight: float, x: np.ndarray) -> np.ndarray:
    """x + weight * alpha / rank * up down; without alpha the scale is 1."""
    up, down = (parts[k].read().astype(np.float32) for k in ("up", "down"))
    rank = down.shape[0]
    scale = (
        float(parts["alpha"].read().astype(np.float32).reshape(())) / rank
        if "alpha" in parts
        else 1.0
    )
    return x + np.float32(weight * scale) * (
        up.reshape(up.shape[0], rank) @ down.reshape(rank, -1)
    ).reshape(x.shape)


def add_full(difference, weight: float, x: np.ndarray) -> np.ndarray:
    return x + np.float32(weight) * difference.read().astype(np.float32).reshape(x.shape)
