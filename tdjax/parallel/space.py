"""Frames divided in space over devices: each has some rows or columns, and asks its neighbours for
the edges that a convolution sees.

The networks know only `with_edges`, `whole_frame` and `on_every_device`; outside of `over_space`
they stand for zeros at the border, and for nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, Mesh, PartitionSpec

AXES = {"rows": 2, "columns": 3}  # mesh axis -> axis of [b t h w c]
COPIES = "copies"  # mesh axis of devices that do the same


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


def with_edges(x, before: int, after: int):
    """(x [b t h w c] with its neighbours' edges, the zeros that are still to be put around h and w:
    ((before, after), (before, after)), of which those that were exchanged are (0, 0)).

    before, after: how many rows and columns are seen on each side. At the border of the frame the
    edges are zeros.
    """
    sizes = _sizes()
    pads = []
    for name, axis in AXES.items():
        if name not in sizes:
            pads.append((before, after))
            continue
        count = sizes[name]
        up = [(i, i + 1) for i in range(count - 1)]
        down = [(i + 1, i) for i in range(count - 1)]
        length = x.shape[axis]
        edges = []
        if before:
            last = lax.slice_in_dim(x, length - before, length, axis=axis)
            edges.append(lax.ppermute(last, name, up))
        edges.append(x)
        if after:
            edges.append(lax.ppermute(lax.slice_in_dim(x, 0, after, axis=axis), name, down))
        x = jnp.concatenate(edges, axis=axis)
        pads.append((0, 0))
    return x, tuple(pads)


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
