"""Norm, rotation and the sums that pooling needs in one pass over the projections.

A program owns a piece of whole rows, so that the norm over all heads, the rotation and the sums
that pooling needs come from one reading: 4 bytes for each bfloat16 element. A pass for the row
statistics alone would add 2. The heads of a row are held in parts of powers of two (12 = 8 + 4), as
Triton wants them, so that no thread works on heads that there are not.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.blocking import counts
from pallas_kernels.checks import check_power_of_two
from pallas_kernels.primitives import blocks as count
from pallas_kernels.primitives import launch, load, store
from pallas_kernels.tuning import tile

__all__ = ["rms_norm_rope", "rms_norm_rope_pool"]

PIECE = 32  # tokens of one program
WIDE = 2048  # elements; a longer row has more warps


def rms_norm_rope(x, weight, cos, sin, *, eps, groups, interpret):
    """See `reference.rms_norm_rope`."""
    return normed(x, weight, cos, sin, eps, PIECE, groups, sums=False, interpret=interpret)[0]


def rms_norm_rope_pool(x, weight, cos, sin, *, eps, block, groups, interpret):
    """See `reference.rms_norm_rope_pool`; each program sums a piece of a block, XLA the pieces."""
    piece = math.gcd(PIECE, block)
    y, sums = normed(x, weight, cos, sin, eps, piece, groups, sums=True, interpret=interpret)
    n = count(x.shape[1], block)
    sums = jnp.pad(sums, ((0, 0), (0, n * (block // piece) - sums.shape[1]), (0, 0), (0, 0)))
    sums = rearrange(sums, "b (n p) h k -> b h n p k", n=n).sum(3)
    return y, sums / counts(x.shape[1], block)[:, None]


def normed(x, weight, cos, sin, eps, piece, groups, *, sums, interpret):
    """Normed and rotated tokens [b l h k], or [groups b l h/groups k], and, where `sums`, their
    sums over pieces f32 [b pieces h k]: a list."""
    b, l, d = x.shape
    k = 2 * cos.shape[1]
    check_power_of_two("rms_norm_rope", "head width", k)
    h, at = d // k, tile("qk_prep", "rows" if d <= WIDE else "wide_rows")
    tokens = pl.BlockSpec((None, piece, h, k), lambda i, g: (g, i, 0, 0))
    table = pl.BlockSpec((piece, k // 2), lambda i, g: (i, 0))
    out = [
        jax.ShapeDtypeStruct((b, l, h, k), x.dtype),
        jax.ShapeDtypeStruct((b, count(l, piece), h, k), jnp.float32),
    ]
    specs = [tokens, pl.BlockSpec((None, None, h, k), lambda i, g: (g, i, 0, 0))]
    if groups > 1:
        out[0] = jax.ShapeDtypeStruct((groups, b, l, h // groups, k), x.dtype)
        block = (groups, None, piece, h // groups, k)
        specs[0] = pl.BlockSpec(block, lambda i, g: (0, g, i, 0, 0))
    return launch(
        partial(rows_kernel, parts=_powers(h), length=l, eps=eps),
        out[: 1 + sums],
        (count(l, piece), b),
        [tokens, pl.BlockSpec((h, k), lambda i, g: (0, 0)), table, table],
        specs[: 1 + sums],
        warps=at.warps,
        stages=at.stages,
        interpret=interpret,
    )(rearrange(x, "b l (h k) -> b l h k", k=k), rearrange(weight, "(h k) -> h k", k=k), cos, sin)


def _powers(heads: int) -> list:
    """Slices of powers of two that cover the heads, widest first."""
    start, parts = 0, []
    while start < heads:
        parts.append(pl.ds(start, 1 << (heads - start).bit_length() - 1))
        start += parts[-1].size
    return parts


def rows_kernel(x_ref, weight_ref, cos_ref, sin_ref, y_ref, *sum_ref, parts, length, eps):
    """x [piece heads k] -> y of the same shape, or [groups piece heads/groups k], and the sum of
    its rows. parts: the heads, in slices of powers of two."""
    piece, heads, k = x_ref.shape
    width = y_ref.shape[-2]
    weights = [load(weight_ref.at[part]).astype(jnp.float32) for part in parts]
    rows = jnp.minimum(piece, length - pl.program_id(0) * piece)

    def row(t):  # the next row is on its way while one is worked on
        return [load(x_ref.at[t, part]) for part in parts]

    def step(t, state):
        xs, totals = state
        following = row(jnp.minimum(t + 1, rows - 1))
        xs = [x.astype(jnp.float32) for x in xs]
        square = sum((x * x).sum() for x in xs)
        factor = lax.rsqrt(square / (heads * k) + eps)
        cos, sin = load(cos_ref.at[t])[None], load(sin_ref.at[t])[None]
        ys = [rotated(x * factor * w, cos, sin) for x, w in zip(xs, weights, strict=True)]
        ys = [y.astype(y_ref.dtype) for y in ys]
        for part, y in zip(parts, ys, strict=True):
            if y_ref.ndim == 4:
                head = part.start + jnp.arange(part.size)[:, None]
                store(y_ref.at[head // width, t, head % width, jnp.arange(k)[None, :]], y)
            else:
                store(y_ref.at[t, part], y)
        if sum_ref:
            totals = [total + y.astype(jnp.float32) for total, y in zip(totals, ys, strict=True)]
        return following, totals

    totals = [jnp.zeros((part.size, k)) for part in parts] if sum_ref else []
    totals = lax.fori_loop(0, rows, step, (row(jnp.int32(0)), totals))[1]
    if sum_ref:
        for part, total in zip(parts, totals, strict=True):
            store(sum_ref[0].at[part], total)


def rotated(x, cos, sin):  # f32 [h k], [1 k/2]
    """Channel pairs (2j, 2j+1) rotated by their angles."""
    h, k = x.shape
    a, b = lax.unstack(x.reshape(h, k // 2, 2), axis=2)
    return lax.stack([a * cos - b * sin, b * cos + a * sin], axis=2).reshape(h, k)
