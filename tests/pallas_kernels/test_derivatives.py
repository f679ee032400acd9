"""The cases in which one attention op must serve: kernels are host callbacks here, which JAX can
neither look into nor differentiate."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import put
from jax.sharding import PartitionSpec as P
from tolerances import assert_close

from pallas_kernels.derivatives import forward_only, with_derivatives


def plain(a, b):
    return jnp.tanh(a) * b


def opaque(f, result, *args):
    return jax.pure_callback(
        lambda *a: f(*(np.asarray(x) for x in a)),
        jax.ShapeDtypeStruct(result.shape, result.dtype),
        *args,
    )


def forward(a, b):
    return opaque(lambda a, b: np.tanh(a) * b, a, a, b), opaque(np.tanh, a, a)


def tangent(args, saved, tangents):
    return opaque(
        lambda y, b, ta, tb: (1 - y * y) * ta * b + y * tb, saved, saved, args[1], *tangents
    )


def grad(args, saved, cotangent):
    da = opaque(lambda y, b, g: (1 - y * y) * g * b, saved, saved, args[1], cotangent)
    return da, opaque(lambda y, g: y * g, saved, saved, cotangent)


op = with_derivatives(forward, tangent=tangent, grad=grad)


@pytest.fixture
def ab():
    return tuple(
        put(np.random.default_rng(seed).normal(size=(4, 3)), jnp.float32) for seed in range(2)
    )


def loss(f, a, b):
    return jnp.square(f(a, b)).sum()


def stacked(f, a, b, checkpoint):
    step = lambda x, y: (f(x, y), None)
    return jax.lax.scan(jax.checkpoint(step) if checkpoint else step, a, jnp.stack([b, 2 * b, -b]))[
        0
    ]


def same(f, *args):
    """f with the opaque op equals f with the plain function."""
    for actual, expected in zip(
        jax.tree.leaves(f(op, *args)), jax.tree.leaves(f(plain, *args)), strict=True
    ):
        assert_close(actual, expected, "float32")


def test_forward(ab):
    same(lambda f, *ab: f(*ab), *ab)


def test_tangent_of_both_and_of_one_operand(ab):
    a, b = ab
    same(lambda f, a, b: jax.jvp(f, (a, b), (b, a)), a, b)
    same(lambda f, a, b: jax.jvp(lambda b: f(a, b), (b,), (a,)), a, b)


def test_gradient_of_both_and_of_one_operand(ab):
    same(lambda f, *ab: jax.grad(partial(loss, f), (0, 1))(*ab), *ab)
    same(lambda f, *ab: jax.grad(partial(loss, f), 1)(*ab), *ab)


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", [False, True])
def test_inside_a_scan(ab, checkpoint):
    run = lambda f, a, b: stacked(f, a, b, checkpoint)
    same(run, *ab)
    same(lambda f, a, b: jax.jvp(partial(run, f), (a, b), (b, a)), *ab)
    same(lambda f, *ab: jax.grad(lambda a, b: jnp.square(run(f, a, b)).sum(), (0, 1))(*ab), *ab)
    same(lambda f, *ab: jax.grad(lambda a, b: jnp.square(run(f, a, b)).sum())(*ab), *ab)


def test_gradient_beside_a_tangent_target(ab):
    def step(f, a, b):
        target = jax.jvp(f, (a, b), (b, a))[1]
        return jax.grad(lambda b: jnp.square(f(a, b) - target).sum())(b)

    same(step, *ab)


def test_under_shard_map(ab):
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    split = lambda f: jax.shard_map(
        f, mesh=mesh, in_specs=(P("x"), P("x")), out_specs=P("x"), check_vma=False
    )
    same(lambda f, *ab: jax.jit(jax.grad(lambda a, b: loss(split(f), a, b), (0, 1)))(*ab), *ab)
    same(lambda f, a, b: jax.jit(lambda a, b: jax.jvp(split(f), (a, b), (b, a)))(a, b), *ab)


def test_forward_only_says_why(ab):
    f = forward_only(plain, "has no derivative because of a reason")
    assert_close(f(*ab), plain(*ab), "float32")
    for differentiate in (lambda: jax.grad(partial(loss, f))(*ab), lambda: jax.jvp(f, ab, ab)):
        with pytest.raises(NotImplementedError, match="because of a reason"):
            differentiate()


@pytest.mark.slow
def test_a_second_derivative_says_what_to_do(ab):
    a, b = ab
    tangent_of = lambda b: jax.jvp(lambda a: op(a, b), (a,), (a,))[1]
    inside = lambda b: jnp.square(op(a, b) - jax.lax.stop_gradient(tangent_of(b))).sum()
    for f in (jax.grad(inside), lambda b: jax.jvp(jax.grad(partial(loss, op, a)), (b,), (b,))):
        with pytest.raises(
            NotImplementedError, match="outside the function that is differentiated"
        ):
            f(b)
    same(
        lambda f, b: jax.grad(
            lambda b: jnp.square(
                f(a, b) - jax.jvp(lambda a: f(a, jax.lax.stop_gradient(b)), (a,), (a,))[1]
            ).sum()
        )(b),
        b,
    )
