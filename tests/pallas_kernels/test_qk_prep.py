from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import put
from jaxprs import largest
from tolerances import assert_close

from pallas_kernels import qk_prep as op
from pallas_kernels.qk_prep import workloads

IMPLS = ("reference", "interpret")
rms_norm_rope = jax.jit(op.rms_norm_rope, static_argnames=("eps", "groups", "impl"))
rms_norm_rope_pool = jax.jit(
    op.rms_norm_rope_pool, static_argnames=("eps", "block", "groups", "impl")
)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def arguments(b=2, l=70, h=3, k=16, dtype=jnp.float32):
    angle = normal(2, l, k // 2)
    return (
        put(2 * normal(0, b, l, h * k), dtype),
        1 + 0.3 * put(normal(1, h * k)),
        jnp.cos(angle),
        jnp.sin(angle),
    )


def exact(x, weight, cos, sin, eps):
    """float64, rotated as complex numbers."""
    x, weight, cos, sin = (np.asarray(a, np.float64) for a in (x, weight, cos, sin))
    y = x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight
    z = y.reshape(*y.shape[:2], -1, cos.shape[1], 2)
    z = (z[..., 0] + 1j * z[..., 1]) * (cos + 1j * sin)[:, None]
    return np.stack([z.real, z.imag], -1).reshape(*z.shape[:3], -1)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("h", [1, 5])
def test_norm_over_all_heads_and_rotation(impl, h):
    args = arguments(h=h)
    assert_close(rms_norm_rope(*args, eps=1e-2, impl=impl), exact(*args, 1e-2), "float32")


@pytest.mark.parametrize("impl", IMPLS)
def test_one_rounding(impl):
    """bfloat16 results are the float64 ones rounded once: at most half a unit in the last place
    away."""
    args = arguments(dtype=jnp.bfloat16)
    y = rms_norm_rope(*args, eps=1e-6, impl=impl)
    assert y.dtype == jnp.bfloat16
    error = np.abs(np.asarray(y, np.float64) - exact(*args, 1e-6))
    unit = 2.0 ** (np.floor(np.log2(np.abs(exact(*args, 1e-6)))) - 7)
    assert (error <= 0.5001 * unit).all(), (error / unit).max()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("l, block", [(1, 64), (135, 64), (144, 128), (50, 16)])
def test_means_of_blocks(impl, l, block):
    x, *rest = arguments(l=l)
    y, means = rms_norm_rope_pool(x, *rest, eps=1e-6, block=block, impl=impl)
    assert_close(y, exact(x, *rest, 1e-6), "float32")
    y = np.asarray(y, np.float64)
    assert_close(
        means, np.stack([y[:, i : i + block].mean(1) for i in range(0, l, block)], 2), "float32"
    )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("h, groups", [(6, 2), (6, 3), (4, 4)])
def test_heads_in_groups(impl, h, groups):
    """The same bits in other places; the means stay where they are."""
    args = arguments(h=h, dtype=jnp.bfloat16)
    y, means = rms_norm_rope_pool(*args, eps=1e-6, block=32, impl=impl)
    apart, same = rms_norm_rope_pool(*args, eps=1e-6, block=32, groups=groups, impl=impl)
    np.testing.assert_array_equal(np.concatenate(list(np.asarray(apart)), 2), y)
    np.testing.assert_array_equal(same, means)
    apart = rms_norm_rope(*args, eps=1e-6, groups=groups, impl=impl)
    np.testing.assert_array_equal(np.concatenate(list(np.asarray(apart)), 2), y)


def test_derivatives_of_the_kernel_are_those_of_the_reference():
    args = arguments(l=40)
    ways = tuple(put(normal(3 + i, *a.shape)) for i, a in enumerate(args))
    run = lambda impl: lambda *args: op.rms_norm_rope_pool(*args, eps=1e-6, block=32, impl=impl)
    loss = lambda impl: lambda *args: sum(jnp.sin(y).sum() for y in run(impl)(*args))
    both = lambda impl: (
        lambda: (jax.jvp(run(impl), args, ways)[1], jax.grad(loss(impl), (0, 1))(*args))
    )
    jax.tree.map(
        lambda a, e: assert_close(a, e, "float32"),
        jax.jit(both("interpret"))(),
        jax.jit(both("reference"))(),
    )


@pytest.mark.parametrize("name", workloads.SHAPES)
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_workloads_at_real_size(name, impl):
    """They trace, the reference lowers for CUDA, and no array is larger than the float32 form of
    the argument."""
    run, load = (
        partial(op.rms_norm_rope_pool, eps=1e-6, block=64, impl=impl),
        workloads.WORKLOADS[name],
    )
    args = jax.eval_shape(load.make, jax.random.key(0))
    assert 3 * args[0].size < load.bytes < 4.5 * args[0].size
    traced = jax.jit(run).trace(*args)
    assert largest(traced.jaxpr.jaxpr) <= args[0].size * 4 * 1.01
    if impl == "reference":
        traced.lower(lowering_platforms=("cuda",))


def test_errors():
    x, weight, cos, sin = arguments()
    for bad in [
        (x[0], weight, cos, sin),
        (x, weight[1:], cos, sin),
        (x, weight, cos[1:], sin[1:]),
        (x, weight, cos[:, 1:], sin[:, 1:]),
    ]:
        with pytest.raises(
            ValueError, match=r"rms_norm_rope: x .*expected \[b l d\], \[d\] and float32 \[l k/2\]"
        ):
            op.rms_norm_rope(*bad, eps=1e-6)
    with pytest.raises(ValueError, match="groups is 2; allowed: divisors of 3 heads"):
        op.rms_norm_rope(x, weight, cos, sin, eps=1e-6, groups=2)
    with pytest.raises(
        ValueError,
        match="rms_norm_rope: head width is 6; the kernel takes powers of two; nearest: 4 and 8",
    ):
        op.rms_norm_rope(*arguments(k=6), eps=1e-6, impl="interpret")
    with pytest.raises(
        ValueError,
        match="rms_norm_rope: impl is 'pallas'; allowed: auto, reference, triton, interpret",
    ):
        op.rms_norm_rope(x, weight, cos, sin, eps=1e-6, impl="pallas")
