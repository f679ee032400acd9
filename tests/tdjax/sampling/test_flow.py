"""The algebra of time against float64 numpy written from the definitions."""

import jax
import jax.numpy as jnp
import numpy as np
from arrays import put
from tolerances import assert_close

from tdjax.sampling import flow

U = np.array([1e-6, 0.01, 0.3, 0.5, 0.6089, 0.9, 0.98765, 0.9998])


def trig(u):
    """(sin t, cos t) of a rectified-flow time by way of arctan, in float64."""
    t = np.arctan(u / (1 - u))
    return np.sin(t), np.cos(t)


def fields(shape=(2, 3, 2, 5, 7)):
    rng = np.random.default_rng(3)
    return rng.standard_normal(shape), rng.standard_normal(shape)


def test_coefficients_are_the_sine_and_cosine_of_the_trig_time():
    c = flow.from_u(put(U, jnp.float32))
    sin, cos = trig(U)
    for got, expected in zip(c, (U, 1 - U, 1 / (sin + cos), sin, cos), strict=True):
        assert_close(got, expected, "float32")


def test_coefficients_from_log_sigma_keep_small_data_weights():
    s = np.array([-20.0, -3.0, 0.0, 4.0, 15.0, 20.0])
    c = flow.from_log_sigma(put(s, jnp.float32))
    exact = 1 / (1 + np.exp(s))
    assert (
        np.abs(np.asarray(c.a, np.float64) / exact - 1).max() < 1e-5
    )  # relative, down to 2e-9; from u it would be 0


def test_both_ends_are_finite():
    c = flow.from_log_sigma(put([-jnp.inf, jnp.inf], jnp.float32))
    np.testing.assert_array_equal(
        np.asarray(c), np.array([[0, 1], [1, 0], [1, 1], [0, 1], [1, 0]], np.float32)
    )
    np.testing.assert_array_equal(
        np.asarray(flow.from_u(put([0.0, 1.0], jnp.float32))), np.asarray(c)
    )


def test_predictions_agree_with_their_definitions():
    x0, eps = fields()
    u = np.array([0.3, 0.98765])
    wide = u[:, None, None, None, None]
    sin, cos = trig(wide)
    c = flow.per_sample(flow.from_u(put(u, jnp.float32)))
    x0_, eps_ = put(x0, jnp.float32), put(eps, jnp.float32)
    x = flow.noisy(x0_, eps_, c)
    assert_close(x, (1 - wide) * x0 + wide * eps, "float32", "x_u")
    assert_close(x / c.b, cos * x0 + sin * eps, "float32", "x_t")
    v = eps_ - x0_
    assert_close(flow.data(x, v, c), x0, "float32", "x0")
    assert_close(flow.noise(x, v, c), eps, "float32", "eps")
    f = flow.trig_from_velocity(x, v, c)
    assert_close(f, cos * eps - sin * x0, "float32", "F")
    assert_close(flow.velocity(x, x0_, c), eps - x0, "float32", "v from x0")


def test_derivatives_along_the_clock():
    """du/ds = u (1-u) for s = log sigma, and d(sin)/du = cos/b^2: the coefficients may be
    differentiated."""
    s = put([-2.0, 0.5, 6.0], jnp.float32)
    c, tangent = jax.jvp(flow.from_log_sigma, (s,), (jnp.ones_like(s),))
    assert_close(tangent.u, c.u * c.a, "float32")
    assert_close(tangent.sin, c.cos / c.b**2 * tangent.u, "float32")


def test_clocks_and_shift():
    sigmas = U / (1 - U)
    assert_close(flow.u_from_sigma(sigmas), U, "float32")
    assert_close(flow.sigma(U), sigmas, "float32")
    np.testing.assert_allclose(flow.u_from_trig(np.arctan(sigmas)), U, rtol=1e-12)
    assert_close(flow.u_from_trig(put(np.arctan(sigmas), jnp.float32)), U, "float32")
    shifted = flow.shift(U, 5.0)
    np.testing.assert_allclose(flow.sigma(shifted), 5 * sigmas, rtol=1e-9)
    np.testing.assert_allclose(flow.unshift(shifted, 5.0), U, rtol=1e-12)


def test_denoiser_scaling_matches_the_official_wrapper(golden):
    """c_skip = c_in = b, c_out = -u, c_noise = 1000 u, and the conversions between clocks."""
    g = golden("train_targets")
    t = g["in/scaling/t_trig"]
    c = flow.from_u(put(flow.u_from_trig(t), jnp.float32))
    assert_close(c.b, g["out/scaling/c_skip"], "float32")
    assert_close(-c.u, g["out/scaling/c_out"], "float32")
    assert_close(flow.TIME_SCALE * c.u, g["out/scaling/c_noise"], "float32")
    np.testing.assert_allclose(flow.u_from_trig(t), g["out/time/trig_to_rf"], rtol=1e-12)
    np.testing.assert_allclose(flow.shift(g["in/time/rf"], 5.0), g["out/time/shift5"], rtol=1e-12)
    np.testing.assert_allclose(
        flow.u_from_trig(g["out/time/rf_to_trig"]), g["in/time/rf"], rtol=1e-12
    )
