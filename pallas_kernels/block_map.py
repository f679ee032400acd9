"""The list of key blocks of each query block by kernels, in three steps: pooling (kernel), scores
(XLA), choice (kernel). The specification is `blocking.block_map`.

The scores are left to XLA: their operands are float32, which tensor cores would cut to TF32, and a
row of scores is wider than the operands of one product in a kernel may be. They take 2 l^2 k /
(block_q block_k) operations for each head.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.blocking import scores_of_means, token_mean
from pallas_kernels.primitives import blocks as count
from pallas_kernels.primitives import launch, load, power_of_two, store
from pallas_kernels.tuning import SHARED, tile

__all__ = ["block_map", "block_map_and_mean", "choose", "pool"]

LEAST = jnp.iinfo(jnp.int32).min
WIDEST = 2**13  # key blocks
WARP = 2**11  # scores that a warp keeps in its registers


def block_map(q, k, chosen, block_q, block_k, means=None, *, interpret):
    """See `blocking.block_map`."""
    return block_map_and_mean(q, k, chosen, block_q, block_k, means, interpret=interpret)[0]


def block_map_and_mean(q, k, chosen, block_q, block_k, means=None, *, keys=None, interpret):
    """`block_map` of the first `keys` of k, by default all, and their mean f32 [b h k], which int8
    keys take off and which comes with it for nothing."""
    q, k, means = lax.stop_gradient((q, k, means))
    keys = k.shape[1] if keys is None else keys
    if means is None:
        of_keys = pool(k, block_k, length=keys, interpret=interpret)
        means = pool(q, block_q, interpret=interpret), of_keys
    mean = token_mean(means[1], keys, block_k)
    return choose(scores_of_means(*means, mean), chosen, interpret=interpret), mean


def pool(x, block, *, length=None, interpret):  # [b l h k] -> f32 [b h n k]
    """See `blocking.block_means`; length: of how many of the tokens, by default all."""
    b, l, h, d = x.shape
    l, at = l if length is None else length, tile(SHARED, "pool")
    return launch(
        partial(pool_kernel, length=l),
        jax.ShapeDtypeStruct((b, h, count(l, block), d), jnp.float32),
        (count(l, block), b * h),
        [pl.BlockSpec((None, block, None, d), lambda i, g: (g // h, i, g % h, 0))],
        pl.BlockSpec((None, None, None, d), lambda i, g: (g // h, g % h, i, 0)),
        warps=at.warps,
        stages=at.stages,
        interpret=interpret,
    )(x)


def pool_kernel(x_ref, mean_ref, *, length):
    """x [block k] -> mean [k] of its rows before the end."""
    block = x_ref.shape[0]
    rows = jnp.minimum(block, length - pl.program_id(0) * block)
    x = load(x_ref, (jnp.arange(block) < rows)[:, None])
    store(mean_ref, x.astype(jnp.float32).sum(0) / rows.astype(jnp.float32))


def choose(scores, chosen, *, interpret):  # f32 [b h i j] -> int32 [b h i chosen], ascending
    """The indices of the `chosen` highest scores of each row, -0 below 0, ties to the lowest index:
    the set of lax.top_k."""
    b, h, i, n = scores.shape
    if n > WIDEST:
        raise ValueError(
            f"block_map: {n} key blocks; the kernel sorts out at most {WIDEST}; larger blocks or"
            " impl='reference' do it"
        )
    width, at = power_of_two(n), tile(SHARED, "choose")
    lists = launch(
        partial(choose_kernel, n=n, chosen=chosen),
        jax.ShapeDtypeStruct((b * h * i, chosen), jnp.int32),
        (b * h * i,),
        [pl.BlockSpec((None, width), lambda r: (r, 0))],
        pl.BlockSpec((None, chosen), lambda r: (r, 0)),
        warps=max(at.warps, width // WARP),
        stages=at.stages,
        interpret=interpret,
    )(rearrange(scores, "b h i j -> (b h i) j"))
    return rearrange(lists, "(b h i) c -> b h i c", b=b, h=h)


def choose_kernel(scores_ref, list_ref, *, n, chosen):
    """scores f32 [width], n of them true -> list int32 [chosen].

    The bits of a float, the lower 31 flipped where it is negative, are integers in the order of the
    floats. The chosen-th largest of them is built from its highest bit down, and a running count
    puts each kept index in its place.
    """
    column = jnp.arange(scores_ref.shape[0])
    bits = lax.bitcast_convert_type(load(scores_ref, column < n), jnp.int32)
    image = jnp.where(column < n, bits ^ ((bits >> 31) & 0x7FFFFFFF), LEAST)

    def step(i, least):
        raised = least ^ lax.shift_left(1, 31 - i)
        return jnp.where((image >= raised).astype(jnp.int32).sum() >= chosen, raised, least)

    least = lax.fori_loop(0, 32, step, jnp.int32(LEAST))
    above, equal = image > least, image == least
    both = above.astype(jnp.int32) + (equal.astype(jnp.int32) << 16)
    seen = jnp.cumsum(both)  # both counts in one sum
    above_seen, equal_seen = seen & 0xFFFF, seen >> 16
    wanted = chosen - above.astype(jnp.int32).sum()
    keep = above | (equal & (equal_seen <= wanted))
    place = jnp.where(keep, above_seen + jnp.minimum(equal_seen, wanted) - 1, chosen)
    store(list_ref.at[place], column, keep)
