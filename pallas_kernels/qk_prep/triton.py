"""Queries and keys made ready for sparse attention: one pass over the projections, one more over
the keys for int8.

A program of the first pass owns a piece of whole rows, so that the norm over all heads, the
rotation and the sums that pooling needs come from one reading: 4 bytes for each bfloat16 element. A
pass for the row statistics alone would add 2.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.int8_matmul.rounding import largest, narrow
from pallas_kernels.primitives import blocks as count
from pallas_kernels.primitives import launch, load, power_of_two, store
from pallas_kernels.sage_attention.quantize import FLOOR
from pallas_kernels.sparse_attention.reference import counts
from pallas_kernels.tuning import tile

PIECE = 32  # tokens of one program


def rms_norm_rope(
    x, weight, cos, sin, *, eps, interpret
):  # x [b l d], weight [d], cos sin f32 [l k/2] -> [b l h k]
    """See `reference.rms_norm_rope`."""
    return normed(x, weight, cos, sin, eps, PIECE, sums=False, interpret=interpret)[0]


def rms_norm_rope_pool(
    x, weight, cos, sin, *, eps, block, interpret
):  # -> [b l h k], f32 [b h n k]
    """See `reference.rms_norm_rope_pool`; each program sums a piece of a block, XLA the pieces."""
    piece = math.gcd(PIECE, block)
    y, sums = normed(x, weight, cos, sin, eps, piece, sums=True, interpret=interpret)
    n = count(x.shape[1], block)
    sums = jnp.pad(sums, ((0, 0), (0, n * (block // piece) - sums.shape[1]), (0, 0), (0, 0)))
    return (
        y,
        rearrange(sums, "b (n p) h k -> b h n p k", n=n).sum(3)
        / counts(x.shape[1], block)[:, None],
    )


def normed(
    x, weight, cos, sin, eps, piece, *, sums, interpret
):  # -> [[b l h k]], with f32 [b pieces h k] where `sums`
    """Normed and rotated tokens and, where asked for, their sums over pieces."""
    b, l, d = x.shape
    k = 2 * cos.shape[1]
    refuse("rms_norm_rope", "head width", k)
    h, at = d // k, tile("qk_prep", "rows")
    heads = power_of_two(h)
    tokens = pl.BlockSpec((None, piece, heads, k), lambda i, g: (g, i, 0, 0))
    table = pl.BlockSpec((piece, k // 2), lambda i, g: (i, 0))
    out = [
        jax.ShapeDtypeStruct((b, l, h, k), x.dtype),
        jax.ShapeDtypeStruct((b, count(l, piece), h, k), jnp.float32),
    ]
    specs = [tokens, pl.BlockSpec((None, None, heads, k), lambda i, g: (g, i, 0, 0))]
    return launch(
        partial(rows_kernel, heads=h, length=l, eps=eps),
        out[: 1 + sums],
        (count(l, piece), b),
        [tokens, pl.BlockSpec((heads, k), lambda i, g: (0, 0)), table, table],
        specs[: 1 + sums],
        warps=at.warps,
        stages=at.stages,
        interpret=interpret,
    )(rearrange(x, "b l (h k) -> b l h k", k=k), rearrange(weight, "(h k) -> h k", k=k), cos, sin)


def rows_kernel(x_ref, weight_ref, cos_ref, sin_ref, y_ref, *sum_ref, heads, length, eps):
    """x [piece heads k] -> y of the same shape, and the sum of its rows; the heads are padded to a
    power of two."""
    piece, padded, k = x_ref.shape
    inside = (jnp.arange(padded) < heads)[:, None]
    weight = load(weight_ref, inside).astype(jnp.float32)
    rows = jnp.minimum(piece, length - pl.program_id(0) * piece)

    def row(t):  # the next row is on its way while one is worked on
        return load(x_ref.at[t], inside & (t < rows))

    def step(t, state):
        x, total = state
        following = row(t + 1)
        x = x.astype(jnp.float32)
        x = x * lax.rsqrt((x * x).sum() / (heads * k) + eps) * weight
        a, b = lax.unstack(x.reshape(padded, k // 2, 2), axis=2)
        cos, sin = load(cos_ref.at[t])[None], load(sin_ref.at[t])[None]
        y = (
            lax.stack([a * cos - b * sin, b * cos + a * sin], axis=2)
            .reshape(padded, k)
            .astype(y_ref.dtype)
        )
        store(y_ref.at[t], y, inside)
        return following, total + y.astype(jnp.float32) if sum_ref else total

    total = jnp.zeros((padded, k)) if sum_ref else 0
    total = lax.fori_loop(0, rows, step, (row(jnp.int32(0)), total))[1]
    if sum_ref:
        store(sum_ref[0], total, inside)


def quantize_keys(
    k, mean, *, block, interpret
):  # k [b l h k], mean f32 [b h k] -> int8 [b l h k], f32 [b h n]
    """See `reference.quantize_keys`; the quotient is a product with 127/amax."""
    return quantize_and_measure(k, mean, block=block, interpret=interpret)[:2]


def quantize_and_measure(
    k, mean, *, block, interpret
):  # -> int8 [b l h k], f32 [b h n], f32 [b h n]
    """`quantize_keys`, and a bound on the length (Euclidean norm) of each block's longest token as
    rounded: values times scale."""
    b, l, h, d = k.shape
    refuse("quantize_keys", "head width", d)
    refuse("quantize_keys", "block", block)
    n, at = count(l, block), tile("qk_prep", "quantize_keys")
    tokens = pl.BlockSpec((None, block, None, d), lambda i, g: (g // h, i, g % h, 0))
    number = pl.BlockSpec((None, None, None), lambda i, g: (g // h, g % h, i))
    return launch(
        partial(quantize_kernel, length=l, interpret=interpret),
        [
            jax.ShapeDtypeStruct(k.shape, jnp.int8),
            *[jax.ShapeDtypeStruct((b, h, n), jnp.float32)] * 2,
        ],
        (n, b * h),
        [tokens, pl.BlockSpec((None, None, d), lambda i, g: (g // h, g % h, 0))],
        [tokens, number, number],
        warps=at.warps,
        stages=at.stages,
        interpret=interpret,
    )(k, mean)


def quantize_kernel(k_ref, mean_ref, values_ref, scale_ref, longest_ref, *, length, interpret):
    """k [block k], mean [k] -> int8 values [block k], their scale, and the length of the longest
    row."""
    block, width = k_ref.shape
    inside = (pl.program_id(0) * block + jnp.arange(block) < length)[:, None]
    x = jnp.where(inside, load(k_ref, inside).astype(jnp.float32) - load(mean_ref), 0.0)
    amax = jnp.maximum(largest([x]), FLOOR)
    scale = amax / 127
    store(values_ref, narrow(x * (127 / amax), jnp.int8, interpret), inside)
    store(scale_ref, scale)
    store(
        longest_ref, jnp.sqrt((x * x).sum(1).max()) + scale * (0.5 * math.sqrt(width))
    )  # rounding moves each element half a step


def refuse(op, name, size):
    """Raise ValueError with the reason if the kernels do not take the size."""
    reason = refusal(size)
    if reason:
        raise ValueError(
            f"{op}: {name} is {size}; the kernel takes {reason}; impl='reference' takes any"
        )


def refusal(size) -> str | None:
    """What the kernels take instead of this head width or block; None if they take it."""
    low = power_of_two(size) // 2
    return f"powers of two; nearest: {low} and {2 * low}" if size & (size - 1) else None
