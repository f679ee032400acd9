"""What the Mosaic GPU kernels share: which devices take them, and how tiles lie in shared memory.

Mosaic GPU addresses the chip without a compiler of tiles between: tensor instructions of a whole
warpgroup (wgmma), copies by the copy engine (TMA), barriers in shared memory. The kernels here are
for Hopper alone. This module does not import the backend, which takes a second; each `mosaic.py`
does.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.tuning import family

FAMILY = "sm90"
MULTIPROCESSORS = 132  # of an H100 or H200; where no GPU is: lowering on a CPU
INTERPRETED = 2  # programs of the interpreter, which runs each as a thread of its own


def unavailable() -> str | None:
    """Returns why no Mosaic GPU kernel is compiled here; None if they are."""
    if jax.__version_info__ < (0, 11):
        return f"the Mosaic GPU kernels need jax 0.11 or newer; this is jax {jax.__version__}"
    if family() != FAMILY:
        device = jax.devices()[0]
        return (
            "the Mosaic GPU kernels need a Hopper GPU (compute capability 9.0);"
            f" {device.device_kind} has {device.compute_capability}"
        )
    return None


def refuse(op: str, reason: str | None) -> None:
    """Raises ValueError if there is a reason why the kernel does not take what it is given."""
    if reason:
        raise ValueError(f'{op}: {reason}\nimpl="triton" and impl="reference" take it')


def programs(interpret: bool) -> int:
    """Returns how many programs a kernel is that stays on its multiprocessor until all is done."""
    if interpret:
        return INTERPRETED
    return getattr(jax.devices()[0], "core_count", None) or MULTIPROCESSORS


def swizzled(columns: int, dtype):
    """Returns the layout in shared memory of rows of so many columns, as tensor instructions and
    wide stores want it."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    size = jnp.dtype(dtype).itemsize
    swizzle = min(128, columns * size)
    return plgpu.TilingTransform((8, swizzle // size)), plgpu.SwizzleTransform(swizzle)
