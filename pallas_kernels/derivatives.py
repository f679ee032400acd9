"""Derivatives of opaque kernels: one op that serves forward, tangent and gradient, or that says it
has none."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero, linear_call


def with_derivatives(forward: Callable, *, tangent: Callable, grad: Callable) -> Callable:
    """An op differentiable in both modes from three functions that JAX cannot look into.

    forward(*args) -> (out, saved);  tangent(args, saved, tangents) -> tangent of out;  grad(args,
    saved, cotangent) -> cotangents of args. The tangent is a linear call whose transpose is `grad`.
    Limits: no vmap of the gradient (ops have a batch axis), and no second derivative:
    differentiating the arguments of a jvp or of a gradient raises NotImplementedError.
    """

    @jax.custom_jvp
    def op(*args):
        return forward(*args)[0]

    def rule(args, tangents):
        args = _once(*args)
        out, saved = forward(*args)
        live = [i for i, t in enumerate(tangents) if not isinstance(t, SymbolicZero)]

        def push(kept, given):
            args, saved = kept
            full = [jnp.zeros_like(a) for a in args]
            for i, t in zip(live, given, strict=True):
                full[i] = t
            return tangent(args, saved, tuple(full))

        def pull(kept, cotangent):
            args, saved = kept
            cotangents = grad(args, saved, cotangent)
            return [cotangents[i] for i in live]

        return out, linear_call(push, pull, (args, saved), [tangents[i] for i in live])

    op.defjvp(rule, symbolic_zeros=True)
    return op


SECOND = (
    "the derivative of this op has no derivative of its own; compute a tangent outside the function"
    " that is differentiated, or at arguments under jax.lax.stop_gradient"
)


def forward_only(function: Callable, reason: str) -> Callable:
    """`function`, raising NotImplementedError with `reason` when it is differentiated in either
    mode."""

    @jax.custom_jvp
    def op(*args):
        return function(*args)

    @op.defjvp
    def rule(args, tangents):
        raise NotImplementedError(reason)

    return op


_once = forward_only(lambda *args: args, SECOND)
