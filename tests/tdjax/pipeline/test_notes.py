"""What a user is told before waiting."""

import dataclasses

import jax

from tdjax.config import DiTConfig, VideoSize
from tdjax.pipeline import notes
from tdjax.pipeline.request import ModelInfo, Request
from tdjax.presets import I2V_SAMPLER, T2V_SAMPLER, TEACHER_SAMPLER

MODEL = ModelInfo(
    name="fox",
    task="t2v",
    distilled=True,
    experts=False,
    language=None,
    prompts=(),
    size=VideoSize(),
    resolution="480p",
    sampler=T2V_SAMPLER,
    text_encoder=True,
    text_len=512,
    text_dim=4096,
    channels=16,
)


def told(sampler=T2V_SAMPLER, size=None, transformer=None, **changes) -> list[str]:
    request = Request(prompts=("a fox",), size=size or VideoSize(), sampler=sampler)
    info = dataclasses.replace(MODEL, **changes)
    return notes.request_notes(request, transformer or DiTConfig(), info, tokenizer=None)


def test_a_usual_request_has_none():
    assert told() == []


def test_sizes():
    small = VideoSize(frames=5, height=32, width=32)
    assert "not a size the published models were trained at" in told(size=small)[0]
    assert told(size=small, resolution=None) == []


def test_samplers_that_do_not_suit_the_weights():
    (line,) = told(distilled=False)
    assert line.startswith("fox looks like undistilled") and "4 steps" in line
    assert told(TEACHER_SAMPLER, distilled=False) == []
    two = dataclasses.replace(I2V_SAMPLER, num_steps=2)
    (line,) = told(two, experts=True)
    assert line.startswith("all 2 steps lie above the boundary 0.9")
    assert told(I2V_SAMPLER, experts=True) == [] and told(two) == []


def test_references_where_kernels_were_expected(monkeypatch):
    sparse = DiTConfig(attention="sla")
    assert told(transformer=sparse) == []
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert told(transformer=sparse) == []
    asked = dataclasses.replace(sparse, impl="reference")
    (line,) = told(transformer=asked)
    assert line.startswith("sla attention runs as its XLA reference (as asked for)")


def test_closed_languages():
    language = {"words": ["a", "circle"], "knows": {"shape": ["circle"]}}
    (line,) = told(language=language)
    assert "'fox'" in line and "shape: circle" in line
