"""What is taken from a client, and what is refused: each time with a reason, and never by a
fault."""

import asyncio
import dataclasses
import io

import numpy as np
import pytest
from generated import examples
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from server_cases import REFUSED, STRANGE, encoded
from stub_worker import MODEL

from tdjax.errors import UsageError
from tdjax.server import asking
from tdjax.server.asking import FIELDS, asked, asked_apart, decoded_image
from tdjax.server.limits import Limits

LIMITS = Limits(frames=81, pixels=100 * 100, steps=4)
PHOTO = np.zeros((32, 64, 3), np.uint8)


def ask(image=None, model=MODEL, **fields):
    return asked({"prompt": "a fox", **fields}, image, model, LIMITS)


def test_what_is_not_given_is_the_models():
    arguments = ask().arguments
    expected = {"width": 64, "height": 48, "num_frames": 5, "num_steps": 4, "fps": 16}
    assert {name: arguments[name] for name in expected} == expected
    assert arguments["format"] == "mp4" and arguments["model"] == "stub"
    assert ask().arguments["seed"] != ask().arguments["seed"]  # drawn, and told
    assert ask(seed=3).arguments["seed"] == 3


def test_openais_fields_are_the_pipelines_arguments():
    arguments = ask(size="32x96", seconds="4").arguments
    assert (arguments["width"], arguments["height"], arguments["num_frames"]) == (32, 96, 65)
    assert ask(seconds=0.25, fps=16).arguments["num_frames"] == 5


def test_shapes_tell_what_compiles_once():
    assert ask().shape == ask(prompt="other", seed=4).shape
    assert len({ask().shape, ask(num_frames=9).shape, ask(num_steps=2).shape}) == 3


def test_an_image_gives_an_adaptive_size_before_it_is_queued():
    model = dataclasses.replace(MODEL, task="i2v")
    what = ask(PHOTO, model, fit="adaptive", size="64x64")
    assert (what.arguments["width"], what.arguments["height"]) == (96, 48)
    assert what.arguments["fit"] == "stretch"


@pytest.mark.parametrize("fields", REFUSED, ids=str)
def test_what_is_wrong_is_refused_with_a_reason(fields):
    with pytest.raises(UsageError) as error:
        ask(**fields)
    assert len(str(error.value).splitlines()) == 3 and len(str(error.value)) < 900


def test_an_image_belongs_to_image_to_video():
    with pytest.raises(UsageError, match="text-to-video weights"):
        ask(PHOTO)
    with pytest.raises(UsageError, match="need an image"):
        ask(model=dataclasses.replace(MODEL, task="i2v"))


def test_other_sizes_than_those_of_the_server_are_refused():
    limits = Limits(sizes=("64x48", "32x32x9"))
    for fields in ({}, {"num_frames": 9}, {"size": "32x32", "num_frames": 9}):
        asked({"prompt": "a", **fields}, None, MODEL, limits)
    with pytest.raises(UsageError, match="this server makes: 64x48, 32x32x9\nnearest: 32x32x9"):
        asked({"prompt": "a", "size": "32x32"}, None, MODEL, limits)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
VALUES = st.recursive(SCALARS, lambda v: st.lists(v, max_size=2), max_leaves=4)


@examples(100)
@given(st.dictionaries(st.sampled_from(sorted(FIELDS)), VALUES, max_size=3))
def test_any_values_are_taken_or_refused(fields):
    try:
        what = asked({"prompt": "a", **fields}, None, MODEL, LIMITS)
    except UsageError:
        return
    pixels = what.arguments["width"] * what.arguments["height"]
    assert pixels <= LIMITS.pixels and what.arguments["num_frames"] <= LIMITS.frames


# -- images ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_images_are_decoded(form):
    assert decoded_image(encoded(form), 48).shape == (6, 8, 3)


@pytest.mark.parametrize("data", STRANGE.values(), ids=STRANGE)
def test_strange_images_are_refused_with_a_reason(data):
    with pytest.raises(UsageError) as error:
        decoded_image(data, 20_000)
    assert len(str(error.value).splitlines()) == 3


def test_an_image_is_decoded_in_a_process_of_its_own(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    model, target = dataclasses.replace(MODEL, task="i2v"), tmp_path / "x.png"
    fields = {"prompt": "a", "fit": "adaptive", "size": "64x64", "seed": 1}
    apart = lambda data: asyncio.run(asked_apart(fields, data, model, LIMITS, target))
    assert apart(buffer.getvalue()) == asked(fields, image, model, LIMITS)
    np.testing.assert_array_equal(np.asarray(Image.open(target)), image)
    with pytest.raises(UsageError, match="is not an image that is taken") as error:
        apart(STRANGE["text"])
    assert error.value.fix == "save it as one of them"


def test_a_decoder_that_hangs_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(asking, "DECODING", 0.01)
    with pytest.raises(UsageError, match="cannot be decoded"):
        asyncio.run(asked_apart({"prompt": "a"}, b"x", MODEL, LIMITS, tmp_path / "x.png"))
