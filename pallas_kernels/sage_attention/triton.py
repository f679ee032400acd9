"""Attention with int8 scores as kernels: the loop of `online_softmax` with its scorer, and the pass
that rounds queries and keys.

Queries are rounded by the pass that rounds keys. Rounded inside the attention kernel, a tile of
queries is an operand that Triton keeps in registers, and on Hopper ptxas (CUDA 13) then makes every
tensor instruction of the loop wait for the one before.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import linear_branch
from pallas_kernels.block_map import block_map_and_mean
from pallas_kernels.checks import check_power_of_two
from pallas_kernels.online_softmax import attend, kernel_name, key_block
from pallas_kernels.primitives import LOG2E, dot, launch, load, store
from pallas_kernels.primitives import blocks as count
from pallas_kernels.rounding import largest, narrow
from pallas_kernels.sage_attention.reference import FLOOR
from pallas_kernels.tuning import tile

__all__ = [
    "int8_scores",
    "operands",
    "quantize_keys",
    "sage_attention",
    "sage_sparse_attention",
    "sage_sparse_linear_attention",
]


def sage_attention(q, k, v, block_q, block_k, *, interpret):
    """Dense attention: every key block in order, without a list."""
    mean = k.mean(1, dtype=jnp.float32)
    return int8_attention(q, k, mean, v, None, block_q, block_k, interpret=interpret)


def sage_sparse_attention(q, k, v, blocks, block_q, block_k, *, interpret):
    """See `reference.sage_sparse_attention`."""
    mean = k.mean(1, dtype=jnp.float32)
    return int8_attention(q, k, mean, v, blocks, block_q, block_k, interpret=interpret)


def sage_sparse_linear_attention(
    q, k, v, proj_kernel, proj_bias, means=None, *, chosen, block_q, block_k, keys, interpret
):
    """The whole op: the pooling that gives the map also gives the mean key; the linear branch is
    part of the same kernel. keys: how many of k and v count."""
    options = {"keys": keys, "interpret": interpret}
    blocks, mean = block_map_and_mean(q, k, chosen, block_q, block_k, means, **options)
    _, linear = linear_branch.operands(q, k, v, proj_kernel, proj_bias, **options)
    return int8_attention(q, k, mean, v, blocks, block_q, block_k, linear=linear, **options)


def int8_attention(q, k, mean, v, blocks, block_q, block_k, *, linear=None, keys=None, interpret):
    """`attend` with int8 scores; mean f32 [b h k]."""
    given = operands(q, k, mean, block_q, block_k, keys=keys, interpret=interpret)
    dense = blocks is None and block_q > 64
    at = tile("sage_attention", "dense" if dense else kernel_name(block_q))
    options = {"linear": linear, "length": keys, "interpret": interpret, "at": at}
    return attend(int8_scores, *given, v, blocks, block_q, block_k, **options)


def operands(q, k, mean, block_q, block_k, *, keys=None, interpret):
    """What `int8_scores` reads of queries, which have no mean taken off, and of keys."""
    keys = k.shape[1] if keys is None else keys
    measured = partial(quantize_and_measure, interpret=interpret)
    *queries, q_length = measured(q, jnp.zeros_like(mean), block=block_q, length=q.shape[1])
    *k, k_length = measured(k, mean, block=block_k, length=keys)
    # Cauchy-Schwarz
    bound = LOG2E * q.shape[-1] ** -0.5 * q_length * k_length.max(2, keepdims=True)
    return (*queries, bound), tuple(k)


def int8_scores(plan, rows, queries, keys):
    """int32 products of int8 queries and keys; the factor holds both blocks' scales, 1/sqrt(k) and
    log2(e).

    queries: int8 [.. k], f32 scales of its blocks, bounds of the scores of each block; keys: int8
    and scales.
    """
    q, here = load(queries[0], rows), pl.program_id(0)
    scale = LOG2E * q.shape[-1] ** -0.5 * queries[1][here]
    scores = lambda j: dot(q, key_block(plan, keys[0], j), (1, 1), jnp.int32)
    return lambda j: (scores(j), scale * keys[1][j]), queries[2][here]


def quantize_keys(k, mean, *, block, interpret):
    """See `reference.quantize_keys`; the quotient is a product with 127/amax."""
    length = k.shape[1]
    return quantize_and_measure(k, mean, block=block, length=length, interpret=interpret)[:2]


def quantize_and_measure(k, mean, *, block, length, interpret):
    """`quantize_keys` of the first `length` tokens, and a bound f32 [b h n] on the length
    (Euclidean norm) of each block's longest token as rounded: values times scale."""
    b, _, h, d = k.shape
    check_power_of_two("quantize_keys", "head width", d)
    check_power_of_two("quantize_keys", "block", block)
    n, at = count(length, block), tile("sage_attention", "quantize_keys")
    tokens = pl.BlockSpec((None, block, None, d), lambda i, g: (g // h, i, g % h, 0))
    number = pl.BlockSpec((None, None, None), lambda i, g: (g // h, g % h, i))
    of_block = jax.ShapeDtypeStruct((b, h, n), jnp.float32)
    return launch(
        partial(quantize_kernel, length=length, interpret=interpret),
        [jax.ShapeDtypeStruct(k.shape, jnp.int8), of_block, of_block],
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
    # rounding moves each element half a step
    store(longest_ref, jnp.sqrt((x * x).sum(1).max()) + scale * (0.5 * math.sqrt(width)))
