"""Arguments of the public functions: spelled out, typed, one name each, and checked at the door."""

import dataclasses
import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import jax
import numpy as np
import pytest

import tdjax
from tdjax.config import LINEAR, SamplerConfig
from tdjax.errors import UsageError
from tdjax.pipeline.call import CallAliases
from tdjax.pipeline.options import (
    ALIASES,
    LoadAliases,
    PipelineOptions,
    Quant,
    Sampler,
)
from tdjax.pipeline.request import ACCEPTED, Request

ROOT = Path(__file__).resolve().parents[3]
CALL = (tdjax.Pipeline.__call__, tdjax.Pipeline.request, tdjax.Pipeline.warmup)

ACCEPTED_SCRIPT = """\
from pathlib import Path

import numpy as np

import tdjax

pipe = tdjax.load("demo", impl="reference", quant="none", low_memory=True)
result = pipe("a small red circle", num_steps=2, seed=3, num_videos_per_prompt=2)
path: Path = result.save("circle.mp4")
frames: np.ndarray = result.pixels()
need: list[int] = [stage.total for stage in pipe.plan(pipe.request("a circle", sampler="ode"))]
"""
REFUSED = {  # a line, and the argument that a type checker must name
    'tdjax.load("demo", quantise="none")': "quantise",
    'tdjax.load("demo", impl="cuda")': "impl",
    'tdjax.load("demo")("a", num_step=2)': "num_step",
    'tdjax.load("demo")("a", fit="cropped")': "fit",
    'tdjax.load("demo").request("a", num_step=2)': "num_step",
    'tdjax.load("demo").warmup(hight=64)': "hight",
}


@pytest.mark.parametrize("function", [tdjax.load, *CALL])
def test_every_argument_has_a_name_and_a_type(function):
    for parameter in list(inspect.signature(function).parameters.values()):
        if parameter.name != "self":
            assert parameter.annotation is not inspect.Parameter.empty, parameter
            assert parameter.kind is not inspect.Parameter.VAR_POSITIONAL, parameter
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                assert parameter.name == "aliases"


def test_signatures_and_what_is_accepted_agree():
    names = lambda function: set(inspect.signature(function).parameters)
    door = names(tdjax.Pipeline.__call__)
    assert door - {"self", "prompt", "aliases"} == set(ACCEPTED)
    assert all(names(function) == door for function in CALL)
    assert {field.name for field in dataclasses.fields(PipelineOptions)} <= names(tdjax.load)
    both = CallAliases.__annotations__ | LoadAliases.__annotations__
    assert set(ALIASES) == set(both) and set(ALIASES.values()) <= door | names(tdjax.load)
    assert {field.name for field in dataclasses.fields(SamplerConfig)} <= door


def test_what_is_not_given_is_the_same_to_a_call_and_to_a_request():
    fields = {field.name: field.default for field in dataclasses.fields(Request)}
    parameters = inspect.signature(tdjax.Pipeline.__call__).parameters.values()
    given = {p.name: p.default for p in parameters if p.default not in (p.empty, None)}
    assert len(given) >= 7
    assert given == {name: fields[name] for name in given}


def test_the_choices_are_those_of_the_configs():
    assert get_args(Quant) == ("auto", "none", *LINEAR[1:])
    for sampler in get_args(Sampler):
        SamplerConfig(sampler=sampler)


@pytest.fixture(scope="module")
def pipe():
    return tdjax.load("demo")


def test_names_of_other_projects_mean_the_same(pipe):
    key = jax.random.key(3)
    ours = pipe.request("a", num_steps=2, num_samples=3, key=key)
    theirs = pipe.request("a", num_inference_steps=2, num_videos_per_prompt=3, generator=key)
    assert ours == theirs
    assert tdjax.load("demo", attention_impl="reference").config.impl == "reference"
    none = pipe.request("a", num_inference_steps=None, num_videos_per_prompt=None)
    assert none == pipe.request("a")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_steps": 2, "num_inference_steps": 3}, "num_steps and num_inference_steps"),
        ({"num_samples": 2, "num_videos_per_prompt": 3}, "num_samples and num_videos_per_prompt"),
        ({"image": np.zeros((1, 1, 3), np.uint8), "image_path": "x.png"}, "image and image_path"),
        ({"attention_impl": "reference"}, "unknown argument 'attention_impl'"),
        ({"mid": (1.0,)}, "unknown argument 'mid'"),
        ({"nun_steps": 3}, "did you mean 'num_steps'"),
    ],
)
def test_one_thing_by_two_names_and_unknown_names_are_refused(pipe, given, message):
    for function in (pipe, pipe.request):
        with pytest.raises(UsageError, match=message):
            function("a", **given)


def test_load_refuses_two_names_too():
    with pytest.raises(UsageError, match="impl and attention_impl were both given"):
        tdjax.load("demo", impl="reference", attention_impl="auto")
    with pytest.raises(UsageError, match="did you mean 'tokenizer_path'"):
        tdjax.load("demo", tokeniser_path="x")


# What jax and the others say of their own types takes most of the time to read.
SETTINGS = """
[mypy]
follow_imports = silent
ignore_missing_imports = True
[mypy-jax.*,jaxlib.*,flax.*,orbax.*,optax.*,einops.*,tokenizers.*,PIL.*,rich.*,tqdm.*,av.*]
follow_imports = skip
[mypy-huggingface_hub.*,safetensors.*]
follow_imports = skip
"""


@pytest.mark.slow
def test_what_a_type_checker_says(tmp_path):
    """A user's script is accepted as it stands, and each misspelled line by itself is not."""
    pytest.importorskip("mypy")
    (tmp_path / "accepted.py").write_text(ACCEPTED_SCRIPT)
    lines = ["import tdjax", *REFUSED]
    (tmp_path / "refused.py").write_text("\n".join(lines) + "\n")
    (tmp_path / "mypy.ini").write_text(SETTINGS)
    argv = ["--hide-error-context", "--cache-dir", os.devnull]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *argv, "accepted.py", "refused.py"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": str(ROOT)},
    )
    found = [line for line in done.stdout.splitlines() if ": error:" in line]
    assert len(found) == len(REFUSED), done.stdout + done.stderr
    for number, name in enumerate(REFUSED.values(), 2):
        assert any(
            line.startswith(f"refused.py:{number}:") and f'"{name}"' in line for line in found
        )
