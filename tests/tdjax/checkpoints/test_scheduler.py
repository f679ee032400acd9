"""The sampler that a diffusers folder was saved with, read as diffusers writes it."""

import dataclasses
import json

import pytest

from tdjax.checkpoints.locate import Located
from tdjax.checkpoints.scheduler import FILE, INDEX, saved_boundary, saved_sampler
from tdjax.errors import CheckpointError
from tdjax.pipeline.load import _with_scheduler


@pytest.fixture(scope="module")
def schedulers():
    """{sampler: such a scheduler}."""
    diffusers = pytest.importorskip("diffusers")
    return {
        "unipc": diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        "euler": diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
    }


def written(folder, text):
    (folder / FILE).parent.mkdir()
    (folder / FILE).write_text(text)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("sampler", "shift"), [("unipc", 3.0), ("euler", 7.0)])
def test_schedulers_as_diffusers_saves_them(tmp_path, schedulers, sampler, shift):
    schedulers[sampler].save_pretrained(tmp_path / "scheduler")
    assert saved_sampler(tmp_path) == {"sampler": sampler, "shift": shift}
    model = Located(
        name="fox",
        layout="diffusers",
        preset=None,
        dit=(tmp_path / "transformer",),
        distilled=False,
    )
    notes = []
    found = _with_scheduler(model, notes.append).facts["sampler"]
    assert (found["sampler"], found["shift"]) == (sampler, shift)
    assert (found["num_steps"], found["guidance_scale"]) == (50, 5.0)  # diffusers' own for Wan
    assert notes == [f"{FILE}: {sampler} with `shift` {shift:g}"]


@pytest.mark.slow
def test_other_models_keep_what_they_have(tmp_path, schedulers):
    schedulers["unipc"].save_pretrained(tmp_path / "scheduler")
    for change in ({"layout": "diffusers", "distilled": True}, {"layout": "published"}):
        model = Located(name="fox", preset=None, dit=(tmp_path / "x",), **change)
        assert _with_scheduler(model, print) is model


@pytest.mark.parametrize("text", ['{"_class_name": "LCMScheduler"}', '{"_class_name": 3}', "{}"])
def test_other_schedulers_say_nothing(tmp_path, text):
    assert saved_sampler(tmp_path) == saved_sampler(written(tmp_path, text)) == {}


@pytest.mark.parametrize("text", ["", "[]", "{", "null"])
def test_damaged_files(tmp_path, text):
    with pytest.raises(CheckpointError, match="cannot be read"):
        saved_sampler(written(tmp_path, text))


@pytest.mark.parametrize("shift", [0, -1, "5", None, True, float("inf"), float("nan")])
def test_shifts_that_are_none(tmp_path, shift):
    about = {"_class_name": "UniPCMultistepScheduler", "flow_shift": shift}
    with pytest.raises(CheckpointError, match="flow_shift"):
        saved_sampler(written(tmp_path, json.dumps(about)))


@pytest.mark.parametrize("distilled", [True, False])
def test_the_boundary_of_two_experts_is_read(tmp_path, distilled):
    (tmp_path / INDEX).write_text('{"_class_name": "WanPipeline", "boundary_ratio": 0.875}')
    folders = (tmp_path / "transformer", tmp_path / "transformer_2")
    model = Located(name="fox", layout="diffusers", preset=None, dit=folders, distilled=distilled)
    notes = []
    found = _with_scheduler(model, notes.append).facts["sampler"]
    assert found["boundary"] == 0.875 and "0.875" in notes[0]
    assert set(found) == {"boundary"} or found["num_steps"] == 50
    one = dataclasses.replace(model, dit=folders[:1])
    assert _with_scheduler(one, notes.append) is one


@pytest.mark.parametrize("text", ["[]", "{", '{"boundary_ratio": "x"}', '{"boundary_ratio": 2}'])
def test_a_damaged_index_is_refused(tmp_path, text):
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=INDEX):
        saved_boundary(tmp_path)


def test_an_index_without_a_boundary(tmp_path):
    assert saved_boundary(tmp_path) is None
    (tmp_path / INDEX).write_text('{"boundary_ratio": null}')
    assert saved_boundary(tmp_path) is None
