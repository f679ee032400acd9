"""Dense softmax attention in plain JAX: the specification, with memory bounded by working through
chunks of queries."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax

from pallas_kernels.primitives import EXACT

__all__ = ["attention"]

SCORE_BYTES = 2**30  # float32 scores held at a time


def attention(q, k, v, *, scale=None):  # q [b l h k], k v [b s h k]
    """softmax(scale q k^T) v; scores, softmax and sums in float32, products of input-dtype
    operands.

    Differentiable any number of times in both modes; a chunk is recomputed in the gradient.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    b, l, h, _ = q.shape
    chunk = max(SCORE_BYTES // (4 * b * h * k.shape[1]), 1)
    if chunk >= l:
        return attend(q, k, v, scale)
    pieces = -(-l // chunk)
    chunk = -(-l // pieces)
    padded = jnp.pad(q, ((0, 0), (0, pieces * chunk - l), (0, 0), (0, 0)))
    step = jax.checkpoint(lambda piece: attend(piece, k, v, scale))
    out = lax.map(step, rearrange(padded, "b (n l) h k -> n b l h k", n=pieces))
    return rearrange(out, "n b l h k -> b (n l) h k")[:, :l]


def attend(q, k, v, scale):  # float32 island
    product = partial(jnp.einsum, preferred_element_type=jnp.float32, precision=EXACT)
    s = scale * product("blhk,bshk->bhls", q, k)
    # the result does not depend on what is subtracted
    p = jnp.exp(s - lax.stop_gradient(s.max(-1, keepdims=True)))
    o = product("bhls,bshk->blhk", p.astype(v.dtype), v)
    return (o / rearrange(p.sum(-1), "b h l -> b l h 1")).astype(q.dtype)
