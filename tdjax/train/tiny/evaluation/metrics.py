"""Features of clips, for the distances of `tdjax.train.evaluate`, and diversity over seeds.
Statistics are float64 on the host."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, reduce
from jax import lax

from tdjax.media.scenes import clips
from tdjax.media.scenes.factors import Attributes
from tdjax.train.evaluate.distances import gaussian

POOL, EVERY, COMPONENTS = 8, 4, 64  # pooled pixels are means of 8x8 in every 4th frame
# Channels of the random network; its features are means and deviations: 256.
RANDOM_WIDTHS = (32, 128)
RANDOM_SEED = 20240
_AT_ONCE = 16  # clips in the random network together
_PLACES = 1024  # free positions drawn for each prompt, for their true deviation


# -- features --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Basis:
    """Principal components of real clips: mean f64[d] and directions f64[d COMPONENTS], the largest
    first."""

    mean: np.ndarray
    directions: np.ndarray

    def __call__(self, features) -> np.ndarray:  # [n d] -> f64[n COMPONENTS]
        return (np.asarray(features, np.float64) - self.mean) @ self.directions


def principal(features, components: int = COMPONENTS) -> Basis:  # [n d]
    """Returns the directions in which features vary most."""
    whole = gaussian(features)
    _, vectors = np.linalg.eigh(whole.covariance)
    return Basis(whole.mean, vectors[:, ::-1][:, :components])


@jax.jit
def pooled_pixels(videos):  # f32[b t h w 3] in [-1, 1] -> f32[b d]; d = 1728 at 33 frames of 64x64
    """Returns means over squares of every few frames."""
    x = jnp.clip(videos[:, ::EVERY], -1, 1)
    means = reduce(x, "b t (h m) (w n) c -> b t h w c", "mean", m=POOL, n=POOL)
    return rearrange(means, "b t h w c -> b (t h w c)")


@jax.jit
def random_features(videos):  # f32[b t h w 3] in [-1, 1] -> f32[b 256]
    """Returns mean and deviation over all places of the last layer of a fixed random network: two
    3x3x3 convolutions of stride 2, ReLU."""
    one = lambda video: _random_network(jnp.clip(video, -1, 1)[None])[0]
    return lax.map(one, videos, batch_size=_AT_ONCE)


def _random_network(x):  # [b t h w c] -> [b 256]
    rng = np.random.default_rng(RANDOM_SEED)
    inputs = x.shape[-1]
    for width in RANDOM_WIDTHS:
        deviation = math.sqrt(2 / (27 * inputs))
        kernel = jnp.asarray(rng.normal(0, deviation, (3, 3, 3, inputs, width)), x.dtype)
        x = lax.conv_general_dilated(
            x,
            kernel,
            (2, 2, 2),
            "SAME",
            dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
            precision=lax.Precision.HIGHEST,
        )
        x = jax.nn.relu(x)
        inputs = width
    return jnp.concatenate([x.mean((1, 2, 3)), x.std((1, 2, 3))], -1)


# -- diversity -------------------------------------------------------------------------------------


def diversity(start, said: Attributes, key) -> float:
    """Returns the deviation over seeds of the two free positions, as a share of that of true clips
    of the same captions: 1 is right.

    start: f32[prompts seeds 2], the measured place of the object in frame 0, NaN where there was
    none. said: one row a prompt.
    It is the mean over prompts and x, y of the ratios of deviations; prompts with fewer than two
    objects count as 0.
    """
    start = np.asarray(start, np.float64)
    true = np.asarray(true_deviation(said, key), np.float64)
    enough = np.sum(~np.isnan(start[..., 0]), 1) >= 2
    ratio = np.zeros((len(start), 2))
    ratio[enough] = np.nanstd(start[enough], axis=1, ddof=1) / true[enough]
    return float(ratio.mean())


@jax.jit
def true_deviation(said: Attributes, key):  # -> f32[prompts 2]
    """Returns the deviation of the start positions (x, y) that each row's captioned attributes
    leave free."""

    def one(row, key):
        same = jax.tree.map(lambda i: jnp.full(_PLACES, i), row)
        return clips.place(key, same).start.std(0)

    return jax.vmap(one)(said, jax.random.split(key, said.motion.shape[0]))
