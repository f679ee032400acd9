"""Row ops: the reference against float64, the kernels against both, one rounding at each output."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from arrays import put

from pallas_kernels import norm_modulate
from pallas_kernels.quantized import quantize_rows
from pallas_kernels.rows import split

BF16 = jnp.bfloat16
norm = jax.jit(norm_modulate.norm, static_argnames=("eps", "floats", "scheme", "impl"))
gelu = jax.jit(norm_modulate.gelu, static_argnames=("scheme", "impl"))
IMPLS = ["reference", "interpret"]


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def float64(x):
    return np.asarray(x).astype(np.float64)


def ulps(actual, expected):
    """Distance in bfloat16 steps of finite arrays."""
    a, e = (
        np.asarray(x).astype(ml_dtypes.bfloat16).view(np.int16).astype(np.int32)
        for x in (actual, expected)
    )
    a, e = (np.where(x < 0, -(x & 0x7FFF), x) for x in (a, e))
    return np.abs(a - e)


def rows(b, l, d, per_sample=True):
    """x, y [b l d], factor, shift, gate [b 1 d]; rows of x with means far from zero."""
    x, y = (
        put(normal(0, b, l, d) + 3 * normal(1, b, l, 1), BF16),
        put(normal(2, b, l, d), BF16),
    )
    return x, y, *(normal(seed, b if per_sample else 1, 1, d) for seed in (3, 4, 5))


def stream(x, y, gate):
    """x + y gate rounded to bfloat16, from float64."""
    return (float64(x) + float64(y) * float64(gate)).astype(np.float32).astype(ml_dtypes.bfloat16)


def layer_norm(x, factor, shift, eps=1e-6):
    x = float64(x)
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + eps) * float64(factor) + float64(
        shift
    )


def quantised(q, h, scheme):
    """The formula of the scheme on h [b l d] of float32, but for one step where h lies on an
    edge."""
    expected = quantize_rows(
        put(h.reshape(-1, h.shape[-1]), jnp.float32),
        {"channel": jnp.int8, "fp8": jnp.float8_e4m3fn}[scheme],
    )
    assert q.values.dtype == expected.values.dtype
    np.testing.assert_allclose(q.scale, expected.scale, rtol=1e-5)
    steps = (
        q.values.view(jnp.int8).astype(jnp.int32),
        expected.values.view(jnp.int8).astype(jnp.int32),
    )  # neighbours in fp8 too
    differ = np.abs(np.asarray(steps[0]) - np.asarray(steps[1]))
    assert (differ > 0).mean() < 2e-3 and np.abs(
        float64(q.values) - float64(expected.values)
    ).max() <= (1 if scheme == "channel" else 32)


@pytest.mark.slow
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("b", "l", "d", "scheme"), [(2, 5, 80, "channel"), (1, 3, 1536, "fp8"), (2, 2, 5120, "channel")]
)
def test_residual_norm_and_quantisation(impl, b, l, d, scheme):
    x, y, factor, shift, gate = rows(b, l, d)
    out = norm(x, factor, shift, y=y, gate=gate, eps=1e-6, scheme=scheme, impl=impl)
    assert (
        out.x.dtype == out.h.dtype == BF16
        and out.q.values.shape == (b * l, d)
        and out.q.scale.shape == (b * l,)
    )
    assert (
        ulps(out.x, stream(x, y, gate)).max() <= 1
        and (ulps(out.x, stream(x, y, gate)) > 0).mean() < 1e-3
    )
    h = layer_norm(out.x, factor, shift)  # of the rounded stream
    assert (
        ulps(out.h, h.astype(np.float32)).max() <= 1
        and (ulps(out.h, h.astype(np.float32)) > 0).mean() < 2e-3
    )
    quantised(out.q, h, scheme)


@pytest.mark.parametrize(
    ("inputs", "floats", "scheme"),
    [
        ("x", True, None),
        ("xyg", True, None),
        ("xy", False, "channel"),
        ("x", False, "channel"),
        ("xyg", True, "channel"),
    ],
)
def test_combinations_of_inputs_and_outputs(floats, scheme, inputs):
    x, y, factor, shift, gate = rows(1, 3, 48)
    more = {"y": y} if inputs == "xy" else {"y": y, "gate": gate} if inputs == "xyg" else {}
    kernel, plain = (
        norm(x, factor, shift, **more, eps=1e-6, floats=floats, scheme=scheme, impl=impl)
        for impl in ("interpret", "auto")
    )
    assert jax.tree.structure(kernel) == jax.tree.structure(plain)
    assert (plain.h is None) == (not floats) and (plain.q is None) == (scheme is None)
    np.testing.assert_array_equal(float64(kernel.x), float64(plain.x))
    np.testing.assert_array_equal(
        float64(plain.x),
        float64(x) if inputs == "x" else float64(stream(x, y, gate if inputs == "xyg" else 1)),
    )
    if floats:
        assert ulps(kernel.h, plain.h).max() <= 1
    if scheme:
        quantised(kernel.q, layer_norm(plain.x, factor, shift), scheme)


@pytest.mark.parametrize("impl", IMPLS)
def test_fusing_the_sum_changes_nothing(impl):
    x, y, factor, shift, gate = rows(1, 4, 96, per_sample=False)
    fused = norm(x, factor, shift, y=y, gate=gate, eps=1e-6, scheme="channel", impl=impl)
    apart = norm(fused.x, factor, shift, eps=1e-6, scheme="channel", impl=impl)
    np.testing.assert_array_equal(float64(fused.h), float64(apart.h))
    np.testing.assert_array_equal(fused.q.values, apart.q.values)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_variance_is_the_true_one(impl):
    """A mean of 50 deviations, and a width that is no power of two: padding must not count, nor
    cancellation show."""
    x = put(normal(0, 1, 3, 1536) + 50, jnp.float32)
    out = norm(x, np.ones(1536, np.float32), np.zeros(1536, np.float32), eps=1e-6, impl=impl)
    expected = layer_norm(x, 1, 0)
    assert (
        out.h.dtype == jnp.float32
        and np.abs(float64(out.h) - expected).max() < 1e-5 * np.abs(expected).max()
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_without_variance_and_with_a_nan(impl):
    x = np.stack([np.full(64, 7.0), np.zeros(64), normal(0, 64), normal(1, 64)])[None].astype(
        np.float32
    )
    x[0, 2, 5] = np.nan
    shift = normal(2, 64)
    out = norm(x, np.ones(64, np.float32), shift, eps=1e-6, scheme="channel", impl=impl)
    np.testing.assert_array_equal(out.h[0, :2], np.stack([shift, shift]))
    assert np.isfinite(out.q.scale).tolist() == [True, True, False, True]
    assert np.isnan(out.h[0, 2]).all() and np.isfinite(out.h[0, 3]).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("l", "d", "scheme"), [(3, 80, "fp8"), (2, 8960, "channel")])
def test_gelu(impl, l, d, scheme):
    x = put(3 * normal(0, 2, l, d), BF16)
    x = x.at[0, 0].set(0)
    q = gelu(x, scheme=scheme, impl=impl)
    u = float64(x)
    h = 0.5 * u * (1 + np.tanh(np.sqrt(2 / np.pi) * (u + 0.044715 * u**3)))
    quantised(q, h, scheme)
    assert not float64(q.values)[0].any()


@pytest.mark.parametrize("width", [1, 80, 1536, 5120, 8960, 13824])
@pytest.mark.parametrize("warps", [2, 4, 8])
def test_parts_cover_a_row_once(width, warps):
    parts = split(width, warps)
    assert [i for p in parts for i in range(p.start, p.start + p.size)] == list(range(width))
    assert all(p.size & (p.size - 1) == 0 and p.size <= 256 * warps for p in parts)


@pytest.mark.slow
def test_only_the_plain_float_norm_has_a_derivative():
    x, y, factor, shift, gate = rows(1, 2, 16)
    f = lambda x, **more: (
        norm_modulate.norm(x, factor, shift, y=y, gate=gate, eps=1e-6, **more)
        .h.astype(jnp.float32)
        .sum()
    )
    assert np.isfinite(float64(jax.jit(jax.grad(f))(x))).all()
    for more in ({"scheme": "channel"}, {"impl": "interpret"}):
        with pytest.raises(
            NotImplementedError,
            match="norm_modulate.norm is forward only where it quantises or runs a kernel",
        ):
            jax.eval_shape(jax.grad(lambda x, more=more: f(x, **more)), x)
    with pytest.raises(NotImplementedError, match="norm_modulate.gelu is forward only"):
        jax.eval_shape(jax.grad(lambda x: norm_modulate.gelu(x, scheme="channel").scale.sum()), x)


def test_errors():
    x, y, factor, shift, gate = rows(2, 3, 16)
    with pytest.raises(
        ValueError, match=r"norm: factor \(3, 1, 16\); expected \(16,\) or \(2, 1, 16\)"
    ):
        norm_modulate.norm(x, jnp.zeros((3, 1, 16)), shift, eps=1e-6)
    with pytest.raises(
        ValueError,
        match=(
            r"x bfloat16 \(2, 3, 16\), y float32 \(2, 3, 16\); expected y of the shape and dtype"
            r" of x"
        ),
    ):
        norm_modulate.norm(x, factor, shift, y=y.astype(jnp.float32), eps=1e-6)
    with pytest.raises(ValueError, match=r"no y; expected .* a gate only with y"):
        norm_modulate.norm(x, factor, shift, gate=gate, eps=1e-6)
    with pytest.raises(
        ValueError,
        match=(
            r"scheme is 'block128'; a row has one scale in channel, fp8; block128 quantises tiles"
        ),
    ):
        norm_modulate.gelu(x, scheme="block128")
    with pytest.raises(
        ValueError, match=r"norm: scheme is None; a row has one scale in channel, fp8"
    ):
        norm_modulate.norm(x, factor, shift, eps=1e-6, floats=False)
    with pytest.raises(
        ValueError, match=r"norm: impl is 'cuda'; allowed: auto, reference, triton, interpret"
    ):
        norm_modulate.norm(x, factor, shift, eps=1e-6, impl="cuda")
    with pytest.raises(ValueError, match=r"gelu: x \(3, 16\); expected \[b l d\]"):
        norm_modulate.gelu(x[0], scheme="channel")
