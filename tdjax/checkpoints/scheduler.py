"""The sampler that a diffusers folder was saved with, from its scheduler_config.json and
model_index.json."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from tdjax.config.parsing import json_object
from tdjax.errors import CheckpointError

FILE = "scheduler/scheduler_config.json"
INDEX = "model_index.json"
# Schedulers of undistilled weights, and where each has its shift.
_SAMPLERS = {
    "UniPCMultistepScheduler": ("unipc", "flow_shift"),
    "FlowMatchEulerDiscreteScheduler": ("euler", "shift"),
}


def saved_boundary(folder: Path) -> float | None:
    """Returns the time at which the low-noise expert of a diffusers folder takes over, where the
    folder says one. Raises CheckpointError for a damaged file."""
    file = folder / INDEX
    if not file.is_file():
        return None
    boundary = _table(file).get("boundary_ratio")
    if boundary is None:
        return None
    plain = isinstance(boundary, int | float) and not isinstance(boundary, bool)
    if not plain or not 0 < boundary < 1:
        raise CheckpointError(
            f"{file}: boundary_ratio is {boundary!r}",
            "it is a time between 0 and 1",
            "write 0.9, or null for one transformer",
        )
    return float(boundary)


def _table(file: Path) -> dict[str, Any]:
    try:
        return json_object(file.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{file} cannot be read", str(error), "download it again, or remove it"
        ) from error


def saved_sampler(folder: Path) -> dict[str, Any]:
    """Returns the fields of a SamplerConfig that a diffusers folder says: the sampler and its
    shift; nothing where it has no scheduler, or one of another kind. Raises CheckpointError for a
    damaged file."""
    file = folder / FILE
    if not file.is_file():
        return {}
    about = _table(file)
    name = about.get("_class_name")
    if not isinstance(name, str) or name not in _SAMPLERS:
        return {}
    sampler, key = _SAMPLERS[name]
    shift = about.get(key, 1.0)
    plain = isinstance(shift, int | float) and not isinstance(shift, bool)
    if not plain or not 0 < shift < math.inf:
        raise CheckpointError(
            f"{file}: {key} is {shift!r}", "it is a positive number", "write 5.0, Wan's own"
        )
    return {"sampler": sampler, "shift": float(shift)}
