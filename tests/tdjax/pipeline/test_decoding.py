"""What can be decoded: latents of this model's decoder, and nothing else."""

import numpy as np
import pytest

import tdjax
from tdjax.config import VAEConfig, VideoSize
from tdjax.errors import UsageError
from tdjax.pipeline.decoding import size_of


@pytest.fixture(scope="module")
def pipe(model):
    return tdjax.load(model)


@pytest.mark.parametrize("frames", [1, 5, 81])
def test_sizes_come_from_latents(frames):
    size = VideoSize(frames=frames, height=48, width=64)
    shape = (2, *size.latent_grid, 16)
    assert size_of(shape, VAEConfig()) == size


@pytest.mark.parametrize(
    "latents",
    [
        3,
        "x.safetensors",
        np.zeros((2, 4, 4, 8), np.float32),
        np.zeros((1, 2, 4, 4, 8), np.int8),
        np.zeros((0, 2, 4, 4, 8), np.float32),
        np.zeros((1, 2, 4, 4, 16), np.float32),
        np.zeros((1, 2, 3, 4, 8), np.float32),
        np.full((1, 2, 4, 4, 8), np.nan, np.float32),
    ],
    ids=lambda x: str(getattr(x, "shape", x)),
)
def test_other_values_are_refused(pipe, latents):
    with pytest.raises(UsageError):
        pipe.decode(latents)


@pytest.mark.parametrize("wrong", [{"output_type": "latent"}, {"output_type": "x"}, {"fps": 0}])
def test_arguments_are_checked(pipe, wrong):
    with pytest.raises(UsageError):
        pipe.decode(np.zeros((1, 2, 4, 4, 8), np.float32), **wrong)
