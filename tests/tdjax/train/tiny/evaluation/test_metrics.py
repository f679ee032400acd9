"""Features against other implementations, diversity on known cases."""

import dataclasses

import jax
import numpy as np
import pytest
from tolerances import assert_close

from tdjax.media.scenes import clips
from tdjax.media.scenes.factors import STILL, UNSAID
from tdjax.train.evaluate.distances import frechet, gaussian
from tdjax.train.tiny.evaluation import metrics

rng = np.random.default_rng(0)


def rotation(d):
    return np.linalg.qr(rng.standard_normal((d, d)))[0]


def test_principal_components():
    scales, q = np.array([5.0, 3, 2, 0.1, 0.1, 0.1]), rotation(6)
    x = rng.standard_normal((5000, 6)) * scales @ q.T + 7
    y = metrics.principal(x, 3)(x)
    assert np.abs(y.mean(0)).max() < 1e-9
    assert np.abs(y.std(0) / scales[:3] - 1).max() < 0.04
    assert np.abs(np.corrcoef(y.T) - np.eye(3)).max() < 1e-9


@pytest.fixture(scope="module")
def real():
    """Two sets of 32 true clips."""
    sets = [clips.sample(jax.random.key(k), 32, "all") for k in (1, 2)]
    return [np.array(clips.draw(f.said, clips.track(f))) for f in sets]


def test_pooled_pixels(real):
    video = real[0][:2]
    expected = video[:, ::4].reshape(2, 9, 8, 8, 8, 8, 3).mean((3, 5)).reshape(2, -1)
    assert expected.shape == (2, 1728)
    assert_close(metrics.pooled_pixels(video), expected, "float32")


def test_random_features_against_torch(real):
    torch = pytest.importorskip("torch")
    x, draws, inputs = (
        torch.from_numpy(real[0][:3]).permute(0, 4, 1, 2, 3),
        np.random.default_rng(metrics.RANDOM_SEED),
        3,
    )
    for width in metrics.RANDOM_WIDTHS:
        kernel = draws.normal(0, (2 / (27 * inputs)) ** 0.5, (3, 3, 3, inputs, width)).astype(
            np.float32
        )
        padding = [p for n in reversed(x.shape[2:]) for p in ((0, 1) if n % 2 == 0 else (1, 1))]
        x = torch.nn.functional.pad(x, padding)
        x = torch.relu(
            torch.nn.functional.conv3d(x, torch.from_numpy(kernel).permute(4, 3, 0, 1, 2), stride=2)
        )
        inputs = width
    expected = torch.cat([x.mean((2, 3, 4)), x.std((2, 3, 4), correction=0)], 1)
    assert expected.shape == (3, 256)
    assert_close(metrics.random_features(real[0][:3]), expected.numpy(), "float32")


@pytest.mark.slow
def test_distances_of_clips(real):
    """Two sets of true clips are near, one in inverted colours is far. Measured 11 and 356, 2.2 and
    53."""
    sets = [*real, -real[1]]
    pooled = [metrics.pooled_pixels(x)[:, ::4] for x in sets]  # a quarter, for time
    basis = metrics.principal(pooled[0], 16)
    for features in ([basis(x) for x in pooled], [metrics.random_features(x[:6]) for x in sets]):
        near, far = (frechet(gaussian(features[0]), gaussian(x)) for x in features[1:])
        assert 0 < 8 * near < far


# -- diversity, fidelity ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seeds():
    """32 prompts and the true starts of 256 clips of each."""
    said = clips.sample(jax.random.key(1), 32, "all").said
    start = jax.jit(jax.vmap(lambda key: clips.place(key, said).start))(
        jax.random.split(jax.random.key(2), 256)
    )
    return said, np.asarray(start).transpose(1, 0, 2)


def test_diversity_of_true_clips_is_one(seeds):
    said, start = seeds
    assert metrics.diversity(start, said, jax.random.key(3)) == pytest.approx(1, abs=0.02)
    assert metrics.diversity(start[:, :32], said, jax.random.key(3)) == pytest.approx(1, abs=0.04)


def test_diversity_of_collapsed_clips(seeds):
    said, start = seeds
    whole = metrics.diversity(start, said, jax.random.key(3))
    assert metrics.diversity(start[:, :1].repeat(32, 1), said, jax.random.key(3)) == 0
    mean = start.mean(1, keepdims=True)
    assert metrics.diversity(mean + (start - mean) / 2, said, jax.random.key(3)) == pytest.approx(
        whole / 2, rel=1e-3
    )
    half = np.where(
        np.arange(32)[:, None, None] % 2, start, start[:, :1]
    )  # every other prompt has collapsed
    assert metrics.diversity(half, said, jax.random.key(3)) == pytest.approx(0.5, abs=0.03)


def test_missing_objects_lower_diversity(seeds):
    said, start = seeds
    some, none = start.copy(), start.copy()
    some[:, ::2], none[:16, 1:] = np.nan, np.nan
    assert metrics.diversity(some, said, jax.random.key(3)) == pytest.approx(1, abs=0.03)
    assert metrics.diversity(none, said, jax.random.key(3)) == pytest.approx(0.5, abs=0.02)


def test_true_deviation_is_that_of_a_uniform_position(seeds):
    said, _ = seeds
    zeros = jax.tree.map(lambda i: np.zeros(1, np.int32), said)
    still = dataclasses.replace(
        zeros, motion=np.full(1, STILL, np.int32), speed=np.full(1, UNSAID, np.int32)
    )
    width = 64 - 2 * (7 + clips.MARGIN)
    found = np.asarray(metrics.true_deviation(still, jax.random.key(0)))
    assert np.abs(found / (width / 12**0.5) - 1).max() < 0.06
