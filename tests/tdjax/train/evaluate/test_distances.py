"""Frechet distances against closed forms; flicker, motion and fidelity on known cases."""

import numpy as np
import pytest

from tdjax.train.evaluate import distances
from tdjax.train.evaluate.distances import Gaussian, frechet, gaussian

rng = np.random.default_rng(0)


def rotation(d):
    return np.linalg.qr(rng.standard_normal((d, d)))[0]


def test_frechet_of_means():
    c = (a := rng.standard_normal((7, 7))) @ a.T
    m = rng.standard_normal(7)
    assert frechet(Gaussian(m, c), Gaussian(m + np.arange(7), c)) == pytest.approx(91, rel=1e-9)
    assert abs(frechet(Gaussian(m, c), Gaussian(m, c))) < 1e-9


def test_frechet_of_covariances_with_common_axes():
    """(sqrt a - sqrt b)^2 summed over the axes."""
    a, b, q = rng.uniform(0.1, 4, 7), rng.uniform(0.1, 4, 7), rotation(7)
    expected = np.square(np.sqrt(a) - np.sqrt(b)).sum()
    assert frechet(*(Gaussian(np.zeros(7), q * x @ q.T) for x in (a, b))) == pytest.approx(
        expected, rel=1e-9
    )


def test_frechet_of_covariances_without_common_axes():
    """In two dimensions tr (A B)^1/2 = sqrt(tr A B + 2 sqrt(det A B))."""
    for _ in range(5):
        a, b = ((x := rng.standard_normal((2, 2))) @ x.T for _ in range(2))
        cross = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a @ b)))
        expected = np.trace(a) + np.trace(b) - 2 * cross
        got = frechet(Gaussian(np.zeros(2), a), Gaussian(np.zeros(2), b))
        assert got == pytest.approx(expected, rel=1e-6) and got == pytest.approx(
            frechet(Gaussian(np.zeros(2), b), Gaussian(np.zeros(2), a))
        )


def test_frechet_of_one_dimension_and_of_singular_covariances():
    assert frechet(
        Gaussian(np.array([1.0]), np.array([[4.0]])), Gaussian(np.array([3.0]), np.array([[9.0]]))
    ) == pytest.approx(5)
    assert frechet(
        Gaussian(np.zeros(3), np.zeros((3, 3))), Gaussian(np.zeros(3), np.eye(3))
    ) == pytest.approx(3)


def test_gaussian_of_samples():
    a = rng.standard_normal((3, 3))
    x = rng.standard_normal((100_000, 3)) @ a.T + [1, 2, 3]
    g = gaussian(x.astype(np.float32))
    assert g.mean.dtype == g.covariance.dtype == np.float64
    assert frechet(g, Gaussian(np.array([1.0, 2, 3]), a @ a.T)) < 1e-3  # about d^2 / n
    assert gaussian(x[:, :1]).covariance.shape == (1, 1)
    with pytest.raises(ValueError, match="at least 2 rows"):
        gaussian(x[:1])


def test_fidelity():
    a = rng.uniform(-0.8, 0.8, (3, 5, 4, 4, 3)).astype(np.float32)
    assert distances.psnr(a + np.float32(0.1), a) == pytest.approx(
        10 * np.log10(4 / 0.01), abs=1e-4
    )
    both = a + np.float32([0.1, 0.01, 0.1]).reshape(3, 1, 1, 1, 1)
    assert distances.psnr(both, a) == pytest.approx(
        (2 * 26.0206 + 46.0206) / 3, abs=1e-3
    )  # a mean over clips, not over pixels
    assert distances.psnr(a, a) == np.inf
    assert (
        distances.psnr(np.full_like(a, 3), np.full_like(a, 1)) == np.inf
    )  # outside [-1, 1] there is nothing to see


def test_flicker_and_motion():
    """A still picture, grain on it, and a ramp that moves by eight pixels in four frames."""
    still = np.repeat(rng.integers(0, 256, (1, 33, 40, 3), np.uint8), 9, 0)
    assert distances.flicker(still) == 1 and distances.motion(still) == 0
    grain = rng.integers(100, 121, (9, 32, 40, 3)).astype(np.uint8)
    # of two draws from 21 values in a row, the mean difference is (21^2 - 1) / (3 * 21)
    assert distances.flicker(grain) == pytest.approx(1 - 440 / 63 / 255, abs=1e-3)
    # of means of 64 of them sqrt(2 / pi) times the deviation, sqrt(2 (21^2 - 1) / 12) / 8
    assert distances.motion(grain) == pytest.approx(0.8543 / 255, rel=0.05)
    ramp = np.arange(40)[None, :] + 2 * np.arange(9)[:, None]
    ramp = np.broadcast_to(ramp[:, None, :, None], (9, 16, 40, 3)).astype(np.uint8)
    assert distances.motion(ramp) == pytest.approx(8 / 255)
    assert distances.flicker(ramp) == pytest.approx(1 - 2 / 255)
    assert distances.motion(ramp[:2]) == pytest.approx(2 / 255)


def test_structural_similarity():
    """At one place against the formula with a window written out; 1 of a clip and itself."""
    a, b = (rng.integers(0, 256, (1, 11, 11, 3)).astype(np.uint8) for _ in range(2))
    w = np.exp(-(np.arange(-5, 6) ** 2) / 4.5)
    w = np.outer(w, w) / np.outer(w, w).sum()
    x, y = ((v[0] * [0.299, 0.587, 0.114]).sum(-1) for v in (a, b))
    mx, my = (w * x).sum(), (w * y).sum()
    vx, vy = (w * (x - mx) ** 2).sum(), (w * (y - my) ** 2).sum()
    both = (w * (x - mx) * (y - my)).sum()
    c1, c2 = 2.55**2, 7.65**2
    wanted = (2 * mx * my + c1) * (2 * both + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    assert distances.ssim(a, b) == pytest.approx(wanted, rel=1e-9)
    clip = rng.integers(0, 256, (3, 20, 16, 3)).astype(np.uint8)
    assert distances.ssim(clip, clip) == pytest.approx(1)


def test_features_of_latents():
    z = rng.normal(size=(3, 4, 5, 2)).astype(np.float32)
    rows = distances.latent_features(z).reshape(2, 4, 4, 3, 2)
    np.testing.assert_array_equal(rows[1, 2, 3, 0], z[1, 2, 3])
    np.testing.assert_array_equal(rows[1, 2, 3, 1], z[1, 2, 4] - z[1, 2, 3])
    np.testing.assert_array_equal(rows[1, 2, 3, 2], z[2, 2, 3] - z[1, 2, 3])
    assert distances.latent_features(z[:1]).shape == (16, 6)
