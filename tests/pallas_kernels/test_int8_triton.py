"""The block128 kernels under the interpreter: the bits of the reference, tails included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import put
from tolerances import assert_close

from pallas_kernels.int8_matmul import (
    QTensor,
    int8_linear,
    quantize,
    quantize_activations,
    quantized_linear,
)
from pallas_kernels.int8_matmul.triton import swizzled

pytestmark = pytest.mark.optimized

kernel_quantize = jax.jit(lambda x: quantize_activations(x, "block128", impl="interpret"))
reference_quantize = jax.jit(quantize)
kernel_linear = jax.jit(lambda *args: int8_linear(*args, impl="interpret"))
reference_linear = jax.jit(lambda *args: int8_linear(*args, impl="reference"))
kernel_product = jax.jit(
    lambda *args: quantized_linear(
        *args, scheme="block128", out_dtype=jnp.float32, impl="interpret"
    )
)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def same(actual, expected, what):
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == e.dtype
        np.testing.assert_array_equal(
            np.asarray(a, np.float32), np.asarray(e, np.float32), err_msg=what
        )


@pytest.mark.parametrize("name", ["x", "w", "z"])
def test_quantiser_is_that_of_the_golden_file(golden, name):
    g = golden("int8_linear")
    source = {"x": "in/x", "w": "w/weight", "z": "in/z"}[
        name
    ]  # ties, saturation, a block of zeros, an outlier; z is ragged in k
    x = put(g[source], jnp.bfloat16)
    if name == "z":
        x = jnp.pad(x, ((0, 0), (0, 56)))  # the op takes whole blocks of k; zeros are in no maximum
    q = kernel_quantize(x)
    same(q.scale, put(g[f"out/{name}_scale"]), "scales")
    np.testing.assert_array_equal(np.asarray(q.values)[:, : g[source].shape[1]], g[f"out/{name}_q"])


@pytest.mark.parametrize("m", [1, 128, 184, 248])  # m mod 128 in 1, 0, 56, 120
def test_quantiser_equals_the_reference(m):
    x = normal(m, m, 256) * np.exp(normal(m + 1, m, 256))
    same(kernel_quantize(x), reference_quantize(x), f"{m} rows")


@pytest.mark.slow
def test_product_of_the_golden_file(golden):
    g = golden("int8_linear")
    x, weight = (
        put(g["in/x"], jnp.bfloat16),
        QTensor(put(g["out/w_q"]), put(g["out/w_scale"])),
    )
    bias = put(g["w/bias"], jnp.bfloat16)
    y = kernel_linear(x, weight, bias)
    assert y.dtype == jnp.bfloat16
    differ = np.asarray(y, np.float32) != g["out/y_bf16_plus_bias"]
    assert differ.mean() < 1e-3, (
        "the golden sums are fused multiply-adds, which seldom move a value across a rounding edge"
    )
    np.testing.assert_allclose(
        np.asarray(y, np.float32), g["out/y_bf16_plus_bias"], rtol=2**-7, atol=2**-7
    )
    assert_close(kernel_product(reference_quantize(x), weight), g["out/y_f32"], "int8_y")


@pytest.mark.slow
def test_cuda_kernels_of_the_publishers(golden):
    g = golden("int8_linear_cuda")
    x, weight = (
        put(g["x"], jnp.bfloat16),
        QTensor(put(g["wq"], jnp.int8), put(g["ws"])),
    )
    q = kernel_quantize(x)
    same(q.scale, put(g["xs"]), "scales of x")
    assert (np.asarray(q.values) != g["xq"]).sum() <= 1, (
        "their quotient is computed by fast division"
    )
    np.testing.assert_allclose(
        np.asarray(kernel_linear(x, weight), np.float32), g["y"], rtol=2**-7, atol=1e-2
    )


@pytest.mark.slow
@pytest.mark.parametrize(("m", "n"), [(1, 1), (128, 256), (184, 130), (248, 129)])
def test_product_equals_the_reference(m, n):
    """The same operations in the same order; a bias is rounded to the dtype of x, and added with a
    second rounding."""
    x, w, bias = (
        put(normal(0, m, 256), jnp.bfloat16),
        reference_quantize(normal(1, n, 256)),
        normal(2, n),
    )
    same(kernel_linear(x, w, bias), reference_linear(x, w, bias), f"{m} x {n}")


def test_partial_sums_are_exact_integers():
    values = np.random.default_rng(0).integers(-128, 128, size=(2, 130, 256)).astype(np.int8)
    values[:, 0, :128] = -128  # the largest sum of a block, 2^21
    ones = jnp.ones((2, 2))
    y = kernel_product(QTensor(put(values[0]), ones), QTensor(put(values[1]), ones))
    np.testing.assert_array_equal(y, values[0].astype(np.int64) @ values[1].astype(np.int64).T)


@pytest.mark.slow
def test_a_tile_with_a_nan_is_not_finite_and_others_are():
    x = normal(0, 130, 256)
    x[3, 5], x[129, 200] = np.nan, np.inf
    q = kernel_quantize(x)
    assert (np.isfinite(q.scale) == [[False, True], [True, False]]).all()
    w = reference_quantize(normal(1, 4, 256))
    assert not np.isfinite(kernel_linear(x, w)).any()
    x[129, 200] = 1
    assert (
        np.isfinite(kernel_linear(x, w)[128:]).all()
        and not np.isfinite(kernel_linear(x, w)[:128]).any()
    )


@pytest.mark.parametrize("grid", [(1, 1), (8, 3), (19, 5), (3, 7)])
def test_every_tile_has_one_program(grid):
    rows, columns = swizzled(np.arange(grid[0] * grid[1]), grid)
    assert sorted(zip(rows.tolist(), columns.tolist(), strict=True)) == [
        (i, j) for i in range(grid[0]) for j in range(grid[1])
    ]
    assert (np.asarray(columns[: min(8, grid[0])]) == 0).all(), (
        "neighbouring programs share the weight"
    )


@pytest.mark.slow
def test_concatenated_weights_give_concatenated_outputs():
    x = quantize_activations(normal(0, 10, 128), "block128")
    weights = [reference_quantize(normal(n, n, 128)) for n in (128, 7)]
    joined = QTensor(*(jnp.concatenate(parts) for parts in zip(*weights, strict=True)))
    same(
        kernel_product(x, joined),
        jnp.concatenate([kernel_product(x, w) for w in weights], 1),
        "n in whole tiles but the last",
    )
