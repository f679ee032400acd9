"""Frames divided in space over devices: each has some rows or columns, and asks its neighbours for
the lines that a convolution sees.

The networks know only `is_divided`, `lines_beyond`, `whole_frame` and `on_every_device`, which
stand for nothing outside of `over_space`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, Mesh, PartitionSpec

AXES = {"rows": 2, "columns": 3}  # mesh axis -> axis of [b t h w c]
COPIES = "copies"  # mesh axis of devices that do the same
AT_ONCE = 2  # latent frames: eight frames, which `temporal_unfold` holds in registers


def space_mesh(mesh: Mesh, height: int, width: int) -> Mesh:
    """Returns the devices of a mesh over the rows or the columns of frames of this size, in
    latents: as many as divide one of them, rows where both do as well; those beyond are copies."""
    devices = mesh.devices.ravel()
    divisors = [n for n in range(1, devices.size + 1) if devices.size % n == 0]
    most = lambda size: max(n for n in divisors if size % n == 0)
    by = {"rows": most(height), "columns": most(width)}
    name = max(by, key=lambda axis: by[axis])
    shape = by[name], devices.size // by[name]
    return Mesh(devices.reshape(shape), (name, COPIES), axis_types=(AxisType.Auto,) * 2)


def latents_at_once(mesh: Mesh | None, height: int, width: int, later: int) -> int:
    """Returns how many latent frames pass through the VAE together, of those after the first, for
    frames of this size in latents. Divided over devices several take no more memory than one does
    on a single device, and as many edges go to the neighbours as of one."""
    alone = mesh is None or space_mesh(mesh, height, width).devices.shape[0] < AT_ONCE
    return 1 if alone or later % AT_ONCE else AT_ONCE


def part(mesh: Mesh) -> PartitionSpec:
    """Returns how [b t h w c] lies on a mesh of `space_mesh`."""
    return PartitionSpec(None, None, *(name if name in mesh.axis_names else None for name in AXES))


def over_space(op: Callable, mesh: Mesh, inputs: tuple, outputs: tuple) -> Callable:
    """Returns op with its frames divided over a mesh of `space_mesh`.

    inputs, outputs: for each argument and result whether it (or every array in it) is [b t h w c]
                     and divided; the others are whole on every device.
    """
    specs = lambda divided: tuple(part(mesh) if each else PartitionSpec() for each in divided)
    return jax.shard_map(
        op, mesh=mesh, in_specs=specs(inputs), out_specs=specs(outputs), check_vma=False
    )


def _sizes() -> dict[str, int]:
    """Sizes of the axes that frames are divided over here; empty outside of `over_space`."""
    mesh = jax.sharding.get_abstract_mesh()
    return {
        name: mesh.shape[name]
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if name in AXES and kind == AxisType.Manual and mesh.shape[name] > 1
    }


def is_divided() -> bool:
    """Whether frames are divided here."""
    return bool(_sizes())


def lines_beyond(x) -> Iterator[tuple[int, jax.Array, jax.Array]]:  # x [b t h w c]
    """Yields (axis of x, a line of a neighbour, whether it comes after this device's and not
    before) where frames are divided; at the border of the frame a line of zeros.

    Devices 0 and 1, 2 and 3, ... swap their lines, then 1 and 2, 3 and 4, ...: two devices have one
    exchange.
    """
    for name, count in _sizes().items():
        axis, index = AXES[name], lax.axis_index(name)
        for start in range(min(2, count - 1)):
            pairs = [(i, i + 1) for i in range(start, count - 1, 2)]
            leads = index % 2 == start  # the next device is its partner
            own = lax.dynamic_slice_in_dim(x, jnp.where(leads, x.shape[axis] - 1, 0), 1, axis)
            swaps = [*pairs, *((j, i) for i, j in pairs)]
            yield axis, lax.ppermute(own, name, swaps), leads


def whole_frame(tokens):  # [b l c] -> [b L c]
    """The tokens of all devices, in any order."""
    for name in _sizes():
        tokens = lax.all_gather(tokens, name, axis=1, tiled=True)
    return tokens


def on_every_device(flag):  # bool [] -> bool []
    """Whether it is so on all devices."""
    for name in _sizes():
        flag = lax.pmin(flag.astype(jnp.int32), name).astype(bool)
    return flag
