"""Norm, SiLU, and the combinations of frames that the four products read: a program owns some
columns of a row in all frames of a chunk, reads each frame once, and writes two combinations for
each.

They lie in slabs of channels with their neighbours beside them: the row that a strip sees of the
next one is written twice, and zeros stand around the frames. The past is renewed in place: no other
program reads these pixels of it.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.causal_conv.winograd import SLAB, STRIPS, combined_frames
from pallas_kernels.norm_silu import activated
from pallas_kernels.primitives import launch, load, power_of_two, store
from pallas_kernels.rows import load_parts, split
from pallas_kernels.tuning import tile

__all__ = ["frame_pairs"]

ELEMENTS = 1024  # of a frame that a program owns, at most


@partial(jax.jit, static_argnames="interpret")  # lowered once for all layers of a shape
def frame_pairs(x, past, gain, *, interpret: bool):
    """x in strips [b t v 8w c], past [b 2 8v w c], gain [c] or None -> the combined frames [b t/2 4
    c/32 v+2 8(w+2) 32] and the next past."""
    (b, t, v, _, c), (w, at) = x.shape, (past.shape[3], tile("causal_conv", "pairs"))
    # a power of two that divides w: no pixel is masked
    size = math.gcd(w, power_of_two(ELEMENTS // c + 1) // 2)
    rows = pl.BlockSpec((None, 2, None, size, c), lambda s, i, r, b: (b, 0, s * v + r, i, 0))
    strips = pl.BlockSpec((None, t, None, size * STRIPS, c), lambda s, i, r, b: (b, 0, r, i, 0))
    out = (t // 2, 4, c // SLAB, v + 2, (w + 2) * STRIPS, SLAB)
    ins = {
        "x": (x, strips),
        "past": (past, rows),
        "gain": (gain, pl.BlockSpec((c,), lambda s, i, r, b: (0,))),
    }
    ins = {name: given for name, given in ins.items() if given[0] is not None}
    return launch(
        partial(
            pairs_kernel,
            names=(*ins, "pairs", "next"),
            parts=split(c, at.warps),
            interpret=interpret,
        ),
        [jax.ShapeDtypeStruct((b, *out), x.dtype), jax.ShapeDtypeStruct(past.shape, x.dtype)],
        (STRIPS, w // size, v, b),
        [spec for _, spec in ins.values()],
        [pl.BlockSpec((None, *out), lambda s, i, r, b: (b, 0, 0, 0, 0, 0, 0)), rows],
        warps=at.warps,
        stages=at.stages,
        interpret=interpret,
        input_output_aliases={1: 1},
    )(*(given for given, _ in ins.values()))


def pairs_kernel(*refs, names, parts, interpret):
    """x [t 8p c], past [2 p c], gain [c] -> pairs [t/2 4 c/32 v+2 8(w+2) 32], next [2 p c]."""
    refs = dict(zip(names, refs, strict=True))
    x, past, pairs = refs["x"], refs["past"], refs["pairs"]
    (t, _, c), size = x.shape, past.shape[1]
    strip, block, row = (pl.program_id(axis) for axis in range(3))
    pixels = jnp.arange(size, dtype=jnp.int32)[:, None] * STRIPS + strip
    channels = [part.start + jnp.arange(part.size, dtype=jnp.int32)[None] for part in parts]
    read = lambda frame: [load(x.at[np.int32(frame), pixels, part]) for part in channels]
    frames = [[load(past.at[np.int32(frame), :, part]) for part in parts] for frame in range(2)]
    news = [read(frame) for frame in range(t)]
    if not interpret:
        plgpu.debug_barrier()  # the next past is the same memory: all threads have read
    if "gain" in refs:
        gains = load_parts(refs["gain"], parts)
        news = [[y.astype(x.dtype) for y in activated(xs, gains, c, interpret)] for xs in news]
    frames += news
    for frame in range(2):
        for part, value in zip(parts, frames[t + frame], strict=True):
            store(refs["next"].at[np.int32(frame), :, part], value)
    first = pixels + (block * size + 1) * STRIPS - strip  # of the first strip
    columns = pairs.shape[4] // STRIPS - 2
    last_row, last_block = np.int32(pairs.shape[3] - 3), np.int32(columns // size - 1)

    def write(row, strip, keep=None):
        """Writes all combinations to a row of a strip, or zeros; and the zeros at its ends."""
        places = [(pair, which, n) for pair, which, n in np.ndindex(t // 2, 4, len(parts))]

        def to(pair, which, n, pixel):
            part = channels[n]
            place = np.int32(pair), np.int32(which), part // SLAB, row, pixel, part % SLAB
            return pairs.at[place]

        for pair, which, n in places:
            d = [frame[n] for frame in frames[2 * pair : 2 * pair + 4]]
            value = combined_frames(d)[which]
            value = value if keep is None else jnp.where(keep, value, 0)
            store(to(pair, which, n, first + strip), value.astype(pairs.dtype))
        for edge, column in ((0, 0), (last_block, columns + 1)):

            @pl.when(block == edge)
            def _(pixel=column * STRIPS + strip):
                pixel = jnp.full((1, 1), pixel, jnp.int32)
                for pair, which, n in places:
                    zeros = jnp.zeros((1, parts[n].size), pairs.dtype)
                    store(to(pair, which, n, pixel), zeros)

    write(row + 1, strip)

    @pl.when(row == last_row)
    def _():  # what the next strip sees of this one; below the last one there are zeros
        inner = strip < STRIPS - 1
        write(jnp.where(inner, 0, last_row + 2), jnp.where(inner, strip + 1, strip), inner)

    @pl.when(row == 0)
    def _():
        inner = strip > 0
        write(jnp.where(inner, last_row + 2, 0), jnp.where(inner, strip - 1, strip), inner)
