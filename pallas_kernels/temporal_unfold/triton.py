"""A program owns some pixels in all frames of a chunk: it reads each frame once and writes each
three times, as every tap's input.

The past is renewed in place: no other program reads these pixels of it.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.norm_silu import activated
from pallas_kernels.primitives import launch, load, power_of_two, store
from pallas_kernels.rows import load_parts, split
from pallas_kernels.tuning import tile

__all__ = ["refusal", "temporal_unfold"]

FRAMES = 8  # of a chunk at most: a program holds them all in registers
ELEMENTS = 2048  # of a frame that a program owns, at most


def refusal(frames: int, pixels: int, channels: int) -> str | None:
    """Why the kernel does not take these shapes; None if it does."""
    if channels % 32 or channels > ELEMENTS:
        return f"{channels} channels are not a multiple of 32 up to {ELEMENTS}"
    if frames > FRAMES:
        return f"{frames} frames are more than {FRAMES}"
    return None if pixels % 16 == 0 else f"{pixels} pixels are not a multiple of 16"


def temporal_unfold(x, past, gain, *, interpret: bool):
    """`reference.temporal_unfold`. ValueError for shapes that the kernel does not take."""
    (b, t, n, c), at = x.shape, tile("temporal_unfold", "unfold")
    reason = refusal(t, n, c)
    if reason:
        raise ValueError(f"temporal_unfold: {reason}; use impl='reference'")
    # a power of two that divides n: no pixel is masked
    size = math.gcd(n, power_of_two(ELEMENTS // c + 1) // 2)
    pixels = lambda frames, width: pl.BlockSpec(
        (None, frames, size, width), lambda i, b: (b, 0, i, 0)
    )
    ins = {
        "x": (x, pixels(t, c)),
        "past": (past, pixels(2, c)),
        "gain": (gain, pl.BlockSpec((c,), lambda i, b: (0,))),
    }
    ins = {name: given for name, given in ins.items() if given[0] is not None}
    shape = lambda frames, width: jax.ShapeDtypeStruct((b, frames, n, width), x.dtype)
    names, parts = (*ins, "wide", "next"), split(c, at.warps)
    return launch(
        partial(unfold_kernel, names=names, parts=parts, interpret=interpret),
        [shape(t, 3 * c), shape(2, c)],
        (n // size, b),
        [spec for _, spec in ins.values()],
        [pixels(t, 3 * c), pixels(2, c)],
        warps=at.warps,
        stages=at.stages,
        interpret=interpret,
        input_output_aliases={} if past is None else {1: 1},
    )(*(given for given, _ in ins.values()))


def unfold_kernel(*refs, names, parts, interpret):
    """x [t p c], past [2 p c], gain [c] -> wide [t p 3c], next [2 p c]."""
    refs = dict(zip(names, refs, strict=True))
    t, p, c = refs["x"].shape
    read = lambda name, frame: [load(refs[name].at[np.int32(frame), :, part]) for part in parts]
    frames = [read("x", frame) for frame in range(t)]
    if "past" in refs:
        before = [read("past", frame) for frame in range(2)]
        if not interpret:
            plgpu.debug_barrier()  # the next past is the same memory: all threads have read
    else:
        before = [[jnp.zeros((p, part.size), refs["x"].dtype) for part in parts]] * 2
    gains = load_parts(refs["gain"], parts) if "gain" in refs else None
    wide = refs["wide"]
    for frame, ys in enumerate(frames):
        if gains is not None:
            ys = [y.astype(wide.dtype) for y in activated(ys, gains, c, interpret)]
        for tap, values in enumerate((*before, ys)):
            for part, value in zip(parts, values, strict=True):
                columns = pl.ds(tap * c + part.start, part.size)
                store(wide.at[np.int32(frame), :, columns], value)
        before = [before[1], ys]
    for frame, values in enumerate(before):
        for part, value in zip(parts, values, strict=True):
            store(refs["next"].at[np.int32(frame), :, part], value)
