"""The autoencoder's loss, and the statistics of its latents."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_cases
from tolerances import assert_close

from tdjax.train.tiny import settings
from tdjax.train.tiny.stages import vae

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def seen():
    """What one program says of a small network and a short clip: the loss with and without noise,
    and what it is made of."""
    cfg, model, video = (
        settings.VAEStage(),
        tiny_cases.vae(),
        jax.random.uniform(jax.random.key(1), (1, 5, 16, 16, 3), minval=-1.0),
    )
    zeros = {name: jnp.zeros((1, 2, 2, 2, 2)) for name in ("latent", "jitter")}

    def all_of(model):
        total, parts = vae.loss(model, video, zeros, jnp.float32(0), cfg)
        noisy, _ = vae.loss(
            model, video, zeros | {"jitter": jnp.ones((1, 2, 2, 2, 2))}, jnp.float32(0.5), cfg
        )
        mean, log_variance = vae.posterior(model, video)
        z = model.encode(video)
        error = model.decode(z) - video
        return {
            "total": total,
            "noisy": noisy,
            "mean": mean,
            "log_variance": log_variance,
            "z": z,
            "error": error,
            "weight": vae.emphasis(video, cfg.drawn),
            **parts,
        }

    return jax.device_get(tiny_cases.jit(all_of)(model))


def test_the_object_weighs_as_much_more_in_every_clip():
    video = -jnp.ones((2, 1, 8, 8, 3)).at[0, 0, 3, 3].set(-2.0).at[1, 0, 2:6, 2:6].set(-2.0)
    weight = np.asarray(vae.emphasis(video, 10.0))
    assert weight.shape == (2, 1, 8, 8, 1)
    assert_close(weight.mean((1, 2, 3, 4)), np.ones(2), "float32")
    for clip, drawn in ((0, (3, 3)), (1, (4, 4))):
        assert_close(weight[clip, 0][drawn], 10 * weight[clip, 0, 0, 0], "float32")


def test_the_mean_of_the_posterior_is_what_the_encoder_gives(seen):
    assert seen["mean"].shape == seen["log_variance"].shape == (1, 2, 2, 2, 2)
    assert_close(seen["mean"], seen["z"], "float32")


def test_the_loss_counts_pixels_differences_and_divergence(seen):
    cfg, distance = (
        settings.VAEStage(),
        lambda e: np.sqrt(e**2 + settings.VAEStage().width ** 2) - settings.VAEStage().width,
    )
    pixels = (seen["weight"] * distance(seen["error"])).mean()
    steps = sum(distance(np.diff(seen["error"], axis=axis)).mean() for axis in (1, 2, 3))
    variance = np.exp(seen["log_variance"])
    kl = 0.5 * (seen["mean"] ** 2 + variance - 1 - seen["log_variance"]).mean()
    assert_close(seen["rmse"], np.sqrt((seen["error"] ** 2).mean()), "float32")
    assert_close(seen["kl"], kl, "float32")
    assert abs(seen["total"] - pixels - cfg.differences * steps - cfg.kl * kl) < 1e-5
    assert seen["noisy"] != seen["total"]


def test_deviations_are_not_below_a_share_of_the_largest(monkeypatch):
    sums = lambda model, key, n: (
        np.float32([8.0, 4.0]) * n,
        np.float32([20.0, 4.0]) * n,
        4 * n,
    )  # mean 2, 1; variance 1, 0
    monkeypatch.setattr(vae, "moments", sums)
    mean, std = vae.statistics(None, jax.random.key(0), 100)
    assert mean == (2.0, 1.0) and std == (1.0, vae.LEAST_DEVIATION)
