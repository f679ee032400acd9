"""A stage that runs out of memory is told by its name in the plan."""

import jax
import pytest
from random_model import SMALL

import tdjax
from tdjax.errors import OutOfMemory
from tdjax.pipeline import compilation, memory


def exhausted(*args, **kwargs):
    raise jax.errors.JaxRuntimeError(
        "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9999 bytes."
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "label", "stage"),
    [("text", "load text", "text"), ("dit", "load dit", "dit"), ("vae", "load vae", "vae decode")],
)
def test_the_need_told_is_that_of_the_stage_which_failed(model, monkeypatch, name, label, stage):
    """Whatever the stage is called on the screen: "load dit" is the transformer's, though no row of
    the plan has such a name."""
    pipe = tdjax.load(model, prompt_cache=False)
    plan = pipe.plan(pipe.request("a", **SMALL))
    sizes = [plan_stage.total for plan_stage in plan]
    assert len(set(sizes)) == len(sizes)
    told = []
    tell = lambda label, row, limit: told.append((label, row)) or OutOfMemory("told")
    monkeypatch.setattr(memory, "out_of_memory", tell)
    monkeypatch.setattr(pipe.components[name], "load", exhausted)
    with pytest.raises(OutOfMemory, match="told"):
        pipe("a red circle", **SMALL)
    assert told == [(label, plan.of(stage))]


@pytest.mark.slow
def test_a_program_too_large_to_compile_names_its_stage(model, monkeypatch):
    pipe = tdjax.load(model, prompt_cache=False, low_memory=True, text_encoder_device="device")
    monkeypatch.setattr(compilation, "decode_first", exhausted)
    with pytest.raises(OutOfMemory, match="stage 'compile vae decode'"):
        pipe("a red circle", **SMALL)
