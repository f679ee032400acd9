"""The sparse ops made of kernels, with their derivatives; `interpret` runs the kernels on any
device, for tests."""

from __future__ import annotations

import jax

from pallas_kernels.block_map import block_map
from pallas_kernels.derivatives import with_derivatives
from pallas_kernels.linear_branch import linear_attention, operands
from pallas_kernels.sparse_attention import linear_backward, reference
from pallas_kernels.sparse_attention.backward import backward
from pallas_kernels.sparse_attention.forward import forward


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
        sums, linear = operands(q, k, v, proj_kernel, proj_bias, interpret=interpret)
        options = {"linear": linear, "save": save, "interpret": interpret}
        return forward(q, k, v, blocks, block_q, block_k, **options), sums

    def saving(*args):
        (o, o_s, lse), sums = run(args, True)
        return o, (o_s, lse, *sums)

    def tangent(args, saved, tangents):
        near = lambda *qkv: reference.forward(*qkv, args[5], block_q, block_k)[0]
        whole = lambda *given: near(*given[:3]) + linear_attention(*given)
        return jax.jvp(whole, args[:5], tangents[:5])[1]

    def grad(args, saved, do):
        return linear_backward.grad(args, saved, do, block_q, block_k, interpret=interpret)

    op = jax.custom_jvp(lambda *args: run(args, False)[0])
    differentiable = with_derivatives(saving, tangent=tangent, grad=grad)
    op.defjvp(lambda args, tangents: jax.jvp(differentiable, args, tangents))
    blocks = block_map(q, k, chosen, block_q, block_k, means, interpret=interpret)
    return op(q, k, v, proj_kernel, proj_bias, blocks)
