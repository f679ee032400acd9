"""The widget's page holds every frame exactly, and says what it cannot compare."""

import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from tdjax.errors import UsageError
from tdjax.media.comparison import WIDTH, Comparison

RNG = np.random.default_rng(0)


def noise(frames=5, height=6, width=10):
    return RNG.integers(0, 256, (frames, height, width, 3), np.uint8)


def about(widget):
    return json.loads(re.search(r"const about = (\{.*\});", widget._repr_html_())[1])


def frames(about, number):
    """The clip that a page's script would draw."""
    data = base64.b64decode(about["sheets"][number].partition("base64,")[2])
    sheet = np.asarray(Image.open(io.BytesIO(data)))
    w, h, columns = about["width"], about["height"], about["columns"]
    corners = [(i // columns * h, i % columns * w) for i in range(about["frames"])]
    return np.stack([sheet[y : y + h, x : x + w] for y, x in corners])


def test_every_frame_is_kept():
    clips = {"1 step": noise(), "2 steps": noise(), "<script>&": noise()}
    widget = Comparison(clips, fps=8)
    found, text = about(widget), widget._repr_html_()
    assert found["names"] == list(clips) and found["fps"] == 8
    for number, clip in enumerate(clips.values()):
        assert np.array_equal(frames(found, number), clip)
    assert text.count("<script>") == 1 and "\\u003cscript>&" in text
    assert not re.search(r"@[A-Z]+@", text) and "http" not in text
    assert repr(widget) == "Comparison(1 step, 2 steps, <script>&)"


def test_wide_frames_are_made_smaller():
    found = about(Comparison({"wide": noise(3, 40, 2 * WIDTH)}))
    assert (found["width"], found["height"], found["frames"]) == (WIDTH, 20, 3)
    assert frames(found, 0).shape == (3, 20, WIDTH, 3)


def test_two_widgets_have_marks_of_their_own():
    pages = [Comparison({"a": noise()})._repr_html_() for _ in range(2)]
    marks = [re.search('data-tdjax="(.*?)"', page)[1] for page in pages]
    assert marks[0] != marks[1]


@pytest.mark.parametrize(
    "clips, said",
    [
        ({}, "no clips"),
        ({"a": noise()[0]}, r"uint8 \[6, 10, 3\]"),
        ({"a": noise() / 255}, "float64"),
        ({"a": noise(), "b": noise(4)}, "different shapes"),
    ],
)
def test_what_cannot_be_compared_is_named(clips, said):
    with pytest.raises(UsageError, match=said) as error:
        Comparison(clips)
    assert len(str(error.value).splitlines()) == 3
