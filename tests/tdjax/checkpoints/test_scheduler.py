"""The sampler that a diffusers folder was saved with, read as diffusers writes it."""

import json

import pytest
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from tdjax.checkpoints.locate import Located
from tdjax.checkpoints.scheduler import FILE, saved_sampler
from tdjax.errors import CheckpointError
from tdjax.pipeline.load import _with_scheduler

UNIPC = UniPCMultistepScheduler(
    prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
)
EULER = FlowMatchEulerDiscreteScheduler(shift=7.0)


def written(folder, text):
    (folder / FILE).parent.mkdir()
    (folder / FILE).write_text(text)
    return folder


@pytest.mark.parametrize(
    ("scheduler", "sampler", "shift"), [(UNIPC, "unipc", 3.0), (EULER, "euler", 7.0)]
)
def test_schedulers_as_diffusers_saves_them(tmp_path, scheduler, sampler, shift):
    scheduler.save_pretrained(tmp_path / "scheduler")
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


def test_other_models_keep_what_they_have(tmp_path):
    UNIPC.save_pretrained(tmp_path / "scheduler")
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
