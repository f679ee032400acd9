"""Tiles: warps and pipeline stages of each kernel for each family of GPUs, from `<op>/tiles.json`,
and from `tiles.json` beside this file for kernels that several ops share; nothing is searched at
run time."""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from pathlib import Path

import jax

# from which compute capability on
FAMILIES = {8.0: "sm80", 8.9: "sm89", 9.0: "sm90", 10.0: "sm100", 12.0: "sm120"}
DEFAULT = "sm90"  # where no GPU is: interpret mode, and lowering on a CPU
SHARED = "."  # in place of an op's folder: kernels that several ops share have their tiles here


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
    """The tile of a kernel of the folder `op`, or of `SHARED`; arch is a family, by default that of
    the device at hand."""
    return Tile(**tiles(op)[kernel][arch or family()])


@cache
def tiles(op: str) -> dict[str, dict[str, dict[str, int]]]:
    """`<op>/tiles.json`: kernel -> family -> fields of Tile."""
    return json.loads((Path(__file__).parent / op / "tiles.json").read_text())
