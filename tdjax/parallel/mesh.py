"""Several devices for one video, or for several: meshes such as "tp=2,sp=2". Axes by their field
names, checked against the network."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from tdjax.config import DiTConfig
from tdjax.config.values import shown, whole
from tdjax.errors import UsageError

# What users write -> the names of sharding.RULES, from what exchanges least to what exchanges most:
# the last axis of a mesh lies within a host where it fits.
AXES = {"dp": "data", "cfg": "guidance", "fsdp": "fsdp", "tp": "tensor", "sp": "seq"}
_MEANING = "copies for samples, halves of a guided step, parameters, heads and MLP, sequence"
HALVES = 2  # of a guided step: the prompt's and the negative prompt's


def parse_mesh(text: str) -> dict[str, int]:
    """ "tp=2,sp=4" -> {"tp": 2, "sp": 4}, in the order of AXES."""
    out = {}
    for word in text.split(","):
        name, _, value = word.strip().partition("=")
        if name not in AXES or name in out or not re.fullmatch("0*[1-9][0-9]{0,8}", value):
            raise UsageError(
                f"`mesh` {text[:80]}: cannot read {shown(word.strip())}",
                f"it is a list of AXIS=SIZE with the axes {', '.join(AXES)} ({_MEANING})",
                "for example sp=4, or tp=2,sp=2",
            )
        out[name] = int(value)
    return {name: out[name] for name in AXES if name in out}


def every_device(axis: str) -> str | None:
    """Returns the mesh of all devices of all hosts along one axis ("sp=4"); None where there is
    one, and for the devices of one CPU, which are the same cores."""
    count = len(jax.devices())
    apart = jax.default_backend() != "cpu" or jax.process_count() > 1
    return f"{axis}={count}" if count > 1 and apart else None


def refuse_axis(axis: str, sizes: Mapping[str, int], why: str) -> None:
    """Raises UsageError where a mesh, as `parse_mesh` gives it, has an axis that is of no use."""
    if axis in sizes:
        raise UsageError(
            f"`mesh` has the axis {axis}={sizes[axis]}",
            why,
            "leave it away, or use sp in its place",
        )


def make_mesh(given: str | int | Mesh | None, cfg: DiTConfig) -> Mesh | None:
    """Returns the mesh of a network, or None.

    given: AXIS=SIZE with commas between, of dp (copies of all, for samples), cfg (the two halves
           of a guided step), fsdp (parameters), tp (heads and MLP), sp (sequence): "sp=4",
           "tp=2,sp=2", over the first devices; a number, which is that of sp; or a Mesh with these
           names for its axes. None: no mesh.
    Raises UsageError for anything else, for cfg other than 2, for tp that does not divide the
        heads, for more devices than there are, and where it leaves out a device of several
        processes. Heads that sp does not divide are filled up.
    """
    if given is None:
        if jax.process_count() > 1:
            raise UsageError(
                f"{jax.process_count()} processes without `mesh`",
                "it says how the work is divided over their devices",
                f"for example sp={len(jax.devices())}, which are all",
            )
        return None
    if isinstance(given, Mesh):
        devices, sizes = given.devices.ravel(), _axes_of(given)
    else:
        devices = np.array(jax.devices())
        sizes = parse_mesh(given if isinstance(given, str) else f"sp={whole('mesh', given)}")
    text = ",".join(f"{name}={size}" for name, size in sizes.items())
    if sizes.get("cfg", HALVES) != HALVES:
        raise UsageError(
            f"`mesh` {text} divides a guided step by {sizes['cfg']}",
            "it has two halves, the prompt's and the negative prompt's",
            "use cfg=2; sp takes any number",
        )
    heads, over = cfg.heads, sizes.get("tp", 1)
    if heads % over:
        legal = [n for n in range(1, heads + 1) if heads % n == 0]
        raise UsageError(
            f"`mesh` {text} divides {heads} attention heads by {over}",
            "the layers of each device make whole heads",
            f"legal sizes of tp for this model: {', '.join(map(str, legal))}; sp takes any",
        )
    count = math.prod(sizes.values())
    if count > len(devices):
        raise UsageError(
            f"`mesh` {text} needs {count} devices",
            f"there are {len(devices)}: {devices[0].device_kind}",
            "use a smaller mesh",
        )
    if jax.process_count() > 1 and count < len(devices):
        raise UsageError(
            f"`mesh` {text} has {count} devices",
            f"the {jax.process_count()} processes have {len(devices)}, and each takes part",
            f"multiply an axis by {len(devices) / count:g}, or start fewer processes",
        )
    names = tuple(AXES[name] for name in sizes)
    return Mesh(
        devices[:count].reshape(tuple(sizes.values())),
        names,
        axis_types=(AxisType.Auto,) * len(names),
    )


def _axes_of(mesh: Mesh) -> dict[str, int]:
    """A caller's mesh as {"tp": 2, "sp": 4}. Raises UsageError for axes of other names."""
    if wrong := [name for name in mesh.axis_names if name not in AXES]:
        raise UsageError(
            f"`mesh` has an axis {wrong[0]!r}",
            f"its axes are named {', '.join(AXES)} ({_MEANING})",
            'for example jax.make_mesh((4,), ("sp",))',
        )
    return dict(mesh.shape)
