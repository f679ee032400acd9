import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import put
from flax import nnx
from tolerances import assert_close

from pallas_kernels.int8_matmul import SCHEMES, dequantize, quantize_weight
from pallas_kernels.quantized import QTensor
from tdjax import config
from tdjax.models.linear import LINEAR, FP8Linear, Int8Linear, Linear, converted
from tdjax.models.norms import layer_norm
from tdjax.precision import BF16, FLOAT32


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_linear_computes_in_the_dtype_of_its_input():
    layer = Linear(7, 5, BF16, rngs=nnx.Rngs(0))
    assert layer.kernel[...].shape == (7, 5) and layer.kernel[...].dtype == jnp.bfloat16
    layer.bias[...] = jnp.arange(5, dtype=jnp.bfloat16)
    x = normal(0, 2, 3, 7)
    y, low = layer(x), layer(put(x, jnp.bfloat16))
    assert y.dtype == jnp.float32 and low.dtype == jnp.bfloat16
    expected = np.asarray(x, np.float64) @ np.asarray(layer.kernel[...], np.float64) + np.arange(5)
    assert_close(y, expected, "float32")
    assert_close(low, expected, "bf16")


def test_linear_without_bias():
    layer = Linear(7, 5, FLOAT32, rngs=nnx.Rngs(0), bias=False)
    assert len(jax.tree.leaves(layer)) == 1
    assert not layer(jnp.zeros((1, 7))).any()


def stacked(kind, i, o, n=2):
    """n layers of a kind, leaves [n ...], whose weights are those of random float layers; and the
    float kernels."""
    kernel = put(normal(1, n, i, o)) / i**0.5
    layer = jax.vmap(lambda key: LINEAR[kind](i, o, FLOAT32, rngs=nnx.Rngs(key), impl="reference"))(
        jax.random.split(jax.random.key(0), n)
    )
    made = converted((kernel,), old="float", new=kind, dtype=jnp.dtype("float32"))
    for name, leaf in zip(LINEAR[kind].leaves, made, strict=True):
        assert (
            getattr(layer, name)[...].shape == leaf.shape
            and getattr(layer, name)[...].dtype == leaf.dtype
        )
        getattr(layer, name)[...] = leaf
    layer.bias[...] = put(normal(2, n, o))
    return layer, kernel


def first(tree):
    return jax.tree.map(lambda leaf: leaf[0], tree)


def relative(actual, expected):
    return np.linalg.norm(np.asarray(actual, np.float64) - expected) / np.linalg.norm(expected)


def test_the_table_has_every_kind_of_the_config():
    assert tuple(LINEAR) == config.LINEAR


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, bound", [("float", 1e-6), ("int8", 0.015), ("int8_channel", 0.015), ("fp8", 0.04)]
)
def test_distance_from_the_float_product(kind, bound):
    """Gaussian x and weights. int8: 0.9 % from either operand; fp8 has 3 bits of mantissa, 2.6 %
    from either."""
    layer, kernel = stacked(kind, 512, 200)
    x = normal(3, 2, 70, 512)
    y = jax.jit(lambda layer, x: layer(x))(first(layer), x)
    assert y.shape == (2, 70, 200) and y.dtype == jnp.float32
    bias = np.asarray(layer.bias[...])[0]
    assert relative(y - bias, x @ np.asarray(kernel[0], np.float64)) < bound
    low = jax.jit(lambda layer, x: layer(x))(first(layer), put(x, jnp.bfloat16))
    assert low.dtype == jnp.bfloat16


@pytest.mark.slow
def test_published_int8_layer(golden):
    """The golden product through the layer, its activations quantised once for two readers."""
    g = golden("int8_linear")
    layer = Int8Linear(384, 200, BF16, rngs=nnx.Rngs(0))
    layer.int8_weight[...], layer.scale[...] = (
        put(g["out/w_q"]),
        put(g["out/w_scale"]),
    )
    layer.bias[...] = put(g["w/bias"], jnp.bfloat16)
    x = put(g["in/x"], jnp.bfloat16)[None]
    values, scale = jax.jit(lambda layer, x: layer.quantize_input(x)[:2])(layer, x)
    np.testing.assert_array_equal(np.asarray(values[0]), g["out/x_q"])
    np.testing.assert_array_equal(np.asarray(scale), g["out/x_scale"])
    y, shared = jax.jit(lambda layer, x: (layer(x), layer(layer.quantize_input(x))))(layer, x)
    np.testing.assert_array_equal(np.asarray(y), np.asarray(shared))
    y = np.asarray(y[0], np.float32)
    assert (
        y != g["out/y_bf16_plus_bias"]
    ).mean() < 1e-3  # float32 sums in another order may cross a rounding edge, seldom
    np.testing.assert_allclose(y, g["out/y_bf16_plus_bias"], rtol=2**-7, atol=2**-7)


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["reference", "interpret"])
@pytest.mark.parametrize("kind", LINEAR)
def test_what_a_layer_reads(kind, impl):
    """Norm and GELU quantised for the layer give what it would make of their float results itself,
    but for a rounding of 8 bits."""
    layer = first(stacked(kind, 256, 128)[0])
    layer.impl = impl
    x, y, gate = (
        put(normal(seed, *shape))
        for seed, shape in ((3, (2, 9, 256)), (4, (2, 9, 256)), (5, (2, 1, 256)))
    )
    factor, shift = 1 + 0.1 * put(normal(6, 256)), put(normal(7, 2, 1, 256))

    @jax.jit
    def both(layer, x, y):
        options = {"eps": 1e-6, "residual": y, "gate": gate, "impl": impl}
        stream, h = LINEAR[kind].residual_norm(x, factor, shift, **options)
        normed = layer_norm(x + y * gate, 1e-6) * factor + shift
        actual = layer(h), layer(layer.gelu_quantized(x))
        return stream, actual, (layer(normed), layer(jax.nn.gelu(x)))

    stream, actual, expected = both(layer, x, y)
    assert_close(stream, x + y * gate, "float32")
    for a, e in zip(actual, expected, strict=True):
        assert relative(a, np.asarray(e, np.float64)) < (
            1e-5 if kind == "float" else 5e-3
        )  # a step of 8 bits here and there


@pytest.mark.slow
@pytest.mark.parametrize("old", LINEAR)
@pytest.mark.parametrize("new", LINEAR)
def test_every_kind_becomes_every_other(old, new):
    """A conversion moves a weight by no more than the rounding of the new kind: half a step, in
    tiles a whole one at the top."""
    layer, _ = stacked(old, 256, 200)
    leaves = tuple(getattr(layer, name)[...] for name in LINEAR[old].leaves)
    made = converted(leaves, old=old, new=new, dtype=jnp.dtype("float32"))
    floats = lambda kind, leaves: np.stack(
        [LINEAR[kind].unpacked(*(leaf[n] for leaf in leaves)) for n in range(2)]
    )
    before, after = floats(old, leaves), floats(new, made)
    step = {"float": 0, "int8": 1.001 / 128, "int8_channel": 0.501 / 127, "fp8": 1 / 28}[
        new
    ]  # fp8: 16 of 448 at the top
    top = np.abs(before).max((1, 2) if new == "int8" else 2, keepdims=True)
    assert (np.abs(after - before) <= step * top + 1e-7).all()
    if (old, new) == ("int8", "int8_channel"):
        expected = quantize_weight(dequantize(QTensor(leaves[0][1], leaves[1][1])), "channel")
        np.testing.assert_array_equal(np.asarray(made[0][1]), np.asarray(expected.values))
        assert_close(made[1][1], expected.scale, "float32")


@pytest.mark.slow
def test_there_is_no_fp8_kernel_and_the_layer_says_which_product_it_takes():
    assert (
        FP8Linear.products == {"triton": "xla", "interpret": "reference"}
        and "triton" not in SCHEMES["fp8"].products
    )
    with pytest.raises(
        ValueError, match="quantize_activations: impl is 'fast'; allowed: auto, reference"
    ):
        FP8Linear(8, 8, FLOAT32, rngs=nnx.Rngs(0), impl="fast")(jnp.zeros((1, 2, 8)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(LINEAR)[1:])
def test_only_float_layers_can_be_trained(kind):
    layer = LINEAR[kind](128, 128, FLOAT32, rngs=nnx.Rngs(0))
    with pytest.raises(NotImplementedError, match="is forward only"):
        jax.grad(lambda x: layer(x).sum())(jnp.ones((1, 2, 128)))


# -- gradients over devices ------------------------------------------------------------------------


def bare(kernel):
    """A layer of this kernel [i o], without a bias."""
    layer = Linear(*kernel.shape, FLOAT32, rngs=nnx.Rngs(0), bias=False)
    return jax.tree.map(lambda _: kernel, layer)


@pytest.mark.parametrize("axes", [{"data": 4}, {"fsdp": 4}, {"data": 2, "seq": 2}, {"seq": 4}])
def test_a_kernels_gradient_is_summed_over_devices_in_float32(axes):
    """Each device has at most 256 of the 267 that they have together, and bfloat16 has no 267."""
    rows = np.ones((4, 4, 3), np.float32)
    rows[0, 0], rows[1, 0] = 253.0, 0.0
    kernel = normal(0, 3, 5)

    def gradient(kernel):
        return bare(kernel)(put(rows, jnp.bfloat16)).astype(jnp.float32).sum()

    auto = (jax.sharding.AxisType.Auto,) * len(axes)
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=auto)
    with jax.set_mesh(mesh):
        found = jax.jit(jax.grad(gradient))(kernel)
    np.testing.assert_array_equal(found, np.full((3, 5), 253.0 + 14))


@pytest.mark.slow
def test_derivatives_of_a_layer_are_those_of_its_product():
    """In both modes, and one inside the other, towards the input and the kernel."""
    x, dx = normal(0, 2, 3, 7), normal(1, 2, 3, 7)
    kernel, weights = normal(2, 7, 5), normal(3, 2, 3, 5)
    called = lambda kernel, x: jnp.tanh(bare(kernel)(x))
    plain = lambda kernel, x: jnp.tanh(jnp.matmul(x, kernel))

    def loss(f, kernel, x):
        y, dy = jax.jvp(lambda x: f(kernel, x), (x,), (dx,))
        return jnp.sum(weights * y * dy)

    for order in (0, 1):
        found, wanted = (jax.grad(loss, 1 + order)(f, kernel, x) for f in (called, plain))
        assert_close(found, wanted, "float32", f"{order}")
    both = (kernel, x), (kernel * 0.5, dx)
    assert_close(jax.jvp(called, *both)[1], jax.jvp(plain, *both)[1], "float32", "forward")
