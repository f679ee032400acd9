"""What a call takes from its model, and what it refuses, before any long work."""

import dataclasses
import json
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_model
from arrays import put

import tdjax
from tdjax.checkpoints.locate import Located
from tdjax.config import DiTConfig, sampler_changes
from tdjax.errors import UsageError
from tdjax.pipeline.request import make_request, model_info
from tdjax.presets import I2V_SAMPLER, PRESETS, T2V_SAMPLER, TEACHER_SAMPLER


def model(about=None, preset=None, config=None):
    located = Located(name="a", layout="published", preset=preset, facts=about or {})
    return model_info(located, config or DiTConfig(), tdjax.TextConfig(), False)


def test_a_model_says_its_own_defaults():
    plain = model()
    assert (plain.sampler, plain.resolution, plain.task) == (T2V_SAMPLER, "480p", "t2v")
    assert model(config=DiTConfig(in_channels=36)).sampler == I2V_SAMPLER
    large = model(preset="wan2.1-t2v-14b")
    assert (large.sampler, large.resolution) == (TEACHER_SAMPLER, "720p")
    small = model({"width": 64, "height": 32, "frames": 9})
    assert small.resolution is None and small.latent_shape(small.size) == (1, 3, 4, 8, 16)


OLD = {"steps": 2, "mode": "ode", "mid": [1.3, 1.0], "sigma_max": 90.0}
NEW = {"num_steps": 2, "sampler": "ode", "mid_t": [1.3, 1.0], "sigma_max": 90.0}


def test_folders_of_earlier_versions_are_understood(tmp_path):
    """model.json has the fields of the sampler by the names that they had when it was written."""
    teacher = {"mode": "euler", "guidance": 4.0}
    assert sampler_changes(OLD) == sampler_changes(NEW) == NEW | {"mid_t": (1.3, 1.0)}
    assert sampler_changes(teacher) == {"sampler": "euler", "guidance_scale": 4.0}
    folder = random_model.write(tmp_path / "model")
    pipes = []
    for sampler in (OLD, NEW):
        (folder / "model.json").write_text(json.dumps({**random_model.FACTS, "sampler": sampler}))
        pipes.append(tdjax.load(folder))
    assert pipes[0].sampler == pipes[1].sampler and pipes[0].sampler.mid_t == (1.3, 1.0)
    shutil.rmtree(folder)


def test_the_class_of_samplers_that_was_asked_for_brings_its_own_defaults():
    sampler = lambda own, **given: make_request("a", given, model(preset=own)).sampler
    teacher = sampler(None, sampler="euler")
    assert (teacher.num_steps, teacher.guidance_scale, teacher.sampler) == (50, 5.0, "euler")
    few = sampler("wan2.1-t2v-1.3b", sampler="sde")
    assert (few.num_steps, few.guidance_scale, few.sigma_max) == (4, 1.0, 80.0)
    assert sampler("wan2.1-t2v-1.3b", num_steps=30).sampler == "unipc"
    assert sampler(None, mid_t=[1.2]).num_steps == 2
    with pytest.raises(UsageError, match="sampler is 'ddim'"):
        sampler(None, sampler="ddim")


def test_a_key_stands_in_place_of_the_seed():
    request = make_request("a", {"key": jax.random.key(3)}, model())
    assert request.seed is None and request.random_key() is request.key
    bits = lambda key: np.asarray(jax.random.key_data(key))
    seeded = make_request("a", {"seed": 3}, model()).random_key()
    assert np.array_equal(bits(seeded), bits(request.key))


def gone(array):
    array.delete()
    return array


def test_arrays_without_finite_numbers_are_refused():
    """Masks, fields of records, deleted arrays, and what float32 cannot hold."""
    shape = model().latent_shape(model().size)
    zeros = np.zeros(shape, np.float32)
    odd = [np.ma.masked_array(zeros), np.zeros(shape, [("a", "f4")]), gone(jnp.zeros(shape))]
    odd += [zeros.astype("m8[s]"), zeros + 0j, zeros.astype(object), zeros.tolist()]
    for latents in odd:
        with pytest.raises(UsageError, match="latents is"):
            make_request("a", {"latents": latents}, model())
    with pytest.raises(UsageError, match="NaN or infinity"):
        make_request("a", {"latents": np.full(shape, 1e300)}, model())
    for kind in (np.float64, np.float16, jnp.bfloat16, jnp.float8_e4m3fn, jnp.int4, np.int64, bool):
        make_request("a", {"latents": zeros.astype(kind)}, model())
    with pytest.raises(UsageError, match="key is"):
        make_request("a", {"key": gone(jax.random.key(0))}, model())


def test_prompts_beside_embeddings_are_as_many():
    embeds = np.zeros((2, 512, 4096), np.float32)
    for prompts in (None, ["a", "b"]):
        assert make_request(prompts, {"prompt_embeds": embeds}, model()).videos == 2
    with pytest.raises(UsageError, match="2 prompt_embeds for 1 prompts"):
        make_request("a", {"prompt_embeds": embeds}, model())


def test_arrays_of_one_axis_are_lists():
    given = {"seed": put([3]), "mid_t": put([1.25])}
    request = make_request("a", given, model())
    assert request.seed == (3,) and request.sampler.mid_t == (1.25,)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        *(("on_frames", f) for f in (3, lambda: 0, lambda x: 0, lambda *, x: 0)),
        *(("on_step", f) for f in (lambda: 0, lambda x, y, z: 0, object())),
        *(("cancel", c) for c in (threading.Event, lambda: True, True, object())),
    ],
)
def test_what_cannot_be_called_as_it_will_be_is_refused(name, wrong):
    with pytest.raises(UsageError, match=f"{name} is"):
        make_request("a", {name: wrong}, model())


def test_guidance_needs_a_text_encoder():
    without = dataclasses.replace(model(preset="wan2.1-t2v-1.3b"), text_encoder=False)
    embeds = np.zeros((1, 512, 4096), np.float32)
    with pytest.raises(UsageError, match="guidance without a text encoder"):
        make_request(None, {"prompt_embeds": embeds}, without)
    request = make_request(None, {"prompt_embeds": embeds, "guidance_scale": 1.0}, without)
    assert not request.sampler.guided


@pytest.mark.parametrize("name", list(PRESETS))
def test_every_preset_has_a_request(name):
    preset = PRESETS[name]
    task = {"image": np.zeros((90, 160, 3), np.uint8)} if preset.config.task == "i2v" else {}
    own = model(preset=name, config=preset.config)
    assert make_request("a", task, own).sampler == preset.sampler


def test_adaptive_size_follows_the_image():
    image = np.zeros((40, 80, 3), np.uint8)
    given = {"image": image, "fit": "adaptive", "width": 64, "height": 64}
    size = make_request("a", given, model(config=DiTConfig(in_channels=36))).size
    assert (size.width, size.height) == (96, 48)
