"""The forward passes of the sparse ops on Hopper: the loop of `online_softmax_mosaic` with float
scores. Differentiated, an op is the one of `triton`."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange

from pallas_kernels.block_map import block_map
from pallas_kernels.linear_branch import operand
from pallas_kernels.mosaic import BLOCK_Q, attention_refusal, refuse, unavailable
from pallas_kernels.online_softmax_mosaic import attend
from pallas_kernels.primitives import LOG2E
from pallas_kernels.sparse_attention import triton
from pallas_kernels.token_pass_mosaic import query_pass, token_pass

__all__ = ["score_bound", "sparse_attention", "sparse_linear_attention"]


def sparse_attention(q, k, v, blocks, block_q, block_k):
    """See `reference.sparse_attention`. Raises ValueError for what the kernel does not take."""
    _check("sparse_attention", v, block_q, block_k)
    forward = lambda q, k, v, blocks: attend(q, k, v, blocks, bound=score_bound(q, k))
    known = partial(triton.sparse_attention, block_q=block_q, block_k=block_k, interpret=False)
    return _differentiated(forward, known)(q, k, v, blocks)


def sparse_linear_attention(
    q, k, v, proj_kernel, proj_bias, means=None, *, chosen, block_q, block_k
):
    """The whole op: map, sums over all keys, the linear branch, and the loop, which adds to it.
    Raises ValueError for what the kernel does not take."""
    _check("sparse_linear_attention", v, block_q, block_k)
    sizes = {"chosen": chosen, "block_q": block_q, "block_k": block_k}

    def forward(q, k, v, proj_kernel, proj_bias, means):
        blocks = block_map(q, k, chosen, block_q, block_k, means, interpret=False)
        _, sums = token_pass(k, v, rounds=False)
        _, branch = query_pass(q, *operand(q, sums, proj_kernel, proj_bias)[1:], rounds=False)
        return attend(q, k, v, blocks, bound=score_bound(q, k), plus=branch)

    known = partial(triton.sparse_linear_attention, **sizes, interpret=False)
    return _differentiated(forward, known)(q, k, v, proj_kernel, proj_bias, means)


def score_bound(q, k):  # [b l h k], [b s h k] -> f32 [b h 2*q_blocks]
    """At least the magnitude of any score of 64 queries over 1/sqrt(k), as logarithms to base 2: by
    Cauchy-Schwarz."""
    squares = lambda x: jnp.square(x.astype(jnp.float32)).sum(-1)
    queries = jnp.pad(squares(q), ((0, 0), (0, -q.shape[1] % BLOCK_Q), (0, 0)))
    queries = rearrange(queries, "b (n m) h -> b h n m", m=BLOCK_Q // 2).max(-1)
    return jnp.sqrt(queries * squares(k).max(1)[:, :, None]) * (LOG2E * q.shape[-1] ** -0.5)


def _check(op, v, block_q, block_k):
    refuse(op, attention_refusal(v.shape[-1], block_q, block_k, v.dtype))
    refuse(op, unavailable())


def _differentiated(forward, known):
    """`forward`, with the derivatives of `known`."""
    op = jax.custom_jvp(forward)
    op.defjvp(partial(jax.jvp, known))
    return op
