"""The autoencoder's loss, and the statistics of its latents."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_cases
import train_cases
from jax.sharding import PartitionSpec
from tolerances import assert_close

from tdjax.train.tiny import settings
from tdjax.train.tiny.stages import vae

pytestmark = pytest.mark.slow

# Of two levels, half as large in space and time: half of the program.
LEVELS = dataclasses.replace(tiny_cases.SMALL_VAE, multipliers=(1, 1), temporal_down=(True,))
LATENTS = (1, 2, 4, 4, 2)  # of three frames of 8 x 8
LEVEL = dataclasses.replace(tiny_cases.SMALL_VAE, multipliers=(1,), temporal_down=())


@pytest.fixture(scope="module")
def seen():
    """What one program says of a small network and a short clip: the loss with and without noise,
    and what it is made of."""
    cfg, model = settings.VAEStage(), tiny_cases.vae(LEVELS)
    video = np.random.default_rng(1).uniform(-1, 1, (1, 3, 8, 8, 3)).astype(np.float32)
    zeros = dict.fromkeys(("latent", "jitter"), np.zeros(LATENTS, np.float32))
    ones = zeros | {"jitter": np.ones(LATENTS, np.float32)}

    def all_of(model):
        total, parts = vae.loss(model, video, zeros, jnp.float32(0), cfg)
        noisy, _ = vae.loss(model, video, ones, jnp.float32(0.5), cfg)
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
    assert seen["mean"].shape == seen["log_variance"].shape == LATENTS
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


def test_devices_have_the_gradient_of_their_clips():
    """The mean of those of each clip alone, of a network of one level. One batch on one device has
    it to 3e-4, as it has its own where the last bit of the clips is another."""
    model, rng = tiny_cases.vae(LEVEL), np.random.default_rng(1)
    video = rng.uniform(-1, 1, (2, 3, 4, 6, 3)).astype(np.float32)
    draws = {"latent": rng.normal(size=(2, 3, 4, 6, 2)).astype(np.float32)}
    draws |= {"jitter": np.zeros_like(draws["latent"])}
    run = lambda mesh: tiny_cases.jit(vae.gradient(settings.VAEStage(), mesh))
    share = lambda x, i: jax.tree.map(lambda leaf: leaf[i : i + 1], x)
    alone, zero = run(None), np.float32(0)
    each = [jax.device_get(alone(model, video[i : i + 1], share(draws, i), zero)) for i in range(2)]
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *each)
    two = jax.device_get(run(train_cases.mesh(data=2))(model, video, draws, zero))
    for a, b in zip(*map(jax.tree.leaves, (mean, two)), strict=True):
        scale = np.abs(a).max() + np.float32(1e-12)
        assert_close(b / scale, a / scale, "float32")


def test_a_deviation_is_over_the_clips_of_all_devices():
    mesh, latents = (
        train_cases.mesh(data=2),
        5 + jax.random.normal(jax.random.key(0), (4, 2, 3, 3, 2)),
    )
    lies = {"in_specs": PartitionSpec("data"), "out_specs": PartitionSpec(), "check_vma": False}
    divided = jax.shard_map(lambda x: vae.deviation(x, ("data",)), mesh=mesh, **lies)
    assert_close(jax.jit(divided)(latents), np.std(latents, (0, 1, 2, 3)), "float32")
    assert_close(vae.deviation(latents), np.std(latents, (0, 1, 2, 3)), "float32")


def test_deviations_are_not_below_a_share_of_the_largest(monkeypatch):
    sums = lambda model, key, n: (
        np.float32([8.0, 4.0]) * n,
        np.float32([20.0, 4.0]) * n,
        4 * n,
    )  # mean 2, 1; variance 1, 0
    monkeypatch.setattr(vae, "moments", sums)
    mean, std = vae.statistics(None, jax.random.key(0), 100)
    assert mean == (2.0, 1.0) and std == (1.0, vae.LEAST_DEVIATION)
