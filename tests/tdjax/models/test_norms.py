import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import put
from tolerances import assert_close

from tdjax.models.norms import LayerNorm, RMSNorm, layer_norm, modulate, sinusoid
from tdjax.precision import BF16, FLOAT32

WIDTHS = (80, 128, 1536, 5120)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def norm(cls, d, g, policy=FLOAT32):
    module = cls(d, 1e-6, policy)
    module.scale[...] = put(g[f"w/n{d}/weight"])
    if cls is LayerNorm:
        module.bias[...] = put(g[f"w/n{d}/bias"])
    return module


@pytest.mark.parametrize("d", WIDTHS)
def test_rms_norm(golden, d):
    g = golden("fastnorm")
    assert_close(norm(RMSNorm, d, g)(put(g[f"in/n{d}/x"])), g[f"out/n{d}/fast_rmsnorm"], "fastnorm")


@pytest.mark.parametrize("d", WIDTHS)
def test_layer_norm_is_a_true_one(golden, d):
    """The published kernel counts its padding columns as zeros in the variance; adding that term to
    ours gives its numbers."""
    g = golden("fastnorm")
    x = put(g[f"in/n{d}/x"])
    assert_close(layer_norm(x, 1e-6), g[f"ref/n{d}/true_layernorm_noaffine"], "fastnorm")
    padding = 2 ** int(np.ceil(np.log2(d))) / d - 1
    mean, var = (
        np.asarray(x, np.float64).mean(-1, keepdims=True),
        np.asarray(x, np.float64).var(-1, keepdims=True),
    )
    ratio = np.sqrt((var + 1e-6) / (var + padding * mean**2 + 1e-6))
    assert_close(layer_norm(x, 1e-6) * ratio, g[f"out/n{d}/fast_layernorm_noaffine"], "fastnorm")
    module = norm(LayerNorm, d, g)
    scaled = (module(x) - module.bias[...]) * ratio + module.bias[...]
    assert_close(scaled, g[f"out/n{d}/fast_layernorm_affine"], "fastnorm")
    assert d == 128 or np.abs(ratio - 1).max() > 0.03


def test_norms_round_once():
    """bfloat16 in and out: the float32 result, rounded at the end and nowhere before."""
    x = put(3 + normal(0, 2, 5, 48), jnp.bfloat16)
    scale, shift = normal(1, 2, 2, 1, 48)
    y = modulate(x, scale, shift, 1e-6)
    full = layer_norm(x.astype(jnp.float32), 1e-6) * (1 + scale) + shift
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        np.asarray(y, np.float32), np.asarray(full.astype(jnp.bfloat16), np.float32)
    )
    for cls in (RMSNorm, LayerNorm):
        assert cls(48, 1e-6, BF16)(x).dtype == jnp.bfloat16


@pytest.mark.parametrize("width", [64, 256])
def test_sinusoid_in_float32_is_that_of_float64(width):
    t = np.concatenate(
        [np.linspace(0, 1000, 4001), np.random.default_rng(0).uniform(0, 1000, 4000), [999.99994]]
    ).astype(np.float32)
    angle = t[:, None].astype(np.float64) * 10000.0 ** (-np.arange(width // 2) / (width // 2))
    actual = np.asarray(jax.jit(sinusoid, static_argnums=1)(t, width), np.float64)
    assert np.abs(actual - np.concatenate([np.cos(angle), np.sin(angle)], -1)).max() < 1e-6


def test_sinusoid_has_the_right_derivative():
    t = put([0.25, 1.0, 998.7, 73.0])
    frequency = 10000.0 ** (-np.arange(32) / 32)
    _, actual = jax.jvp(lambda t: sinusoid(t, 64), (t,), (jnp.full(4, 2.0),))
    angle = np.asarray(t, np.float64)[:, None] * frequency
    assert_close(
        actual,
        2 * np.concatenate([-frequency * np.sin(angle), frequency * np.cos(angle)], -1),
        "float32",
    )
