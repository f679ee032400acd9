"""Training times have their distributions."""

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
