"""A float transformer's leaves as those of one with layers of 8 bits, quantised layer by layer as
they are written, errors kept."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from convert.leaves import Leaves
from tdjax.checkpoints.orbax import Lazy
from tdjax.checkpoints.published.checkpoint import targets
from tdjax.errors import CheckpointError
from tdjax.models.linear import LINEAR, Linear

NAMES = {"int8": "int8 block128"}  # of kinds in a manifest


@partial(jax.jit, static_argnums=1)
def _layer(
    kernel, linear: str
):  # [i o] -> values [o i], f32 scales, relative and largest error of the weight
    weight = Linear.unpacked(kernel)
    values, scale = LINEAR[linear].packed(weight, None)
    error = LINEAR[linear].unpacked(values, scale) - weight
    return (
        values,
        scale,
        jnp.linalg.norm(error) / jnp.maximum(jnp.linalg.norm(weight), 1e-30),
        jnp.abs(error).max(),
    )


class _Quantized:
    """Values and scales of one stacked Linear; the second to be asked for does not compute
    again."""

    def __init__(self, kernel: Lazy, name: str, linear: str, dtype: np.dtype, errors: dict):
        self.kernel = kernel
        self.name = name
        self.linear = linear
        self.dtype = dtype
        self.errors = errors
        self.scale: np.ndarray | None = None

    def weight(self) -> np.ndarray:
        kernel = self.kernel.read()
        n, i, o = kernel.shape
        out = np.empty((n, o, i), self.dtype)
        scales, relative, largest = [], [], []
        for index in range(n):
            values, scale, rel, top = _layer(kernel[index], self.linear)
            out[index] = values
            scales.append(np.asarray(scale))
            relative.append(float(rel))
            largest.append(float(top))
        self.scale = np.stack(scales)
        self.errors[self.name] = {"relative": relative, "largest": largest}
        return out

    def scales(self) -> np.ndarray:
        if self.scale is None:
            self.weight()
        return self.scale


def quantized(leaves: Leaves, linear: str = "int8") -> tuple[Leaves, dict]:
    """(leaves of that kind, errors by layer, filled as the leaves are read). Refuses what is no
    float transformer."""
    if leaves.kind != "dit":
        raise CheckpointError(
            f"{leaves.path.name} is a {leaves.kind}",
            "only the transformer has layers of 8 bits",
            "give a video transformer",
        )
    if leaves.config.linear != "float":
        raise CheckpointError(
            f"{leaves.path.name} is quantised already",
            f"its linears are {leaves.config.linear}",
            "give the bf16 file",
        )
    config = dataclasses.replace(leaves.config, linear=linear)
    errors: dict = {}
    lazy, shapes = dict(leaves.lazy), targets("dit", config)
    for name in [n for n in lazy if n not in shapes]:
        stem = name.removesuffix(".kernel")
        values, scale = (shapes[f"{stem}.{last}"] for last in LINEAR[linear].leaves)
        made = _Quantized(lazy.pop(name), stem, linear, np.dtype(values.dtype), errors)
        for last, shape, read in zip(
            LINEAR[linear].leaves, (values, scale), (made.weight, made.scales), strict=True
        ):
            lazy[f"{stem}.{last}"] = Lazy(tuple(shape.shape), np.dtype(shape.dtype), read)
    naming = "turbo" if leaves.naming == "wan" else leaves.naming
    facts = leaves.facts | {"quantised": NAMES.get(linear, linear), "names": naming}
    return dataclasses.replace(leaves, config=config, lazy=lazy, facts=facts), errors


def error_table(errors: dict) -> str:
    """Relative L2 error of the weights by linear: mean over layers, and the worst layer."""
    lines = [f"{'weight error':28} {'mean':>9} {'worst':>9}  layer"]
    for name, e in sorted(errors.items()):
        worst = int(np.argmax(e["relative"]))
        lines.append(
            f"{name:28} {np.mean(e['relative']):9.2e} {e['relative'][worst]:9.2e}  {worst}"
        )
    return "\n".join(lines)
