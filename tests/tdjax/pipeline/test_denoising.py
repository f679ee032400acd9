"""The sampling loop cut into calls, guided, and from noise that was given."""

import dataclasses

import jax
import numpy as np
import pytest
import random_model
from random_model import SMALL

import tdjax
from tdjax.config import SamplerConfig, VideoSize
from tdjax.errors import NotFinite
from tdjax.pipeline import compilation
from tdjax.pipeline.denoising import Segment, segments_of
from tdjax.progress import Stages

pytestmark = pytest.mark.usefixtures("as_users")  # bits of programs are compared

SIZE = VideoSize(frames=5, height=32, width=32)  # SMALL's
LATENT = {"output_type": "latent", **SMALL}
DENSE = dataclasses.replace(random_model.DIT, layers=1, attention="dense")


@pytest.fixture(scope="module")
def pipe(dense_model):
    return tdjax.load(dense_model)


def test_calls_of_a_loop():
    sampler = SamplerConfig(num_steps=4, sigma_max=200.0)
    calls = lambda **how: segments_of(sampler, **how)
    one, two = "dit", "dit_low"
    assert calls(experts=False, single=False) == [Segment(0, 4, one)]
    assert calls(experts=False, single=True) == [Segment(i, i + 1, one) for i in range(4)]
    first, second = calls(experts=True, single=False)
    swap = first.last
    assert 0 < swap < 4 and (first, second) == (Segment(0, swap, one), Segment(swap, 4, two))
    experts = [one if i < swap else two for i in range(4)]
    assert calls(experts=True, single=True) == [Segment(i, i + 1, experts[i]) for i in range(4)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "sampler",
    [
        {},
        {"sampler": "ode", "num_steps": 2},
        {"sampler": "unipc", "num_steps": 4, "guidance_scale": 3.0},
    ],
)
def test_the_loop_in_steps_is_the_loop_in_one(dense_model, pipe, sampler):
    """Progress runs one step a call; the video must be the same to the bit."""
    steps = tdjax.load(dense_model, stages=Stages(show=True))
    a, b = pipe("a red circle", **sampler, **LATENT), steps("a red circle", **sampler, **LATENT)
    assert np.array_equal(a.latents, b.latents)
    assert any("step 2 of" in name for name in b.timings) and not any(
        "step" in name for name in a.timings
    )


@pytest.mark.slow
def test_guidance_uses_the_negative_prompt(pipe):
    call = lambda **kw: pipe("a red circle", sampler="euler", num_steps=2, **kw, **LATENT).latents
    plain = call(guidance_scale=1.0)
    assert np.abs(plain - call(guidance_scale=4.0)).max() > 1e-4
    same = call(
        guidance_scale=4.0, negative_prompt="a red circle"
    )  # both halves alike: guidance changes nothing
    assert np.abs(plain - same).max() < 1e-4
    assert np.abs(same - call(guidance_scale=4.0, negative_prompt="green")).max() > 1e-5


@pytest.mark.slow
def test_start_noise_can_be_given(pipe):
    noise = np.asarray(
        compilation.start_noise(
            jax.random.fold_in(jax.random.key(0), 0), 1, (1, *SIZE.latent_grid, 8)
        )
    )[0]
    kwargs = {"sampler": "ode", "num_steps": 2, **LATENT}
    assert np.array_equal(
        pipe("a", seed=0, **kwargs).latents, pipe("a", seed=5, latents=noise, **kwargs).latents
    )


@pytest.mark.slow
def test_the_callers_noise_survives(pipe):
    noise = jax.random.normal(jax.random.key(1), (1, *SIZE.latent_grid, 8))
    euler = {"sampler": "euler", "num_steps": 2, "guidance_scale": 1.0}
    pipe("a", latents=noise, num_samples=2, **euler, **LATENT)
    assert np.isfinite(np.asarray(noise)).all()


@pytest.mark.slow
def test_a_step_that_is_not_finite_is_an_error_or_not_looked_at(model, tmp_path):
    nan = random_model.with_dit(model, tmp_path / "nan", DENSE, head__proj__bias=np.nan)
    pipe = tdjax.load(nan)
    with pytest.raises(NotFinite, match="step 1 of 4"):
        pipe("a", **LATENT)
    assert np.isnan(pipe("a", check="none", **LATENT).latents).all()
