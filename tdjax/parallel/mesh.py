"""Several devices for one video: meshes such as "tp=2,sp=2". Axes by their field names, checked
against the network."""

from __future__ import annotations

import math
import re

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from tdjax.config import DiTConfig
from tdjax.errors import UsageError
from tdjax.values import shown

# What users write -> the names of sharding.RULES.
AXES = {"fsdp": "fsdp", "tp": "tensor", "sp": "seq"}


def parse_mesh(text: str) -> dict[str, int]:
    """ "tp=2,sp=4" -> {"tp": 2, "sp": 4}"""
    out = {}
    for word in text.split(","):
        name, _, value = word.strip().partition("=")
        if name not in AXES or name in out or not re.fullmatch("0*[1-9][0-9]{0,8}", value):
            raise UsageError(
                f"`mesh` {text[:80]}: cannot read {shown(word.strip())}",
                f"it is a list of AXIS=SIZE with the axes {', '.join(AXES)} (parameters, heads and"
                " MLP, sequence)",
                "for example sp=4, or tp=2,sp=2",
            )
        out[name] = int(value)
    return out


def make_mesh(text: str | None, cfg: DiTConfig) -> Mesh | None:
    """Returns the mesh over the first devices; None for None and "auto".

    text: AXIS=SIZE with commas between, of fsdp (parameters), tp (heads and MLP), sp (sequence):
          "sp=4", "tp=2,sp=2".
    Raises UsageError for other words, for tp times sp that does not divide the heads, and for more
        devices than there are.
    """
    if text is None or text == "auto":
        return None
    sizes = parse_mesh(text)
    heads, over = cfg.heads, sizes.get("tp", 1) * sizes.get("sp", 1)
    if heads % over:
        legal = [n for n in range(1, heads + 1) if heads % n == 0]
        raise UsageError(
            f"`mesh` {text} divides {heads} attention heads by {over}",
            "inside attention each device works on whole heads",
            f"legal sizes of sp (or tp times sp) for this model: {', '.join(map(str, legal))}",
        )
    count, devices = math.prod(sizes.values()), jax.devices()
    if count > len(devices):
        raise UsageError(
            f"`mesh` {text} needs {count} devices",
            f"there are {len(devices)}: {devices[0].device_kind}",
            "use a smaller mesh",
        )
    names = tuple(AXES[name] for name in sizes)
    return Mesh(
        np.array(devices[:count]).reshape(tuple(sizes.values())),
        names,
        axis_types=(AxisType.Auto,) * len(names),
    )
