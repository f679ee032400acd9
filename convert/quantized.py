"""A float transformer's leaves as those of an int8 one, quantised layer by layer as they are written, errors kept."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from convert.leaves import Leaves
from convert.load import targets
from pallas_kernels.int8_matmul import QTensor, dequantize, quantize
from tdjax.checkpoint import Lazy
from tdjax.errors import CheckpointError


@jax.jit
def layer(kernel):  # [i o] -> int8 [o i], f32 scales, relative and largest error of the weight
    weight = rearrange(kernel.astype(jnp.float32), "i o -> o i")
    q = QTensor(*quantize(weight))
    error = dequantize(q) - weight
    return q.values, q.scale, jnp.linalg.norm(error) / jnp.maximum(jnp.linalg.norm(weight), 1e-30), jnp.abs(error).max()


class Quantized:
    """int8_weight and scale of one stacked Linear; the second to be asked for does not compute again."""

    def __init__(self, kernel: Lazy, name: str, errors: dict):
        self.kernel, self.name, self.errors, self.scale = kernel, name, errors, None

    def weight(self) -> np.ndarray:
        kernel = self.kernel.read()
        n, i, o = kernel.shape
        out, scales, relative, largest = np.empty((n, o, i), np.int8), [], [], []
        for index in range(n):
            values, scale, rel, top = layer(kernel[index])
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


def quantized(leaves: Leaves) -> tuple[Leaves, dict]:
    """(int8 leaves, errors by layer, filled as the leaves are read). Refuses what is no float transformer."""
    if leaves.kind != "dit":
        raise CheckpointError(f"{leaves.path.name} is a {leaves.kind}", "only the transformer has int8 layers", "give a video transformer")
    if leaves.config.linear != "float":
        raise CheckpointError(f"{leaves.path.name} is quantised already", f"its linears are {leaves.config.linear}", "give the bf16 file")
    config = dataclasses.replace(leaves.config, linear="int8")
    errors: dict = {}
    lazy, linears = dict(leaves.lazy), {}
    shapes = targets("dit", config)
    for name in [n for n in lazy if n not in shapes]:
        stem = name.removesuffix(".kernel")
        linears[stem] = Quantized(lazy.pop(name), stem, errors)
    for stem, linear in linears.items():
        weight, scale = shapes[f"{stem}.int8_weight"], shapes[f"{stem}.scale"]
        lazy[f"{stem}.int8_weight"] = Lazy(tuple(weight.shape), np.dtype(weight.dtype), linear.weight)
        lazy[f"{stem}.scale"] = Lazy(tuple(scale.shape), np.dtype(scale.dtype), linear.scales)
    naming = "turbo" if leaves.naming == "wan" else leaves.naming
    return dataclasses.replace(
        leaves, config=config, lazy=lazy, facts=leaves.facts | {"quantised": "int8 block128", "names": naming}
    ), errors


def error_table(errors: dict) -> str:
    """Relative L2 error of the weights by linear: mean over layers, and the worst layer."""
    lines = [f"{'weight error':28} {'mean':>9} {'worst':>9}  layer"]
    for name, e in sorted(errors.items()):
        worst = int(np.argmax(e["relative"]))
        lines.append(f"{name:28} {np.mean(e['relative']):9.2e} {e['relative'][worst]:9.2e}  {worst}")
    return "\n".join(lines)
