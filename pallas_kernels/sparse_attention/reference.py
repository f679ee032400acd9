"""Block-sparse attention in plain JAX: the specification, fast enough to run at real size."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange

from pallas_kernels.blocking import blocked, unblocked
from pallas_kernels.derivatives import with_derivatives
from pallas_kernels.gathering import bytes_per_block, flatten_keys, over_chunks, softmax_sum, take
from pallas_kernels.linear_branch import linear_attention
from pallas_kernels.primitives import EXACT

__all__ = ["backward", "forward", "sparse_attention", "sparse_linear_attention"]


def sparse_linear_attention(q, k, v, proj_kernel, proj_bias, blocks, block_q, block_k):
    """The sum of the two branches, over a block list that is held constant."""
    near = sparse_attention(q, k, v, blocks, block_q, block_k)
    return near + linear_attention(q, k, v, proj_kernel, proj_bias)


def sparse_attention(q, k, v, blocks, block_q, block_k):
    """Softmax attention of each query block over its chosen key blocks; keys past the end do not
    count. q k v [b l h k], blocks [b h q_blocks chosen].

    Differentiable in both modes with the block list held constant. The gradient is written out
    below, because automatic differentiation would add up the gradients of a key chosen by many
    query blocks in the input dtype.
    """

    def run(q, k, v, blocks):
        o, lse = forward(q, k, v, blocks, block_q, block_k)
        return o, (o, lse)

    def tangent(args, saved, tangents):
        return jax.jvp(lambda *qkv: run(*qkv, args[3])[0], args[:3], tangents[:3])[1]

    def grad(args, saved, do):
        return (*backward(*args, *saved, do, block_q, block_k), None)

    return with_derivatives(run, tangent=tangent, grad=grad)(q, k, v, blocks)


def _logits(q, k, blocks, block_k, length):  # q [b h c m k], k [b h c t j k] -> f32 [b h c m (t j)]
    """Scaled scores; keys past the end of the sequence get -inf."""
    product = partial(jnp.einsum, preferred_element_type=jnp.float32, precision=EXACT)
    s = product("bhcmk,bhctjk->bhcmtj", q, k)
    return flatten_keys(q.shape[-1] ** -0.5 * s, blocks, block_k, length)


def forward(q, k, v, blocks, block_q, block_k):
    """-> o [b l h k], and the log of each softmax normaliser f32 [b h q_blocks block_q]."""
    keys, values = blocked(k, block_k), blocked(v, block_k)

    def step(_, chunk):
        queries, index = chunk
        s = _logits(queries, take(keys, index), index, block_k, k.shape[1])
        o, lse = softmax_sum(s, take(values, index))
        return None, (o.astype(q.dtype), lse)

    size = bytes_per_block(blocks.shape[-1], block_q, block_k, q.shape[-1], q.dtype.itemsize)
    _, (o, lse) = over_chunks(step, None, (blocked(q, block_q), blocks), size)
    return unblocked(o, q.shape[1]), lse


def backward(q, k, v, blocks, o, lse, do, block_q, block_k):
    """dq, dk, dv in float32 sums; o and lse are those of `forward`, do the cotangent of o."""
    keys, values = blocked(k, block_k), blocked(v, block_k)
    delta = (do.astype(jnp.float32) * o.astype(jnp.float32)).sum(-1, keepdims=True)  # [b l h 1]
    dot = partial(jnp.einsum, preferred_element_type=jnp.float32, precision=EXACT)
    scale = q.shape[-1] ** -0.5

    def step(carry, chunk):
        queries, index, outer, delta, lse = chunk
        near, far = take(keys, index), take(values, index)
        p = jnp.exp(_logits(queries, near, index, block_k, k.shape[1]) - lse[..., None])
        p = rearrange(p, "b h c m (t j) -> b h c m t j", j=block_k)
        ds = scale * p * (dot("bhcmk,bhctjk->bhcmtj", outer, far) - delta[..., None])
        p, ds = p.astype(q.dtype), ds.astype(q.dtype)
        dq = dot("bhcmtj,bhctjk->bhcmk", ds, near).astype(q.dtype)
        dk, dv = dot("bhcmtj,bhcmk->bhctjk", ds, queries), dot("bhcmtj,bhcmk->bhctjk", p, outer)
        total_k, total_v = carry
        return (_add_blocks(total_k, index, dk), _add_blocks(total_v, index, dv)), dq

    size = 2 * bytes_per_block(blocks.shape[-1], block_q, block_k, q.shape[-1], 4)
    arrays = (blocked(q, block_q), blocks, blocked(do, block_q), blocked(delta, block_q), lse)
    zeros = jnp.zeros(keys.shape, jnp.float32), jnp.zeros(values.shape, jnp.float32)
    (dk, dv), dq = over_chunks(step, zeros, arrays, size)
    dk, dv = unblocked(dk, k.shape[1]), unblocked(dv, v.shape[1])
    return unblocked(dq, q.shape[1]), dk.astype(k.dtype), dv.astype(v.dtype)


def _add_blocks(total, blocks, x):  # [b h n ...], [b h c t], [b h c t ...]
    return jax.vmap(jax.vmap(lambda total, index, x: total.at[index].add(x)))(total, blocks, x)
