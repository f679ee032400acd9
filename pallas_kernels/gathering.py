"""Softmax over gathered blocks of keys in plain JAX: the pieces of which the references of sparse
attention, with float and with int8 scores, are made.

Query blocks are worked through in chunks; each chunk gathers its key and value blocks, so memory
does not grow with length.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax

from pallas_kernels.primitives import EXACT, blocks

CHUNK_BYTES = 2**30  # float32 scores and gathered blocks held at a time


def take(x, blocks):  # [b h n ...], [b h c t] -> [b h c t ...]
    """The blocks of each list."""
    return jax.vmap(jax.vmap(lambda x, index: x[index]))(x, blocks)


def over_chunks(step, carry, arrays, bytes_per_block: int):
    """lax.scan of `step` over chunks of query blocks (axis 2 of every array), padded at the end
    with zeros."""
    b, h, n = arrays[0].shape[:3]
    pieces = blocks(n, max(CHUNK_BYTES // (b * h * bytes_per_block), 1))
    size = blocks(n, pieces)

    def split(x):
        x = jnp.pad(x, ((0, 0), (0, 0), (0, pieces * size - n)) + ((0, 0),) * (x.ndim - 3))
        return rearrange(x, "b h (p c) ... -> p b h c ...", p=pieces)

    def join(x):
        return rearrange(x, "p b h c ... -> b h (p c) ...")[:, :, :n]

    if pieces == 1:
        return step(carry, arrays)
    carry, out = lax.scan(step, carry, jax.tree.map(split, arrays))
    return carry, jax.tree.map(join, out)


def flatten_keys(s, blocks, block_k: int, length: int):  # f32 [b h c m t j] -> [b h c m (t j)]
    """Scores of all gathered keys side by side; keys past the end of the sequence get -inf."""
    position = blocks[..., None] * block_k + jnp.arange(block_k)  # [b h c t j]
    s = jnp.where((position < length)[:, :, :, None], s, -jnp.inf)
    return rearrange(s, "b h c m t j -> b h c m (t j)")


def softmax_sum(s, v):  # float32 island
    """s [b h c m n], v [b h c t j k], n = t j -> the softmax's weighted sum f32 [b h c m k], and
    the log of its normaliser [b h c m]."""
    # neither result depends on what is subtracted
    top = lax.stop_gradient(s.max(-1, keepdims=True))
    p = jnp.exp(s - top)
    total = p.sum(-1, keepdims=True)
    v = rearrange(v, "b h c t j k -> b h c (t j) k")
    product = "bhcmn,bhcnk->bhcmk"
    p = p.astype(v.dtype)
    o = jnp.einsum(product, p, v, preferred_element_type=jnp.float32, precision=EXACT)
    return o / total, (top + jnp.log(total))[..., 0]


def bytes_per_block(chosen: int, block_q: int, block_k: int, width: int, itemsize: int) -> int:
    """Scores and probabilities of one query block, and its gathered keys and values."""
    return chosen * block_k * (12 * block_q + 2 * width * itemsize)
