"""Distances between sets of clips, diversity over seeds, and fidelity to a parent. Statistics are
float64 on the host."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, reduce
from jax import lax

from tdjax.train.tiny.data import clips
from tdjax.train.tiny.data.factors import Attributes

POOL, EVERY, COMPONENTS = 8, 4, 64  # pooled pixels are means of 8x8 in every 4th frame
RANDOM_WIDTHS, RANDOM_SEED = (
    (32, 128),
    20240,
)  # channels of the random network; its features are means and deviations: 256
AT_ONCE = 16  # clips in the random network together
PLACES = 1024  # free positions drawn for each prompt, for their true deviation


# -- Frechet distances -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """Mean f64[d] and covariance f64[d d] of a set of features."""

    mean: np.ndarray
    covariance: np.ndarray


def gaussian(features) -> Gaussian:  # [n d], n at least 2
    x = np.asarray(features, np.float64)
    if x.ndim != 2 or len(x) < 2:
        raise ValueError(
            f"features have shape {x.shape}; a Gaussian needs [n d] with at least 2 rows"
        )
    return Gaussian(x.mean(0), np.cov(x, rowvar=False).reshape(x.shape[1], x.shape[1]))


def frechet(a: Gaussian, b: Gaussian) -> float:
    """|m_a - m_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2): the squared 2-Wasserstein distance of two
    Gaussians."""
    root = square_root(a.covariance)
    cross = np.linalg.eigvalsh(root @ b.covariance @ root)
    shift = np.square(a.mean - b.mean).sum()
    return float(
        shift
        + np.trace(a.covariance)
        + np.trace(b.covariance)
        - 2 * np.sqrt(np.maximum(cross, 0)).sum()
    )


def square_root(matrix: np.ndarray) -> np.ndarray:
    """Of a symmetric matrix without negative eigenvalues, but for rounding."""
    values, vectors = np.linalg.eigh(matrix)
    return vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T


@dataclasses.dataclass(frozen=True)
class Basis:
    """Principal components of real clips: mean f64[d] and directions f64[d COMPONENTS], the largest
    first."""

    mean: np.ndarray
    directions: np.ndarray

    def __call__(self, features) -> np.ndarray:  # [n d] -> f64[n COMPONENTS]
        return (np.asarray(features, np.float64) - self.mean) @ self.directions


def principal(features, components: int = COMPONENTS) -> Basis:  # [n d]
    whole = gaussian(features)
    _, vectors = np.linalg.eigh(whole.covariance)
    return Basis(whole.mean, vectors[:, ::-1][:, :components])


@jax.jit
def pooled_pixels(videos):  # f32[b t h w 3] in [-1, 1] -> f32[b d]; d = 1728 at 33 frames of 64x64
    x = jnp.clip(videos[:, ::EVERY], -1, 1)
    return rearrange(
        reduce(x, "b t (h m) (w n) c -> b t h w c", "mean", m=POOL, n=POOL),
        "b t h w c -> b (t h w c)",
    )


@jax.jit
def random_features(videos):  # f32[b t h w 3] in [-1, 1] -> f32[b 256]
    """Mean and deviation over all places of the last layer of a fixed random network: two 3x3x3
    convolutions of stride 2, ReLU."""
    return lax.map(
        lambda video: random_network(jnp.clip(video, -1, 1)[None])[0], videos, batch_size=AT_ONCE
    )


def random_network(x):  # [b t h w c] -> [b 256]
    rng, inputs = np.random.default_rng(RANDOM_SEED), x.shape[-1]
    for width in RANDOM_WIDTHS:
        kernel = jnp.asarray(
            rng.normal(0, math.sqrt(2 / (27 * inputs)), (3, 3, 3, inputs, width)), x.dtype
        )
        x = lax.conv_general_dilated(
            x,
            kernel,
            (2, 2, 2),
            "SAME",
            dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
            precision=lax.Precision.HIGHEST,
        )
        x, inputs = jax.nn.relu(x), width
    return jnp.concatenate([x.mean((1, 2, 3)), x.std((1, 2, 3))], -1)


# -- diversity, fidelity ---------------------------------------------------------------------------


def diversity(start, said: Attributes, key) -> float:
    """Deviation over seeds of the two free positions, as a share of that of true clips of the same
    captions: 1 is right.

    start: f32[prompts seeds 2], the measured place of the object in frame 0, NaN where there was
           none. said: one row a prompt.
    Mean over prompts and x, y of the ratios of deviations; prompts with fewer than two objects
    count as 0.
    """
    start = np.asarray(start, np.float64)
    true = np.asarray(true_deviation(said, key), np.float64)
    enough = np.sum(~np.isnan(start[..., 0]), 1) >= 2
    ratio = np.zeros((len(start), 2))
    ratio[enough] = np.nanstd(start[enough], axis=1, ddof=1) / true[enough]
    return float(ratio.mean())


@jax.jit
def true_deviation(said: Attributes, key):  # -> f32[prompts 2]
    """Deviation of the start positions (x, y) that each row's captioned attributes leave free."""
    one = lambda row, key: clips.place(
        key, jax.tree.map(lambda i: jnp.full(PLACES, i), row)
    ).start.std(0)
    return jax.vmap(one)(said, jax.random.split(key, said.motion.shape[0]))


def psnr(videos, parents) -> float:  # [b t h w 3] x2 in [-1, 1]
    """Mean over clips of the peak signal-to-noise ratio in dB; infinite for equal clips."""
    a, b = (np.clip(np.asarray(x, np.float64), -1, 1) for x in (videos, parents))
    with np.errstate(divide="ignore"):
        return float(np.mean(10 * np.log10(4 / np.square(a - b).mean((1, 2, 3, 4)))))


def latent_rmse(latents, parents) -> float:  # [b t h w c] x2
    """Root mean square difference of normalised latents, over everything."""
    return float(
        np.sqrt(
            np.mean(np.square(np.asarray(latents, np.float64) - np.asarray(parents, np.float64)))
        )
    )
