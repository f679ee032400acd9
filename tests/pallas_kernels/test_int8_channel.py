"""The channel and fp8 schemes: scales by row and column, one rounding; and the interface that all
schemes share."""

from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from arrays import put

from pallas_kernels.int8_matmul import (
    SCHEMES,
    QTensor,
    dequantize_rows,
    quantize_activations,
    quantize_rows,
    quantize_weight,
    quantized_linear,
)

BF16 = jnp.bfloat16
TOP = {"channel": 127, "fp8": 448}
quantizer = jax.jit(quantize_activations, static_argnames=("scheme", "impl"))
linear = jax.jit(quantized_linear, static_argnames=("scheme", "out_dtype", "groups", "impl"))


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def float64(x):
    return np.asarray(x).astype(np.float64)


def same(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype
        np.testing.assert_array_equal(float64(a), float64(e))


def ulps(actual, expected):
    """Distance in bfloat16 steps of finite arrays."""
    a, e = (
        np.asarray(x).astype(ml_dtypes.bfloat16).view(np.int16).astype(np.int32)
        for x in (actual, expected)
    )
    a, e = (np.where(x < 0, -(x & 0x7FFF), x) for x in (a, e))
    return np.abs(a - e)


def pair(m, k, n, scheme):
    return quantizer(put(normal(0, m, k), BF16), scheme), jax.jit(
        lambda w: quantize_weight(w, scheme)
    )(normal(1, n, k) / 40)


def exact(x, w, bias=0):
    """The product of quantised matrices in float64."""
    total = (
        float64(x.values)
        @ float64(w.values).T
        * float64(x.scale)[:, None]
        * float64(w.scale)[None, :]
    )
    return total + bias


@pytest.mark.parametrize("scheme", ["channel", "fp8"])
def test_rows_are_quantised_by_the_formula(scheme):
    x = normal(0, 9, 200) * np.exp(3 * normal(1, 9, 1))
    x[3] = 0
    x[4, 5] = 1e30
    q, top = quantizer(x, scheme), np.float32(TOP[scheme])
    amax = np.maximum(np.abs(x).max(1), np.float32(1e-8))
    np.testing.assert_array_equal(q.scale, amax * np.float32(1 / top))
    scaled = np.clip(x * (top / amax)[:, None], -top, top)
    expected = np.rint(scaled) if scheme == "channel" else scaled.astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(float64(q.values), float64(expected))
    assert not float64(q.values)[3].any() and np.abs(float64(q.values)).max(1)[[0, 4]].tolist() == [
        top,
        top,
    ]
    step = (
        np.float64(q.scale)[:, None] / 2
        if scheme == "channel"
        else np.maximum(np.abs(x) / 16, np.float64(q.scale)[:, None] / 1024)
    )
    assert (np.abs(float64(jax.jit(dequantize_rows)(q)) - x) <= 1.0001 * step).all(), "half a step"


def test_ties_go_to_even_and_the_range_is_symmetric():
    same(
        quantize_rows(put([[127.0, 0.5, 1.5, 2.5, -0.5, -127.0]])),
        (np.int8([[127, 0, 2, 2, 0, -127]]), np.ones(1, np.float32)),
    )


@pytest.mark.parametrize(
    ("scheme", "m", "k"),
    [("channel", 1, 1), ("channel", 2, 8960), ("fp8", 5, 80), ("fp8", 3, 1536)],
)
def test_kernel_quantises_the_same_bits(scheme, m, k):
    x = put(normal(0, m, k) * np.exp(normal(1, m, k)), BF16)
    same(quantizer(x, scheme, impl="interpret"), quantizer(x, scheme))


@pytest.mark.parametrize("impl", ["reference", "interpret"])
@pytest.mark.parametrize("scheme", ["channel", "fp8"])
def test_a_nan_or_infinity_spoils_its_row_only(scheme, impl):
    x = normal(0, 4, 128)
    x[1, 7], x[2, 9] = np.nan, -np.inf
    q = quantizer(x, scheme, impl=impl)
    assert np.isfinite(q.scale).tolist() == [True, False, False, True]
    y = linear(q, quantize_weight(normal(1, 6, 128), scheme), scheme=scheme, out_dtype=BF16)
    assert (
        np.isfinite(float64(y)).all(1).tolist() == [True, False, False, True]
        and not np.isfinite(float64(y)[1:3]).any()
    )


@pytest.mark.parametrize(
    ("m", "n"), [(128, 128), (1, 130), (184, 7), (120, 256)]
)  # m mod 128 in 0, 1, 56, 120
def test_kernel_product(m, n):
    x, w = pair(m, 256, n, "channel")
    bias = normal(2, n)
    y = linear(x, w, bias, scheme="channel", out_dtype=BF16, impl="interpret")
    expected = exact(x, w, bias).astype(np.float32)
    assert (
        y.dtype == BF16 and ulps(y, expected).max() <= 1 and (ulps(y, expected) > 0).mean() < 1e-2
    )


def factors(m, n, rank):
    """A second product about as large as that of `pair`."""
    scaled = lambda seed, rows: put(normal(seed, rows, rank) * rank**-0.25, BF16)
    return scaled(3, m), scaled(4, n)


@pytest.mark.parametrize("impl", ["reference", "interpret"])
@pytest.mark.parametrize(("m", "n", "rank"), [(184, 130, 16), (128, 128, 128)])
def test_a_second_product_joins_before_the_only_rounding(m, n, rank, impl):
    """rank 128 is multiplied in two parts."""
    x, w = pair(m, 256, n, "channel")
    narrow, up = factors(m, n, rank)
    bias = normal(2, n)
    y = linear(x, w, bias, low_rank=(narrow, up), scheme="channel", out_dtype=BF16, impl=impl)
    expected = exact(x, w, bias + float64(narrow) @ float64(up).T).astype(np.float32)
    off = ulps(y, expected)
    assert y.dtype == BF16 and (off > 0).mean() < 1e-2
    # where terms of another sign leave little, steps are smaller than an error of their sum
    assert off[np.abs(expected) > 0.1].max() <= 1
    apart = linear(x, w, bias, scheme="channel", out_dtype=BF16, impl=impl)
    twice = apart + (narrow.astype(jnp.float32) @ up.astype(jnp.float32).T).astype(BF16)
    assert (ulps(twice, expected) > 0).mean() > 0.1, "three roundings would show"


@pytest.mark.parametrize("impl", ["reference", "interpret"])
@pytest.mark.parametrize(("m", "n", "rank", "gated"), [(184, 130, 16, True), (128, 128, 0, False)])
def test_a_product_joins_a_stream_before_the_only_rounding(m, n, rank, gated, impl):
    x, w = pair(m, 256, n, "channel")
    stream, bias, low_rank = put(normal(6, m, n), BF16), normal(2, n), None
    total = exact(x, w, bias)
    if rank:
        low_rank = factors(m, n, rank)
        total = total + float64(low_rank[0]) @ float64(low_rank[1]).T
    gate = normal(5, n) if gated else None
    total = float64(stream) + (total * float64(gate) if gated else total)
    options = {"scheme": "channel", "out_dtype": BF16, "impl": impl}
    y = linear(x, w, bias, low_rank=low_rank, stream=stream, gate=gate, **options)
    off = ulps(y, total.astype(np.float32))
    assert y.dtype == BF16 and (off > 0).mean() < 1e-2
    assert off[np.abs(total) > 0.1].max() <= 1


@pytest.mark.parametrize("scheme", ["block128", "fp8"])
def test_a_stream_beside_products_that_have_no_place_for_it(scheme):
    """What the product rounds is added, and that rounded once more."""
    x, w = pair(130, 256, 136, scheme)
    stream, gate = put(normal(6, 130, 136), BF16), normal(5, 136)
    run = lambda **more: linear(x, w, scheme=scheme, out_dtype=BF16, **more)
    expected = (float64(stream) + float64(run()) * float64(gate)).astype(np.float32)
    assert ulps(run(stream=stream, gate=gate), expected).max() <= 1


@pytest.mark.parametrize("n, groups, rank", [(256, 2, 0), (384, 3, 32), (96, 2, 32)])
@pytest.mark.parametrize("impl", ["reference", "interpret"])
def test_columns_in_groups(n, groups, impl, rank):
    """The same bits as of columns side by side, in their places."""
    x, w = pair(70, 128, n, "channel")
    bias, low_rank = jnp.arange(n, dtype=jnp.float32), factors(70, n, rank) if rank else None
    options = {"low_rank": low_rank, "scheme": "channel", "out_dtype": BF16, "impl": impl}
    y = linear(x, w, bias, groups=groups, **options)
    assert y.shape == (groups, 70, n // groups)
    side_by_side = np.concatenate(list(np.asarray(y)), 1)
    np.testing.assert_array_equal(side_by_side, linear(x, w, bias, **options))


@pytest.mark.parametrize("impl", ["reference", "interpret"])
@pytest.mark.parametrize("scheme", ["channel", "fp8"])
def test_rows_in_groups_are_quantised_as_whole_rows(scheme, impl):
    x = jax.random.normal(jax.random.key(0), (3, 20, 128), BF16)
    quantize = partial(quantize_activations, scheme=scheme, impl=impl)
    run = jax.jit(lambda x: (quantize(x, groups=3), quantize(jnp.concatenate(list(x), 1))))
    for a, b in zip(*run(x), strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


@pytest.mark.parametrize("scheme", ["block128", "fp8"])
def test_a_second_product_beside_those_that_have_no_place_for_it(scheme):
    x, w = pair(130, 256, 136, scheme)
    low_rank = factors(130, 136, 32)
    run = lambda **more: float64(linear(x, w, scheme=scheme, out_dtype=jnp.float32, **more))
    expected = run() + float64(low_rank[0]) @ float64(low_rank[1]).T
    np.testing.assert_allclose(run(low_rank=low_rank), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_sums_are_exact_and_rounded_once():
    """Whole numbers below 2^24 come out whole, and the bias joins before the only rounding."""
    rng = np.random.default_rng(0)
    x, w = (
        QTensor(put(rng.integers(-127, 128, (n, 256)), jnp.int8), jnp.ones(n)) for n in (40, 130)
    )
    total, bias = exact(x, w), rng.integers(-1000, 1000, 130).astype(np.float32) + np.float32(0.5)
    np.testing.assert_array_equal(
        linear(x, w, scheme="channel", out_dtype=jnp.float32, impl="interpret"), total
    )
    for impl in ("xla", "interpret"):
        y = linear(x, w, bias, scheme="channel", out_dtype=BF16, impl=impl)
        np.testing.assert_array_equal(
            float64(y), float64((total + bias).astype(np.float32).astype(ml_dtypes.bfloat16))
        )
        twice = total.astype(np.float32).astype(ml_dtypes.bfloat16) + bias.astype(
            ml_dtypes.bfloat16
        )
        assert (float64(y) != float64(twice)).mean() > 0.02, "two roundings would show"


@pytest.mark.parametrize(
    ("scheme", "bound"), [("block128", 0.015), ("channel", 0.015), ("fp8", 0.04)]
)
def test_error_against_the_float_product(scheme, bound):
    """int8: 1.5 % on Gaussian data. e4m3 keeps 4 bits: relative rounding errors of 2.6 % rms in
    both operands, 3.7 % together."""
    x, w = normal(0, 96, 1536), normal(1, 64, 1536)
    y = linear(quantizer(x, scheme), quantize_weight(w, scheme), scheme=scheme, out_dtype=BF16)
    error = np.linalg.norm(float64(y) - float64(x) @ float64(w).T) / np.linalg.norm(
        float64(x) @ float64(w).T
    )
    assert bound / 3 < error <= bound


def test_fp8_dot_agrees_with_its_float32_form():
    """The two round a sum to bfloat16 before the scales, XLA's dot perhaps from another order of
    additions."""
    x, w = pair(33, 300, 20, "fp8")
    a, b = (
        linear(x, w, normal(2, 20), scheme="fp8", out_dtype=BF16, impl=impl)
        for impl in ("reference", "xla")
    )
    expected = exact(x, w, normal(2, 20))
    for y in (a, b):
        assert np.linalg.norm(float64(y) - expected) < 2**-8 * np.linalg.norm(expected)
    y = linear(x, w, scheme="fp8", out_dtype=jnp.float32, impl="reference")
    np.testing.assert_allclose(y, exact(x, w), rtol=1e-5, atol=1e-5 * np.abs(exact(x, w)).max())


@pytest.mark.parametrize("scheme", ["channel", "fp8"])
def test_k_is_free(scheme):
    x, w = pair(5, 77, 11, scheme)
    y = linear(x, w, scheme=scheme, out_dtype=jnp.float32, impl="xla")
    np.testing.assert_allclose(y, exact(x, w), rtol=1e-5, atol=1e-5 * np.abs(exact(x, w)).max())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_one_interface(scheme):
    """Quantised once, multiplied with joined weights: the products of each weight."""
    x, weights, biases = (
        normal(0, 5, 128),
        [normal(n, n, 128) for n in (128, 7)],
        [normal(n, n) for n in (128, 7)],
    )
    q = quantizer(x, scheme)
    weights = [jax.jit(quantize_weight, static_argnums=1)(w, scheme) for w in weights]
    assert all(w.scale.shape == SCHEMES[scheme].scale_shape(w.values.shape) for w in weights)
    joined = QTensor(*(jnp.concatenate(parts) for parts in zip(*weights, strict=True)))
    y = linear(q, joined, np.concatenate(biases), scheme=scheme, out_dtype=jnp.float32)
    apart = [
        linear(q, w, b, scheme=scheme, out_dtype=jnp.float32)
        for w, b in zip(weights, biases, strict=True)
    ]
    np.testing.assert_allclose(y, np.concatenate(apart, 1), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("k", [256, 100])
def test_auto_is_the_kernel_on_cuda_for_widths_that_it_takes(k):
    x, w = pair(3, k, 5, "channel")
    run = lambda x, w: quantized_linear(x, w, scheme="channel", out_dtype=BF16)
    assert ("pallas_call" in str(jax.make_jaxpr(run)(x, w))) == (k == 256)
    same([jax.jit(run)(x, w)], [linear(x, w, scheme="channel", out_dtype=BF16, impl="xla")])


def test_errors():
    x, w = pair(4, 128, 6, "channel")
    run = lambda *args, scheme="channel", **more: quantized_linear(
        *args, scheme=scheme, out_dtype=BF16, **more
    )
    with pytest.raises(
        ValueError,
        match=r"scheme is 'chanel'; allowed: block128, channel, fp8; did you mean 'channel'\?",
    ):
        run(x, w, scheme="chanel")
    with pytest.raises(
        ValueError,
        match=(
            r"impl is 'tritn'; allowed: auto, reference, xla, mosaic, triton, interpret;"
            r" did you mean 'triton'\?"
        ),
    ):
        run(x, w, impl="tritn")
    with pytest.raises(ValueError, match=r"weight int8, scale \(6,\); expected int8 and \(1, 1\)"):
        run(x, w, scheme="block128")
    with pytest.raises(
        ValueError, match=r"weight int8, scale \(6,\); expected float8_e4m3fn and \(6,\)"
    ):
        run(x, w, scheme="fp8")
    with pytest.raises(ValueError, match=r"x int8, scale \(3,\); expected int8 and \(4,\)"):
        run(QTensor(x.values, x.scale[:3]), w)
    with pytest.raises(
        ValueError,
        match=r"quantize_activations: k is 100; it must be a multiple of 128.*nearest: 128",
    ):
        quantize_activations(jnp.zeros((4, 100)), "block128")
    with pytest.raises(
        ValueError, match=r"quantize_activations: x \(4, 1, 128\); expected \[m k\]"
    ):
        quantize_activations(jnp.zeros((4, 1, 128)), "channel")
    with pytest.raises(ValueError, match=r"x \(4, 1, 128\); expected \[2 m k/2\]"):
        quantize_activations(jnp.zeros((4, 1, 128)), "channel", groups=2)
    with pytest.raises(ValueError, match="groups is 2; allowed: 1, and more in channel and fp8"):
        quantize_activations(jnp.zeros((2, 4, 128)), "block128", groups=2)
    with pytest.raises(ValueError, match="groups is 4; allowed: divisors of 6 output channels"):
        run(x, w, groups=4)
    with pytest.raises(ValueError, match=r"the rank of low_rank is 24; .*zeros to 32"):
        run(x, w, low_rank=factors(4, 6, 24))
    with pytest.raises(ValueError, match=r"\(5, 16\); expected \(4, 16\) and \(6, 16\)"):
        run(x, w, low_rank=factors(4, 5, 16))
    stream = jnp.zeros((4, 6), BF16)
    for more, message in (
        ({"gate": jnp.ones(6)}, r"gate \(6,\), no stream; expected \(6,\), and a stream \(4, 6\)"),
        ({"stream": stream, "gate": jnp.ones(4)}, r"gate \(4,\), stream \(4, 6\); expected \(6,\)"),
        ({"stream": stream.astype(jnp.float32)}, r"stream float32 .*expected bfloat16 \(4, 6\)"),
        (
            {"stream": stream[:3]},
            r"stream bfloat16 \(3, 6\) in 1 groups; expected bfloat16 \(4, 6\)",
        ),
        ({"stream": stream, "groups": 2}, r"in 2 groups; expected bfloat16 \(4, 6\) in 1"),
    ):
        with pytest.raises(ValueError, match=message):
            run(x, w, **more)
    narrow = [QTensor(q.values[:, :100], q.scale) for q in (x, w)]
    with pytest.raises(
        ValueError,
        match=r'k is 100; the kernel takes multiples of 128, nearest: 128; impl="xla" takes any',
    ):
        run(*narrow, impl="interpret")


def test_it_is_forward_only():
    w = quantize_weight(normal(0, 6, 128), "channel")
    f = lambda x: quantized_linear(
        quantize_activations(x, "channel"), w, scheme="channel", out_dtype=jnp.float32
    ).sum()
    with pytest.raises(
        NotImplementedError,
        match="quantize_activations is forward only.*Differentiate the float weights",
    ):
        jax.grad(f)(jnp.ones((3, 128)))
    x = quantize_activations(jnp.ones((3, 128)), "channel")
    with pytest.raises(NotImplementedError, match="quantized_linear is forward only"):
        jax.jvp(
            lambda b: quantized_linear(x, w, b, scheme="channel", out_dtype=jnp.float32),
            (jnp.ones(6),),
            (jnp.ones(6),),
        )
