"""What a user is told before waiting."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh

import tdjax
from tdjax.config import DiTConfig, VideoSize
from tdjax.media.scenes import clips
from tdjax.media.scenes.factors import NAMES
from tdjax.pipeline import notes
from tdjax.pipeline.request import ModelInfo, Request
from tdjax.presets import I2V_SAMPLER, T2V_SAMPLER, TEACHER_SAMPLER
from tdjax.train.tiny.data.captions import LANGUAGE, parse

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
    (line,) = told(size=small, resolution=None)
    assert line.startswith(f"{small}: fox was trained at {VideoSize()} only")
    (line,) = told(size=VideoSize(frames=17))
    assert line.startswith("17 frames: the published models were trained at 81")


def test_frame_rates():
    request = Request(prompts=("a fox",), size=VideoSize(), sampler=T2V_SAMPLER, fps=24)
    (line,) = notes.trained_notes(request, MODEL)
    assert line.startswith("fps is 24") and line.endswith("at 1.5 times its speed")


@pytest.mark.parametrize(
    ("sampler", "request_changes", "expected"),
    [
        (T2V_SAMPLER, {"negative_prompt": "fog"}, "negative_prompt has no effect: distilled"),
        (TEACHER_SAMPLER, {"negative_prompt": "fog"}, None),
        (
            dataclasses.replace(TEACHER_SAMPLER, guidance_scale=1.0),
            {"negative_prompt": "fog"},
            "negative_prompt has no effect: guidance_scale is 1",
        ),
        (dataclasses.replace(T2V_SAMPLER, shift=3.0), {}, "`shift` has no effect"),
        (dataclasses.replace(TEACHER_SAMPLER, shift=3.0), {}, None),
        (dataclasses.replace(T2V_SAMPLER, boundary=0.5), {}, "`boundary` has no effect"),
        (dataclasses.replace(TEACHER_SAMPLER, mid_t=(1.2,)), {}, "mid_t has no effect"),
        (dataclasses.replace(T2V_SAMPLER, mid_t=(1.2, 1.1, 1.0)), {}, None),
    ],
)
def test_arguments_that_change_nothing(sampler, request_changes, expected):
    request = Request(prompts=("a",), size=VideoSize(), sampler=sampler, **request_changes)
    lines = notes.idle_notes(request, MODEL)
    assert [line.startswith(expected) for line in lines] == ([True] if expected else [])
    two = dataclasses.replace(MODEL, experts=True)
    assert not any("boundary" in line for line in notes.idle_notes(request, two))


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


@pytest.mark.parametrize(
    ("sizes", "sampler", "videos", "expected"),
    [
        ((1, 2), TEACHER_SAMPLER, 1, []),
        ((1, 2), T2V_SAMPLER, 1, ["cfg=2 of `mesh` has no effect: distilled weights"]),
        (
            (1, 2),
            dataclasses.replace(TEACHER_SAMPLER, guidance_scale=1.0),
            1,
            ["cfg=2 of `mesh` has no effect: guidance_scale is 1"],
        ),
        ((4, 1), T2V_SAMPLER, 1, ["dp=4 of `mesh` has no effect: one video"]),
        ((4, 1), T2V_SAMPLER, 2, []),
    ],
)
def test_devices_that_have_nothing_of_their_own_to_do(sizes, sampler, videos, expected):
    mesh = AbstractMesh(sizes, ("data", "guidance"))
    request = Request(prompts=("a",), size=VideoSize(), sampler=sampler, num_samples=videos)
    lines = notes.mesh_notes(request, mesh)
    assert [line[: len(start)] for line, start in zip(lines, expected, strict=True)] == expected
    assert not notes.mesh_notes(request, None)


# -- of a clip -------------------------------------------------------------------------------------

ASKED = "a large orange triangle moves up quickly on a black background"


@pytest.fixture(scope="module")
def clip():
    """A clip of what ASKED says, drawn: uint8[1 T H W 3]."""
    where = clips.place(jax.random.key(0), parse([ASKED]))
    return np.asarray(clips.to_uint8(clips.render(where)))


@pytest.mark.slow
def test_a_clip_that_shows_what_was_asked_for(clip):
    for video in (clip, clip.astype(np.float32) / 255):
        assert notes.clip_notes(LANGUAGE, ASKED, video) == []
    assert notes.clip_notes(LANGUAGE, "", clip) == []  # nothing was asked for
    (line,) = notes.clip_notes(LANGUAGE, "an orange triangle", clip)  # the rest is drawn for it
    assert "the shape is" not in line and "the colour is" not in line and "the motion is" in line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("was", "said", "expected"),
    [
        ("large", "small", "the size is large, not small"),
        ("orange", "green", "the colour is orange, not green"),
        ("triangle", "circle", "the shape is triangle, not circle"),
        ("moves up", "moves left", "the motion is moves up, not moves left"),
        ("quickly", "slowly", "the speed is quickly, not slowly"),
        ("black", "olive", "the background is black, not olive"),
    ],
)
def test_a_clip_that_shows_something_else(clip, was, said, expected):
    (line,) = notes.clip_notes(LANGUAGE, ASKED.replace(was, said), clip)
    assert expected in line and line.count(" is ") == 1 and line.endswith("another seed may")
    assert len(NAMES) == 6  # a case for each


@pytest.mark.slow
def test_clips_that_show_no_shape_and_those_that_are_not_looked_at(clip):
    assert "no single shape" in notes.clip_notes(LANGUAGE, ASKED, np.zeros_like(clip))[0]
    noise = np.random.default_rng(0).integers(0, 256, clip.shape, np.uint8)
    assert notes.clip_notes(LANGUAGE, ASKED, noise)
    assert notes.clip_notes(LANGUAGE, ASKED, noise[:, :5]) == []
    assert notes.clip_notes(None, ASKED, noise) == []
    other = LANGUAGE | {"knows": LANGUAGE["knows"] | {"shape": ["box"]}}
    assert notes.clip_notes(other, ASKED, noise) == []


def test_a_warm_up_has_the_detector_of_clips_ready(monkeypatch):
    pipe, seen = tdjax.load("demo", progress=False), []
    monkeypatch.setattr(pipe.preparation, "compile", lambda *arguments: None)
    measure = notes.detector.measure
    look = lambda video: seen.append((video.shape, video.dtype)) or measure(video)
    monkeypatch.setattr(notes.detector, "measure", look)
    pipe.warmup()
    assert seen == [((1, 33, 64, 64, 3), np.uint8)]  # as a call has it
