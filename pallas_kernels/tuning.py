"""Tiles: warps and pipeline stages of each kernel for each family of GPUs, from `<op>/tiles.json`,
and from `tiles.json` beside this file for kernels that several ops share; nothing is searched at
run time."""

from __future__ import annotations

import dataclasses
import json
import re
from functools import cache
from pathlib import Path

import jax

# from which compute capability on
FAMILIES = {8.0: "sm80", 8.9: "sm89", 9.0: "sm90", 10.0: "sm100", 12.0: "sm120"}
DEFAULT = "sm90"  # where no GPU is: interpret mode, and lowering on a CPU
# names of GPUs that are only described (by a mesh of described devices): those have no capability
DESCRIBED = {
    r"A30|A100": "sm80",
    r"L4|L40|RTX 4090": "sm89",
    r"H100|H200|GH200": "sm90",
    r"G?B[23]00": "sm100",
    r"RTX (PRO [456]000|50\d0)": "sm120",
}
SHARED = "."  # in place of an op's folder: kernels that several ops share have their tiles here


@dataclasses.dataclass(frozen=True)
class Tile:
    """num_warps and num_stages of a Triton kernel."""

    warps: int
    stages: int


def family() -> str:
    """Returns the family of the GPU at hand or described, and `DEFAULT` where there is none. Raises
    ValueError below Ampere."""
    return known_family() or DEFAULT


def known_family() -> str | None:
    """Returns the family of the GPU that the mesh in use describes, else that of the default
    device: the newest one that is not newer than it. None where no GPU is at hand or described.
    Raises ValueError below Ampere."""
    described = described_device()
    if described is not None and described.platform == "gpu":
        for pattern, name in DESCRIBED.items():
            if re.search(rf"\b({pattern})\b", described.device_kind):
                return name
    device = jax.devices()[0]
    capability = getattr(device, "compute_capability", None)
    if device.platform != "gpu" or capability is None:
        return None
    fits = [name for least, name in FAMILIES.items() if least <= float(capability)]
    if not fits:
        raise ValueError(
            f"{device.device_kind} has compute capability {capability}; the Triton kernels need 8.0"
            ' (Ampere) or newer; impl="reference" runs on it'
        )
    return fits[-1]


def described_device():
    """Returns the device that the mesh in use describes (jax.sharding.AbstractDevice): its
    device_kind, num_cores and platform. None without a mesh."""
    return getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)


def tile(op: str, kernel: str, arch: str | None = None) -> Tile:
    """The tile of a kernel of the folder `op`, or of `SHARED`; arch is a family, by default that of
    the device at hand."""
    return Tile(**tiles(op)[kernel][arch or family()])


@cache
def tiles(op: str) -> dict[str, dict[str, dict[str, int]]]:
    """`<op>/tiles.json`: kernel -> family -> fields of Tile."""
    return json.loads((Path(__file__).parent / op / "tiles.json").read_text())
