"""The sparse ops made of kernels, with their derivatives; `interpret` runs the kernels on any
device, for tests."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.derivatives import with_derivatives
from pallas_kernels.sparse_attention import linear_backward, reference
from pallas_kernels.sparse_attention.backward import backward
from pallas_kernels.sparse_attention.block_map import block_map_and_mean
from pallas_kernels.sparse_attention.forward import forward
from pallas_kernels.sparse_attention.linear import summaries


def sparse_attention(q, k, v, blocks, block_q, block_k, *, interpret):
    """See `reference.sparse_attention`; the tangent, which no training here takes, is that of the
    reference."""

    def run(*args):
        o, _, lse = forward(*args, block_q, block_k, save=True, interpret=interpret)
        return o, (o, lse)

    def tangent(args, saved, tangents):
        plain = lambda *qkv: reference.forward(*qkv, args[3], block_q, block_k)[0]
        return jax.jvp(plain, args[:3], tangents[:3])[1]

    def grad(args, saved, do):
        return (*backward(*args, *saved, do, block_q, block_k, interpret=interpret), None)

    return with_derivatives(run, tangent=tangent, grad=grad)(q, k, v, blocks)


def sparse_linear_attention(
    q, k, v, proj_kernel, proj_bias, means=None, *, chosen, block_q, block_k, interpret
):
    """The whole op: map, sums over all keys, and one pass over the queries for both branches.

    What the gradient needs besides o is written only where the op is differentiated; the tangent is
    that of the reference.
    """

    def run(args, save):
        q, k, v, proj_kernel, proj_bias, blocks = args
        sums, linear = summed(q, k, v, proj_kernel, proj_bias, interpret=interpret)
        return (
            forward(
                q, k, v, blocks, block_q, block_k, linear=linear, save=save, interpret=interpret
            ),
            sums,
        )

    def saving(*args):
        (o, o_s, lse), sums = run(args, True)
        return o, (o_s, lse, *sums)

    def tangent(args, saved, tangents):
        near = lambda *qkv: reference.forward(*qkv, args[5], block_q, block_k)[0]
        return jax.jvp(
            lambda *a: near(*a[:3]) + reference.linear_attention(*a), args[:5], tangents[:5]
        )[1]

    def grad(args, saved, do):
        return linear_backward.grad(args, saved, do, block_q, block_k, interpret=interpret)

    op = jax.custom_jvp(lambda *args: run(args, False)[0])
    op.defjvp(
        lambda args, tangents: jax.jvp(
            with_derivatives(saving, tangent=tangent, grad=grad), args, tangents
        )
    )
    blocks, _ = block_map_and_mean(q, k, chosen, block_q, block_k, means, interpret=interpret)
    return op(q, k, v, proj_kernel, proj_bias, blocks)


def summed(q, k, v, proj_kernel, proj_bias, *, interpret):
    """-> phi(k)^T v f32 [b h k k] and the sum of phi(k) f32 [b h k], and the operand `linear` of
    `forward.attend` made of them."""
    product, total = summaries(k, v, interpret=interpret)
    m = jnp.einsum("bhij,jo->bhio", product, proj_kernel, precision=reference.EXACT)
    return (product, total), (q, m.astype(q.dtype), total, proj_bias)
