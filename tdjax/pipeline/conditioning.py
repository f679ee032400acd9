"""What a video is made from besides its prompt, as arrays: the first frame of image-to-video."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from tdjax.config import VideoSize

MASK_CHANNELS = 4  # one for each frame of a latent frame; the released models use them alike


def first_frame(
    pixels: np.ndarray, size: VideoSize
) -> np.ndarray:  # uint8 [H W 3] -> f32[1 1 H W 3]
    """The image in [-1, 1]. For image-to-video the VAE encodes it with frames of zeros (mid grey)
    after it.

    Source: thu-ml/TurboDiffusion turbodiffusion/inference/wan2.2_i2v_infer.py.
    """
    if pixels.shape != (size.height, size.width, 3) or pixels.dtype != np.uint8:
        raise ValueError(
            f"first_frame takes uint8 {(size.height, size.width, 3)}, got {pixels.dtype}"
            f" {pixels.shape}; use resolution.fit_image"
        )
    return in_range(pixels)[None, None]


def in_range(pixels: np.ndarray) -> np.ndarray:  # uint8 [...] -> f32 [...]
    """Values in [-1, 1], as the VAE reads them."""
    return pixels.astype(np.float32) / np.float32(127.5) - np.float32(1)


def first_frame_mask(shape: tuple[int, ...]) -> jax.Array:  # (b, t, h, w) -> f32[b t h w 4]
    """1 in latent frame 0, which the image fixes; 0 in the frames to be made."""
    t = jax.lax.broadcasted_iota(jnp.int32, (*shape, MASK_CHANNELS), 1)
    return (t == 0).astype(jnp.float32)


def image_condition(latents: jax.Array) -> jax.Array:  # f32[b t h w c] -> f32[b t h w 4 + c]
    """The channels beside the noisy latents of an image-to-video model: mask, then the normalised
    latents of the image's clip."""
    return jnp.concatenate(
        [first_frame_mask(latents.shape[:-1]), latents.astype(jnp.float32)], axis=-1
    )
