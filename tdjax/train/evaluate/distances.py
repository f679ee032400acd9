"""Distances between videos, and between sets of them, that need no other network. Statistics are
float64 on the host.

flicker: Vchitect/VBench vbench/temporal_flickering.py. Structural similarity: Wang et al. 2004,
"Image quality assessment", equation 13, with its constants and window. Frechet distance: Dowson and
Landau 1982.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from einops import rearrange, reduce
from numpy.lib.stride_tricks import sliding_window_view

LATER = 4  # frames: over a quarter of a second at 16 a second
POOL = 8  # pixels of a square whose mean is followed
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
_RANGE = 255.0
_C1, _C2 = (0.01 * _RANGE) ** 2, (0.03 * _RANGE) ** 2
_DEVIATION, _RADIUS = 1.5, 5  # of the window, pixels: 11 wide


# -- of one video ----------------------------------------------------------------------------------


def flicker(frames: np.ndarray) -> float:  # uint8 [t h w 3], two frames or more
    """Returns VBench's score of temporal flickering: 1 where frames that follow each other are
    equal."""
    x = frames.astype(np.float32)
    return float(1 - np.abs(np.diff(x, axis=0)).mean(dtype=np.float64) / _RANGE)


def motion(frames: np.ndarray) -> float:  # uint8 [t h w 3]
    """Returns how much the picture changes in a quarter of a second: the mean difference of squares
    of 8 x 8, as a share of the range. Grain, which flickers, counts little."""
    height, width = (n - n % POOL for n in frames.shape[1:3])
    cut = frames[:, :height, :width].astype(np.float32)
    means = reduce(cut, "t (h a) (w b) c -> t h w c", "mean", a=POOL, b=POOL)
    later = min(LATER, len(frames) - 1)
    return float(np.abs(means[later:] - means[:-later]).mean(dtype=np.float64) / _RANGE)


# -- of two ----------------------------------------------------------------------------------------


def psnr(videos, parents) -> float:  # [b t h w 3] x2 in [-1, 1]
    """Returns the mean over clips of the peak signal-to-noise ratio in dB; infinite for equal
    clips."""
    a, b = (np.clip(np.asarray(x, np.float64), -1, 1) for x in (videos, parents))
    with np.errstate(divide="ignore"):
        return float(np.mean(10 * np.log10(4 / np.square(a - b).mean((1, 2, 3, 4)))))


def ssim(a: np.ndarray, b: np.ndarray) -> float:  # uint8 [t h w 3] x2
    """Returns the mean structural similarity of the luma of frames of 11 pixels a side or more."""
    return float(np.mean([_similarity(x @ _LUMA, y @ _LUMA) for x, y in zip(a, b, strict=True)]))


def _similarity(x: np.ndarray, y: np.ndarray) -> float:  # f64[h w] x2
    window = _windowed
    mean_x, mean_y = window(x), window(y)
    var_x, var_y = window(x * x) - mean_x**2, window(y * y) - mean_y**2
    both = window(x * y) - mean_x * mean_y
    top = (2 * mean_x * mean_y + _C1) * (2 * both + _C2)
    below = (mean_x**2 + mean_y**2 + _C1) * (var_x + var_y + _C2)
    return float((top / below).mean())


def _windowed(image: np.ndarray) -> np.ndarray:  # f64[h w] -> f64[h - 10, w - 10]
    """Weighted means around every place that has a whole window."""
    places = np.arange(-_RADIUS, _RADIUS + 1)
    weights = np.exp(-np.square(places) / (2 * _DEVIATION**2))
    for axis in (0, 1):
        image = sliding_window_view(image, len(places), axis) @ (weights / weights.sum())
    return image


# -- of sets ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """Mean f64[d] and covariance f64[d d] of a set of features."""

    mean: np.ndarray
    covariance: np.ndarray


def gaussian(features) -> Gaussian:  # [n d], n at least 2
    """Returns mean and covariance of a set of features."""
    x = np.asarray(features, np.float64)
    if x.ndim != 2 or len(x) < 2:
        raise ValueError(
            f"features have shape {x.shape}; a Gaussian needs [n d] with at least 2 rows"
        )
    return Gaussian(x.mean(0), np.cov(x, rowvar=False).reshape(x.shape[1], x.shape[1]))


def frechet(a: Gaussian, b: Gaussian) -> float:
    """Returns |m_a - m_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2), the squared 2-Wasserstein distance
    of two Gaussians."""
    root = _square_root(a.covariance)
    cross = np.linalg.eigvalsh(root @ b.covariance @ root)
    shift = np.square(a.mean - b.mean).sum()
    traces = np.trace(a.covariance) + np.trace(b.covariance)
    return float(shift + traces - 2 * np.sqrt(np.maximum(cross, 0)).sum())


def _square_root(matrix: np.ndarray) -> np.ndarray:
    """The root of a symmetric matrix without negative eigenvalues, but for rounding."""
    values, vectors = np.linalg.eigh(matrix)
    return vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T


def latent_features(latents: np.ndarray) -> np.ndarray:  # f32[t h w c] -> f32[n 3 c]
    """Returns what a place of a video's latents shows, a row for each: its channels, and how they
    differ from those beside it and from those of the next latent frame."""
    here = latents[:-1, :, :-1] if len(latents) > 1 else latents[:, :, :-1]
    beside = (latents[:, :, 1:] - latents[:, :, :-1])[: len(here)]
    after = np.diff(latents, axis=0)[:, :, :-1] if len(latents) > 1 else np.zeros_like(here)
    return rearrange(np.stack([here, beside, after]), "k t h w c -> (t h w) (k c)")
