"""LoRA files added to published weights: float32 inside, cast back to the base's dtype.

Tensors are matched by the leaf and layer that they fill, so prefixes and naming (Wan's, diffusers'
or kohya's) do not matter. LoRA: arXiv:2106.09685 section 4.1.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from tdjax.checkpoints.published import detect
from tdjax.checkpoints.published.files import open_source
from tdjax.checkpoints.published.rules import Row, slots
from tdjax.checkpoints.published.tensor import changed
from tdjax.errors import CheckpointError

Slot = tuple[str, int | None]

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


def floats_only(tensors: Mapping[str, Any], name: str) -> None:
    """Raises CheckpointError for 8-bit weights with scales, to which nothing can be added."""
    key = next((k for k in tensors if k.endswith((".int8_weight", ".weight_scale"))), None)
    if key is not None:
        raise CheckpointError(
            f"{name} holds 8-bit weights ({key})",
            "weights are added in floating point",
            "merge the float file, then python -m convert.quantize",
        )


def add_lora(
    tensors: Mapping[str, Any], found: detect.Detected, file, weight: float
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the tensors with a LoRA added, counts). Every key of the LoRA must find its tensor."""
    source = open_source(file)
    modules = _lora_modules(source.tensors, str(file))
    targets = {slot: key for slot, (_, key) in slots(tensors, found.rows)[0].items()}
    index = _Index(found, targets)
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
                out[key] = changed(out[key], functools.partial(_add_full, full, weight))
                counts["full"] += 1
            else:
                _check_ranks(module, parts, tensors[key].shape, str(file))
                out[key] = changed(out[key], functools.partial(_add_product, parts, weight))
                counts["low_rank"] += 1
    if lost:
        raise CheckpointError(
            f"{file}: {len(lost)} of {len(modules)} changes have no tensor in the base model",
            f"first: {', '.join(lost[:3])}",
            "all:\n" + "\n".join(f"  {line}" for line in lost),
        )
    return out, counts


def _lora_modules(tensors: Mapping[str, Any], name: str) -> dict[str, dict[str, Any]]:
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


class _Index:
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


def _check_ranks(module: str, parts: dict[str, Any], shape: tuple[int, ...], name: str) -> None:
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


def _add_product(parts: dict[str, Any], weight: float, x: np.ndarray) -> np.ndarray:
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


def _add_full(difference, weight: float, x: np.ndarray) -> np.ndarray:
    return x + np.float32(weight) * difference.read().astype(np.float32).reshape(x.shape)
