"""The moving average against its closed forms."""

import jax.numpy as jnp
import numpy as np
import pytest
from arrays import put

from tdjax.train.configs import EMAConfig
from tdjax.train.ema import ema_update, exponent


def averaged(config, values):
    """EMA of weights that take these values, starting from another one."""
    ema = {"w": jnp.float32(7.0)}
    for n, value in enumerate(values):
        ema = ema_update(ema, {"w": put(value, jnp.bfloat16)}, jnp.int32(n), config)
    return ema["w"]


def test_power_average_in_closed_form():
    """Weights of value n at update n: the average is sum n ((n+1)^(g+1) - n^(g+1)) / N^(g+1); the
    first update forgets the start."""
    config, count = EMAConfig(width=0.1), 200
    power = exponent(config.width) + 1
    n = np.arange(count, dtype=np.float64)
    expected = (n * ((n + 1) ** power - n**power)).sum() / count**power
    got = averaged(config, n)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_exponents_have_their_widths():
    """The width is the standard deviation of t^g on [0, 1]: (g+1)^(1/2) (g+2)^-1 (g+3)^(-1/2)."""
    for width in (0.05, 0.1, 0.2, 0.27):
        g = exponent(width)
        np.testing.assert_allclose(np.sqrt((g + 1) / (g + 3)) / (g + 2), width, rtol=1e-9)
        assert g > 0
    np.testing.assert_allclose(exponent(0.05), 16.97, atol=0.01)


def test_constant_average():
    np.testing.assert_allclose(averaged(EMAConfig(decay=0.5), [1.0, 2.0]), 7 / 4 + 1 / 4 + 2 / 2)
    for message, wrong in {"width is 0.3": {"width": 0.3}, "decay is 1.0": {"decay": 1.0}}.items():
        with pytest.raises(ValueError, match=message):
            EMAConfig(**wrong)
