import described
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import put
from generated import examples
from hypothesis import given
from hypothesis import strategies as st
from tolerances import assert_close

from pallas_kernels.int8_matmul import QTensor, dequantize, int8_linear, quantize, reference

pytestmark = pytest.mark.optimized


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def exact(actual, expected, what):
    np.testing.assert_array_equal(np.asarray(actual), expected, err_msg=what)


@pytest.mark.parametrize("name", ["x", "w", "z"])
def test_quantiser_is_bit_exact(golden, name):
    g = golden("int8_linear")
    source = {"x": "in/x", "w": "w/weight", "z": "in/z"}[name]
    q = jax.jit(quantize)(put(g[source], jnp.bfloat16))
    exact(q.scale, g[f"out/{name}_scale"], "scales")
    exact(q.values, g[f"out/{name}_q"], "values")


@pytest.mark.slow
def test_product_and_both_roundings(golden):
    g = golden("int8_linear")
    x, weight = (
        put(g["in/x"], jnp.bfloat16),
        QTensor(put(g["out/w_q"]), put(g["out/w_scale"])),
    )
    y = jax.jit(lambda x, w: reference.block_sum(quantize(x), w))(x, weight)
    assert_close(y, g["out/y_f32"], "int8_y")
    run = jax.jit(int8_linear)
    for bias, key in (
        (None, "out/y_bf16"),
        (put(g["w/bias"], jnp.bfloat16), "out/y_bf16_plus_bias"),
    ):
        y = run(x, weight, bias)
        assert y.dtype == jnp.bfloat16
        differ = np.asarray(y, np.float32) != g[key]
        assert differ.mean() < 1e-3, (
            f"{key}: float32 sums in another order may move a value across a rounding edge, seldom"
        )
        np.testing.assert_allclose(np.asarray(y, np.float32), g[key], rtol=2**-7, atol=2**-7)


def test_cuda_kernels_of_the_publishers(golden):
    g = golden("int8_linear_cuda")
    x, w = put(g["x"], jnp.bfloat16), jax.jit(quantize)(put(g["w"], jnp.bfloat16))
    q = jax.jit(quantize)(x)
    exact(q.scale, g["xs"], "scales of x")
    exact(w.scale, g["ws"], "scales of the weight")
    exact(w.values, g["wq"], "weight")
    assert (np.asarray(q.values) != g["xq"]).sum() <= 1, (
        "their quotient is computed by fast division"
    )
    y = jax.jit(int8_linear)(x, QTensor(put(g["wq"], jnp.int8), put(g["ws"])))
    np.testing.assert_allclose(np.asarray(y, np.float32), g["y"], rtol=2**-7, atol=1e-2)


@pytest.mark.slow
def test_rows_in_pieces_change_nothing(monkeypatch):
    x, w = jax.jit(quantize)(normal(0, 300, 256)), jax.jit(quantize)(normal(1, 70, 256))
    whole = jax.jit(reference.block_sum)(x, w)
    monkeypatch.setattr(reference, "SUM_BYTES", 4 * 70 * 128)
    exact(
        jax.jit(lambda *a: reference.block_sum(*a))(x, w), np.asarray(whole), "pieces of 128 rows"
    )


@pytest.mark.slow
@examples(20)
@given(
    st.sampled_from([1, 128, 131]),
    st.sampled_from([7, 150]),
    st.floats(1e-3, 1e3),
    st.integers(0, 99),
)
def test_one_step_bounds_the_error(m, k, size, seed):
    x = np.random.default_rng(seed).normal(size=(m, k)).astype(np.float32) * np.float32(size)
    q = jax.jit(quantize)(x)
    amax = np.abs(x[:128, :128]).max()
    error = np.abs(np.asarray(jax.jit(dequantize)(q)) - x)[:128, :128]
    assert (
        error.max() <= 1.001 * amax / 128
    )  # half a step, and a whole one for the positive maximum
    assert np.asarray(q.scale)[0, 0] == amax / 128


def test_zero_and_extremes():
    q = quantize(jnp.zeros((3, 128)))
    assert not np.asarray(q.values).any() and np.asarray(q.scale)[0, 0] == np.float32(1e-8) / 128
    q = quantize(put([[128.0, -128.0, 0.5, 1.5, 2.5, -0.5]]))
    exact(q.values, [[127, -128, 0, 2, 2, 0]], "saturation, and ties to even")


def test_is_close_to_the_float_product():
    x, w = normal(0, 200, 384), normal(1, 100, 384)
    y, expected = jax.jit(lambda x, w: int8_linear(x, quantize(w)))(x, w), x @ w.T
    assert np.linalg.norm(y - expected) < 0.02 * np.linalg.norm(expected)


def test_memory_is_bounded_and_it_lowers_for_cuda():
    x = jax.ShapeDtypeStruct((32760, 1536), jnp.bfloat16)
    w = QTensor(
        jax.ShapeDtypeStruct((8960, 1536), jnp.int8), jax.ShapeDtypeStruct((70, 12), jnp.float32)
    )
    lowered = described.lower(described.trace(jax.jit(int8_linear), x, w))
    assert lowered.out_info.shape == (32760, 8960)


def test_errors():
    x, w = jnp.zeros((5, 200)), quantize(jnp.zeros((7, 200)))
    with pytest.raises(
        ValueError, match=r"k is 200; it must be a multiple of 128, .*; nearest: 128 and 256"
    ):
        int8_linear(x, w)
    x, w = jnp.zeros((5, 128)), quantize(jnp.zeros((7, 128)))
    with pytest.raises(
        ValueError, match=r"impl is 'tritn'; allowed: auto, reference, .*did you mean 'triton'"
    ):
        int8_linear(x, w, impl="tritn")
    with pytest.raises(ValueError, match=r"bias \(3,\); expected \(7,\)"):
        int8_linear(x, w, jnp.zeros(3))
    with pytest.raises(ValueError, match=r"expected \[m k\] and \[n k\]"):
        int8_linear(x[:, :100], w)
    with pytest.raises(ValueError, match=r"scale \(2, 2\); expected int8 and \(1, 1\)"):
        int8_linear(x, QTensor(w.values, jnp.zeros((2, 2))))
    for differentiate in (
        lambda: jax.grad(lambda x: int8_linear(x, w).sum())(x),
        lambda: jax.jvp(lambda x: int8_linear(x, w), (x,), (x,)),
    ):
        with pytest.raises(
            NotImplementedError,
            match="int8_linear is forward only.*Differentiate the float weights",
        ):
            differentiate()
