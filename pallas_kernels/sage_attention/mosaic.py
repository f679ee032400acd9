"""Attention with int8 scores on Hopper: one pass over the keys rounds them, with the sums of the
linear branch, and one over the queries, with the branch itself (`token_pass_mosaic`); then the loop
of `online_softmax_mosaic` adds its own. Queries have a scale for every 64, half a block."""

from __future__ import annotations

import jax.numpy as jnp

from pallas_kernels.block_map import block_map_and_mean
from pallas_kernels.linear_branch import operand
from pallas_kernels.mosaic import attention_refusal, refuse, unavailable
from pallas_kernels.online_softmax_mosaic import attend
from pallas_kernels.primitives import LOG2E
from pallas_kernels.token_pass_mosaic import Rounded, query_pass, token_pass

__all__ = [
    "int8_attention",
    "operands",
    "sage_attention",
    "sage_sparse_attention",
    "sage_sparse_linear_attention",
]


def sage_attention(q, k, v, block_q, block_k):
    """Dense attention: every key block in order, without a list."""
    return sage_sparse_attention(q, k, v, None, block_q, block_k)


def sage_sparse_attention(q, k, v, blocks, block_q, block_k):
    """See `reference.sage_sparse_attention`. Raises ValueError for what the kernel does not
    take."""
    _check(v, block_q, block_k)
    return int8_attention(*operands(q, k, k.mean(1, dtype=jnp.float32)), v, blocks)


def sage_sparse_linear_attention(
    q, k, v, proj_kernel, proj_bias, means=None, *, chosen, block_q, block_k, keys
):
    """The whole op, as in `triton`. Raises ValueError for what the kernel does not take."""
    _check(v, block_q, block_k)
    options = {"keys": keys, "interpret": False}
    blocks, mean = block_map_and_mean(q, k, chosen, block_q, block_k, means, **options)
    rounded, sums = token_pass(k, v, mean=mean, rounds=True, tokens=keys)
    queries, branch = query_pass(q, *operand(q, sums, proj_kernel, proj_bias)[1:], rounds=True)
    return int8_attention(*_bounded(queries, rounded), v, blocks, plus=branch, keys=keys)


def operands(q, k, mean):
    """What `int8_attention` takes of queries, which have no mean taken off, and of keys; mean: f32
    [b h k]."""
    queries, _ = token_pass(q, rounds=True)
    return _bounded(queries, token_pass(k, mean=mean, rounds=True)[0])


def _bounded(queries: Rounded, keys: Rounded):
    """Queries with scales and bounds, keys with scales: by Cauchy-Schwarz."""
    longest = keys.length.max(2, keepdims=True)
    bound = LOG2E * queries.values.shape[-1] ** -0.5 * queries.length * longest
    return (queries.values, queries.scale, bound), (keys.values, keys.scale)


def int8_attention(queries, keys_and_scale, v, blocks, *, plus=None, keys=None):
    """`attend` of what `operands` gives."""
    q, q_scale, bound = queries
    k, k_scale = keys_and_scale
    options = {"bound": bound, "plus": plus, "keys": keys}
    return attend(q, k, v, blocks, scales=(q_scale, k_scale), **options)


def _check(v, block_q, block_k):
    op = "attention with int8 scores"
    refuse(op, attention_refusal(v.shape[-1], block_q, block_k, v.dtype))
    refuse(op, unavailable())
