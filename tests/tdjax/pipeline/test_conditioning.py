"""Tokens as a pytree, and the image channels of image-to-video."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import put

from tdjax.config import VideoSize
from tdjax.media.resolution import choose_size, fit_image
from tdjax.pipeline.conditioning import first_frame, first_frame_mask, image_condition
from tdjax.text.tokenizer import Tokens

SIZE = VideoSize(frames=9, height=32, width=48)


def test_tokens_are_a_pytree():
    tokens = Tokens(np.zeros((2, 5), np.int32), np.ones((2, 5), np.int32))
    twice = jax.jit(lambda t: jax.tree.map(lambda x: x * 2, t))(tokens)
    assert isinstance(twice, Tokens) and (twice.mask == 2).all()
    with pytest.raises(dataclasses.FrozenInstanceError):
        tokens.ids = None


def test_the_first_frame_is_the_image():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3)).astype(np.uint8)
    pixels[0, 0] = 0, 255, 127
    video = first_frame(pixels, SIZE)
    assert video.shape == (1, 1, 32, 48, 3) and video.dtype == np.float32
    np.testing.assert_allclose(video[0, 0], pixels / 127.5 - 1, atol=1e-7)
    assert video[0, 0, 0, 0, :2].tolist() == [-1.0, 1.0]


def test_first_frame_refuses_another_size():
    with pytest.raises(ValueError, match="fit_image"):
        first_frame(np.zeros((32, 32, 3), np.uint8), SIZE)


def test_mask_is_one_in_the_first_latent_frame():
    mask = np.asarray(first_frame_mask((2, 3, 4, 6)))
    assert mask.shape == (2, 3, 4, 6, 4) and mask.dtype == np.float32
    assert (mask[:, 0] == 1).all() and (mask[:, 1:] == 0).all()


def test_condition_has_the_layout_of_the_golden_input(golden):
    """in/y of the official image-to-video run: 4 mask channels, then 16 latents."""
    expected = np.moveaxis(golden("dit_i2v22_tiny")["in/y"], 1, -1)
    condition = jax.jit(image_condition)(put(expected[..., 4:]))
    assert condition.dtype == jnp.float32
    assert np.array_equal(condition, expected)


def test_from_an_image_to_the_condition():
    """The whole way with a stand-in for the VAE that averages 8x8 pixels and repeats channels."""

    def encode(video):
        b, frames, height, width, _ = video.shape
        small = (
            video[:, ::4]
            .reshape(b, 1 + (frames - 1) // 4, height // 8, 8, width // 8, 8, 3)
            .mean((3, 5, 6))
        )
        return jnp.repeat(small[..., None], 16, -1)

    image = np.full((100, 77, 3), 255, np.uint8)
    size = choose_size(width=48, height=32, num_frames=9, image_size=(77, 100))
    video = np.pad(
        first_frame(fit_image(image, size), size),
        ((0, 0), (0, size.frames - 1), (0, 0), (0, 0), (0, 0)),
    )
    condition = np.asarray(image_condition(encode(video)))
    assert condition.shape == (1, *SIZE.latent_grid, 20)
    assert (condition[:, 0] == 1).all() and (condition[:, 1:] == 0).all()
