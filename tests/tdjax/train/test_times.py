"""Training times have their distributions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tdjax.sampling import flow
from tdjax.train import times
from tdjax.train.configs import LogNormal, UniformShift


@pytest.mark.slow
def test_times_have_their_distributions(key):
    """Quantiles of 100,000 draws; the standard error of the median is 0.003."""
    levels = np.array([0.1, 0.5, 0.9])
    s = times.draw(UniformShift(shift=5.0), key, (100_000,))
    assert s.dtype == jnp.float32 and np.isfinite(s).all()
    np.testing.assert_allclose(
        np.quantile(flow.from_log_sigma(s).u, levels), flow.shift(levels, 5.0), atol=0.01
    )
    s = times.draw(LogNormal(mean=0.7, deviation=1.6), key, (100_000,))
    assert s.dtype == jnp.float32
    np.testing.assert_allclose(
        np.quantile(s, levels), 0.7 + 1.6 * np.array([-1.28155, 0, 1.28155]), atol=0.03
    )
    for wrong in (
        lambda: UniformShift(shift=0.0),
        lambda: LogNormal(deviation=0.0),
        lambda: LogNormal(mean=np.nan),
    ):
        with pytest.raises(ValueError, match="positive"):
            wrong()


@pytest.mark.parametrize("time", [UniformShift(shift=5.0), LogNormal(mean=0.7, deviation=1.6)])
@pytest.mark.parametrize("between", [(0.9, 1.0), (0.0, 0.875), (0.3, 0.4)])
def test_times_of_an_expert_are_those_of_all_that_lie_inside(key, time, between):
    """Quantiles of 20,000 draws against those that remain of 400,000."""
    u = np.asarray(flow.from_log_sigma(times.draw(time, key, (400_000,))).u)
    wanted = u[(u >= between[0]) & (u <= between[1])]
    s = times.draw(time, jax.random.key(1), (20_000,), between)
    assert s.dtype == jnp.float32 and np.isfinite(s).all()
    got = np.asarray(flow.from_log_sigma(s).u)
    assert got.min() >= between[0] - 1e-6 and got.max() <= between[1] + 1e-6
    levels = np.array([0.05, 0.25, 0.5, 0.75, 0.95])
    span = np.ptp(wanted)
    np.testing.assert_allclose(
        np.quantile(got, levels), np.quantile(wanted, levels), atol=0.02 * span
    )
