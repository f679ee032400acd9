"""Block-sparse softmax attention and its linear companion in plain JAX: the specification, fast
enough to run at real size.

Query blocks are worked through in chunks; each chunk gathers its key and value blocks, so memory
does not grow with length.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax

from pallas_kernels.derivatives import with_derivatives

EXACT = (
    lax.Precision.HIGHEST
)  # float32 operands are multiplied as float32; narrower ones are not affected
CHUNK_BYTES = 2**30  # float32 scores and gathered blocks held at a time
EPS = 1e-5  # of the linear branch


def blocked(x, size):  # [b l h k] -> [b h n size k], zeros past the end
    """Tokens in blocks; the tail block is padded."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % size), (0, 0), (0, 0)))
    return rearrange(x, "b (n m) h k -> b h n m k", m=size)


def unblocked(x, length):  # [b h n m k] -> [b length h k]
    return rearrange(x, "b h n m k -> b (n m) h k")[:, :length]


def counts(length, size):
    """Tokens in each block: `size`, and the rest in the last."""
    blocks = -(-length // size)
    return jnp.minimum(size, length - size * jnp.arange(blocks)).astype(jnp.float32)


def pooled_scores(q, k, block_q, block_k):  # [b l h k] -> f32 [b h q_blocks k_blocks]
    """Mean query of each block times mean of each block of k - mean(k); no scale, no softmax, all
    in float32."""
    pool = lambda x, size: (
        blocked(x, size).sum(3, dtype=jnp.float32) / counts(x.shape[1], size)[:, None]
    )
    k_mean = k.mean(1, dtype=jnp.float32)[:, :, None]
    return jnp.einsum(
        "bhik,bhjk->bhij", pool(q, block_q), pool(k, block_k) - k_mean, precision=EXACT
    )


def block_map(q, k, chosen, block_q, block_k):  # -> int32 [b h q_blocks chosen], ascending
    """The `chosen` key blocks of highest pooled score for each query block; ties go to the lowest
    index."""
    scores = pooled_scores(lax.stop_gradient(q), lax.stop_gradient(k), block_q, block_k)
    return jnp.sort(lax.top_k(scores, chosen)[1], -1)


def dense_map(blocks, k_blocks):  # int32 [b h q_blocks chosen] -> int8 [b h q_blocks k_blocks]
    """The block list as a map of zeros and ones."""
    return jax.nn.one_hot(blocks, k_blocks, dtype=jnp.int8).sum(-2, dtype=jnp.int8)


def take(x, blocks):  # [b h n ...], [b h c t] -> [b h c t ...]
    return jax.vmap(jax.vmap(lambda x, index: x[index]))(x, blocks)


def over_chunks(step, carry, arrays, bytes_per_block):
    """lax.scan of `step` over chunks of query blocks (axis 2 of every array), padded at the end
    with zeros."""
    b, h, n = arrays[0].shape[:3]
    pieces = -(-n // max(CHUNK_BYTES // (b * h * bytes_per_block), 1))
    size = -(-n // pieces)

    def split(x):
        x = jnp.pad(x, ((0, 0), (0, 0), (0, pieces * size - n)) + ((0, 0),) * (x.ndim - 3))
        return rearrange(x, "b h (p c) ... -> p b h c ...", p=pieces)

    if pieces == 1:
        return step(carry, arrays)
    carry, out = lax.scan(step, carry, jax.tree.map(split, arrays))
    return carry, jax.tree.map(
        lambda x: rearrange(x, "p b h c ... -> b h (p c) ...")[:, :, :n], out
    )


def logits(q, k, blocks, block_k, length):  # q [b h c m k], k [b h c t j k] -> f32 [b h c m (t j)]
    """Scaled scores; keys past the end of the sequence get -inf."""
    s = jnp.einsum(
        "bhcmk,bhctjk->bhcmtj", q, k, preferred_element_type=jnp.float32, precision=EXACT
    )
    return flatten_keys(q.shape[-1] ** -0.5 * s, blocks, block_k, length)


def flatten_keys(s, blocks, block_k, length):  # f32 [b h c m t j] -> [b h c m (t j)]
    position = blocks[..., None] * block_k + jnp.arange(block_k)  # [b h c t j]
    s = jnp.where((position < length)[:, :, :, None], s, -jnp.inf)
    return rearrange(s, "b h c m t j -> b h c m (t j)")


def softmax_sum(
    s, v
):  # float32 island: s [b h c m n], v [b h c t j k] -> o f32 [b h c m k], log of the normaliser [b h c m]
    top = lax.stop_gradient(
        s.max(-1, keepdims=True)
    )  # neither result depends on what is subtracted
    p = jnp.exp(s - top)
    total = p.sum(-1, keepdims=True)
    v = rearrange(v, "b h c t j k -> b h c (t j) k")
    o = jnp.einsum(
        "bhcmn,bhcnk->bhcmk",
        p.astype(v.dtype),
        v,
        preferred_element_type=jnp.float32,
        precision=EXACT,
    )
    return o / total, (top + jnp.log(total))[..., 0]


def bytes_per_block(chosen, block_q, block_k, width, itemsize):
    """Scores and probabilities of one query block, and its gathered keys and values."""
    return chosen * block_k * (12 * block_q + 2 * width * itemsize)


def sparse_attention(
    q, k, v, blocks, block_q, block_k
):  # q k v [b l h k], blocks [b h q_blocks chosen]
    """Softmax attention of each query block over its chosen key blocks; keys past the end do not
    count.

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


def forward(q, k, v, blocks, block_q, block_k):
    """-> o [b l h k], and the log of each softmax normaliser f32 [b h q_blocks block_q]."""
    keys, values = blocked(k, block_k), blocked(v, block_k)

    def step(_, chunk):
        queries, index = chunk
        s = logits(queries, take(keys, index), index, block_k, k.shape[1])
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
        p = jnp.exp(logits(queries, near, index, block_k, k.shape[1]) - lse[..., None])
        p = rearrange(p, "b h c m (t j) -> b h c m t j", j=block_k)
        ds = scale * p * (dot("bhcmk,bhctjk->bhcmtj", outer, far) - delta[..., None])
        p, ds = p.astype(q.dtype), ds.astype(q.dtype)
        dq = dot("bhcmtj,bhctjk->bhcmk", ds, near).astype(q.dtype)
        dk, dv = dot("bhcmtj,bhcmk->bhctjk", ds, queries), dot("bhcmtj,bhcmk->bhctjk", p, outer)
        return (add_blocks(carry[0], index, dk), add_blocks(carry[1], index, dv)), dq

    size = 2 * bytes_per_block(blocks.shape[-1], block_q, block_k, q.shape[-1], 4)
    arrays = (blocked(q, block_q), blocks, blocked(do, block_q), blocked(delta, block_q), lse)
    zeros = jnp.zeros(keys.shape, jnp.float32), jnp.zeros(values.shape, jnp.float32)
    (dk, dv), dq = over_chunks(step, zeros, arrays, size)
    return (
        unblocked(dq, q.shape[1]),
        unblocked(dk, k.shape[1]).astype(k.dtype),
        unblocked(dv, v.shape[1]).astype(v.dtype),
    )


def add_blocks(total, blocks, x):  # [b h n ...], [b h c t], [b h c t ...]
    return jax.vmap(jax.vmap(lambda total, index, x: total.at[index].add(x)))(total, blocks, x)


def linear_attention(
    q, k, v, proj_kernel, proj_bias
):  # q k v [b l h k], proj [k k] (i o) and [k] float32 -> [b l h k]
    """phi(q) M / (phi(q) . z + eps) + bias over all keys, phi = softmax over k, M = (phi(k)^T v)
    proj, z = sum of phi(k).

    M, z and the quotient are float32; the products' operands have the input dtype.
    """
    phi_q, phi_k = feature(q), feature(k)
    dot = partial(jnp.einsum, preferred_element_type=jnp.float32, precision=EXACT)
    m = dot("bhij,jo->bhio", dot("blhi,blhj->bhij", phi_k, v), proj_kernel)
    z = phi_k.sum(1, dtype=jnp.float32)
    n = (phi_q.astype(jnp.float32) * z[:, None]).sum(-1, keepdims=True) + EPS
    return (dot("blhi,bhio->blho", phi_q, m.astype(q.dtype)) / n + proj_bias).astype(q.dtype)


def feature(x):  # float32 island
    return jax.nn.softmax(x.astype(jnp.float32), -1).astype(x.dtype)
