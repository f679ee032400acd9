import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import put
from tolerances import assert_close

from pallas_kernels import linear_branch

summaries = jax.jit(lambda k, v: linear_branch.summaries(k, v, interpret=True))


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def expected(k, v):
    """float64 sums over phi rounded to the input dtype."""
    phi = np.asarray(linear_branch.feature(k), np.float64)
    return np.einsum("blhi,blhj->bhij", phi, np.asarray(v, np.float64)), phi.sum(1)


@pytest.mark.parametrize("tail", [0, 1, 56])
def test_sums_over_all_keys(tail):
    k, v = (put(normal(seed, 2, 256 + tail, 2, 16), jnp.float32) for seed in range(2))
    product, total = summaries(k, v)
    assert product.dtype == total.dtype == jnp.float32
    assert_close(product, expected(k, v)[0], "float32", "phi(k)^T v")
    assert_close(total, expected(k, v)[1], "float32", "sum of phi(k)")


@pytest.mark.slow
@pytest.mark.parametrize("programs, l", [(4, 330), (512, 3)])
def test_any_number_of_chunks(monkeypatch, programs, l):
    """Programs of several products each, the last of them short, and more programs than keys."""
    monkeypatch.setattr(linear_branch, "PROGRAMS", programs)
    k, v = (put(normal(seed, 1, l, 2, 32) * 3, jnp.float32) for seed in range(2))
    for ours, theirs in zip(
        jax.jit(lambda *kv: linear_branch.summaries(*kv, interpret=True))(k, v),
        expected(k, v),
        strict=True,
    ):
        assert_close(ours, theirs, "float32")


@pytest.mark.slow
def test_bfloat16():
    """Features are rounded as in the reference, up to the last bit of the few whose exponential
    rounds otherwise."""
    k, v = (put(normal(seed, 1, 300, 2, 32) * 2, jnp.bfloat16) for seed in range(2))
    for ours, theirs in zip(summaries(k, v), expected(k, v), strict=True):
        assert_close(ours, theirs, "bf16")


def test_large_keys_do_not_overflow():
    k, v = (
        put(1e4 * normal(0, 1, 70, 1, 16), jnp.float32),
        put(normal(1, 1, 70, 1, 16), jnp.float32),
    )
    product, total = summaries(k, v)
    assert_close(total.sum(), 70.0, "float32", "features of a token add up to one")
    assert np.isfinite(np.asarray(product)).all()
