"""Tiles: warps and pipeline stages of each kernel for each family of GPUs, from `<op>/tiles.json`;
nothing is searched at run time."""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from pathlib import Path

import jax

FAMILIES = {
    8.0: "sm80",
    8.9: "sm89",
    9.0: "sm90",
    10.0: "sm100",
    12.0: "sm120",
}  # from which compute capability on
DEFAULT = "sm90"  # where no GPU is: interpret mode, and lowering on a CPU


@dataclasses.dataclass(frozen=True)
class Tile:
    """num_warps and num_stages of a Triton kernel."""

    warps: int
    stages: int


def family() -> str:
    """The family of the default device: the newest one that is not newer than it. Raises ValueError
    below Ampere."""
    device = jax.devices()[0]
    capability = getattr(device, "compute_capability", None)
    if device.platform != "gpu" or capability is None:
        return DEFAULT
    fits = [name for least, name in FAMILIES.items() if least <= float(capability)]
    if not fits:
        raise ValueError(
            f"{device.device_kind} has compute capability {capability}; the Triton kernels need 8.0"
            ' (Ampere) or newer; impl="reference" runs on it'
        )
    return fits[-1]


def tile(op: str, kernel: str, arch: str | None = None) -> Tile:
    """The tile of a kernel of the folder `op`; arch is a family, by default that of the device at
    hand."""
    return Tile(**tiles(op)[kernel][arch or family()])


@cache
def tiles(op: str) -> dict[str, dict[str, dict[str, int]]]:
    """`<op>/tiles.json`: kernel -> family -> fields of Tile."""
    return json.loads((Path(__file__).parent / op / "tiles.json").read_text())
