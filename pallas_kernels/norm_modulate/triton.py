"""Row kernels: a row is read once, stays in registers, and leaves as the stream, its norm, and the
norm in 8 bits."""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.primitives import LOG2E, exp2, fma, launch, reciprocal
from pallas_kernels.quantized import QTensor
from pallas_kernels.rounding import rounded, total
from pallas_kernels.rows import load_parts, quantize_rows, split, store_parts, store_quantized
from pallas_kernels.tuning import tile

__all__ = ["gelu", "norm"]

GELU = -2 * LOG2E * math.sqrt(2 / math.pi)  # gelu(x) = x / (1 + 2^(GELU (x + 0.044715 x^3)))


def norm(x, y, gate, factor, shift, *, eps, floats, dtype, interpret: bool):
    """`reference.norm`; the grid is (rows of a sample, samples)."""
    (b, l, d), at = x.shape, tile("norm_modulate", "norm")
    row = lambda a: pl.BlockSpec(
        (None, None, *a.shape[2:]), lambda i, b: (b, i) + (0,) * (a.ndim - 2)
    )
    sample = lambda a: pl.BlockSpec((None, d), lambda i, b: (b if a.shape[0] > 1 else 0, 0))
    ins = {"x": x, "y": y, "gate": gate, "factor": factor, "shift": shift}
    ins = {name: a for name, a in ins.items() if a is not None}
    outs = {}
    if y is not None:
        outs["stream"] = jax.ShapeDtypeStruct(x.shape, x.dtype)
    if floats:
        outs["h"] = jax.ShapeDtypeStruct(x.shape, x.dtype)
    if dtype:
        outs["values"] = jax.ShapeDtypeStruct(x.shape, dtype)
        outs["scale"] = jax.ShapeDtypeStruct((b, l), jnp.float32)
    options = {"eps": eps, "interpret": interpret}
    result = launch(
        partial(norm_kernel, names=(*ins, *outs), parts=split(d, at.warps), **options),
        list(outs.values()),
        (l, b),
        [row(a) if a.ndim == 3 else sample(a) for a in ins.values()],
        [row(a) for a in outs.values()],
        warps=at.warps,
        stages=at.stages,
        interpret=interpret,
    )(*ins.values())
    out, q = dict(zip(outs, result, strict=True)), None
    if dtype:
        values = rearrange(out["values"], "b l d -> (b l) d")
        q = QTensor(values, rearrange(out["scale"], "b l -> (b l)"))
    return out.get("stream", x), out.get("h"), q


def norm_kernel(*refs, names, parts, eps, interpret):
    """x y stream h values [d], gate factor shift [d], scale []."""
    refs = dict(zip(names, refs, strict=True))
    d = refs["x"].shape[0]
    xs = load_parts(refs["x"], parts)
    if "y" in refs:
        ys = load_parts(refs["y"], parts)
        if "gate" in refs:
            ys = [y * gate for y, gate in zip(ys, load_parts(refs["gate"], parts), strict=True)]
        xs = [rounded(x + y, refs["x"].dtype, interpret) for x, y in zip(xs, ys, strict=True)]
        store_parts(refs["stream"], xs, parts)
    mean = total(xs) * (1 / d)
    xs = [x - mean for x in xs]
    deviation = lax.rsqrt(total([x * x for x in xs]) * (1 / d) + eps)
    factors, shifts = load_parts(refs["factor"], parts), load_parts(refs["shift"], parts)
    affine = zip(xs, factors, shifts, strict=True)
    xs = [fma(x * deviation, factor, shift, interpret) for x, factor, shift in affine]
    if "h" in refs:
        store_parts(refs["h"], xs, parts)
    if "values" in refs:
        store_quantized(refs["values"], refs["scale"], xs, parts, interpret)


def gelu(x, *, dtype, interpret: bool) -> QTensor:  # [b l d]
    """`reference.gelu`."""
    rows, at = rearrange(x, "b l d -> (b l) d"), tile("norm_modulate", "gelu")
    return quantize_rows(rows, dtype, before=gelu_tanh, tile=at, interpret=interpret)


def gelu_tanh(x, interpret):  # float32
    """x times a logistic function, which is GELU's tanh form without the cancellation in 1 +
    tanh."""
    power = fma(x * x, jnp.float32(GELU * 0.044715), jnp.float32(GELU), interpret)
    return x * reciprocal(1 + exp2(x * power, interpret), interpret)
