"""What each step of a sampler predicts, shown to who asks: by which decoder, and the same video."""

import numpy as np
import pytest
import random_model
from random_model import SMALL

import tdjax
from tdjax.config import TinyVAEConfig, VAEConfig, VideoSize
from tdjax.errors import Cancelled
from tdjax.pipeline import memory, preview


@pytest.fixture(scope="module")
def pipe(dense_model):
    """Its VAE has latents of its own."""
    return tdjax.load(dense_model)


def test_latents_of_wan_become_colours():
    latents = np.random.default_rng(0).normal(0, 1, (1, 2, 3, 4, 16)).astype(np.float32)
    colours = np.float64(latents[0]) @ np.float64(preview.COLOURS) + preview.BIAS
    expected = (np.clip(colours, -1, 1) + 1) * 127.5
    made = np.asarray(preview.colours(latents))
    assert made.dtype == np.uint8 and made.shape == (2, 3, 4, 3)
    assert np.abs(made - expected).max() <= 0.5 + 1e-3  # rounded to a whole number


def test_who_makes_the_frames_is_in_the_plan():
    """Colours take no memory; a decoder keeps its weights beside those of the transformer."""
    dit = random_model.DIT
    size = VideoSize(frames=5, width=64, height=64)
    extra = {}
    for vae in (VAEConfig(), TinyVAEConfig(), random_model.VAE):
        configs = {"dit": dit, "vae": vae}
        rows = [memory.stage_plans(configs, size, guided=False, previews=on) for on in (0, 1)]
        extra[vae] = rows[1][0].working - rows[0][0].working
        assert rows[0][1] == rows[1][1]
        if memory.previews_decoded(vae):
            assert rows[1][0].working >= rows[1][1].total
    assert extra.pop(VAEConfig()) == 0 and all(more > 0 for more in extra.values())


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["sde", "ode", "unipc"])
def test_previews_of_each_step_and_the_same_video(pipe, sampler):
    seen = []
    call = {"num_steps": 2, "sampler": sampler, **SMALL}
    if sampler == "unipc":
        call["guidance_scale"] = 1.0
    result = pipe("a", on_preview=lambda *told: seen.append(told), **call)
    assert [step for step, _ in seen] == [1, 2]
    assert all(frames.shape == (5, 32, 32, 3) for _, frames in seen)
    # After the last step the state is the prediction.
    assert np.abs(seen[1][1].astype(int) - result.frames[0]).max() <= 1
    assert np.abs(seen[0][1].astype(int) - result.frames[0]).max() > 1
    plain = pipe("a", on_step=lambda *told: None, **call)
    assert np.array_equal(plain.latents, result.latents)


@pytest.mark.slow
def test_a_preview_ends_the_call(pipe):
    with pytest.raises(Cancelled, match="preview of step 1"):
        pipe("a", on_preview=lambda step, frames: False, num_steps=2, sampler="ode", **SMALL)
