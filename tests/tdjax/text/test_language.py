"""The closed language of the demo: captions of training are read as they were written, and what was
never trained is told."""

import json
import random
from pathlib import Path

import pytest

from tdjax.checkpoints.folders import _read_facts
from tdjax.errors import CheckpointError
from tdjax.media.scenes.factors import STILL, UNSAID
from tdjax.text.language import asked, caption_of, language_notes, said, understood
from tdjax.train.tiny.data.captions import (
    LANGUAGE,
    TEMPLATES,
    caption,
    free_prompt,
    parse,
    random_prompt,
)


@pytest.mark.parametrize("template", TEMPLATES)
def test_captions_of_training_have_no_notes_and_are_read_back(template):
    for seed in range(200):
        prompt = random_prompt(seed, template=template)
        assert language_notes(LANGUAGE, prompt) == [], prompt
        assert "background" not in understood(LANGUAGE, prompt).partition("left to chance")[2]
    rng = random.Random(0)
    for motion in range(7):
        values = {"shape": 1, "colour": 2, "background": 3, "size": 0, "motion": motion}
        values["speed"] = UNSAID if motion == STILL else 1
        text = caption(values, rng, template)
        expected = {factor: [place] for factor, place in values.items() if place != UNSAID}
        assert said(LANGUAGE, text) == expected


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("blue", ["no shape and no background and no motion"]),
        ("moves down", ["no shape and no colour and no background"]),
        ("a blue circle and red moves up on black", ["the colour 2 times (blue and red)"]),
        ("a red circle on a red background moves up", ["the background red, it knows black"]),
        ("on blue, a red circle moves up", ["gray, navy, olive: navy is taken"]),
        ("a navy circle moves up on gray", ["the colour navy, it knows red"]),
        (
            "a red circle and a blue square stand still on black",
            ["never seen 'stand'", "(red and blue)", "(circle and square)"],
        ),
        ("a red circle moving left moving up on black", ["(moves left and moves up)"]),
        ("a red circle moves left and bounces vertically on gray", ["the motion 2 times"]),
        ("a big small red circle moves left on gray", ["the size 2 times (large and small)"]),
        ("ein roter Kreis", ["never seen 'ein', 'roter', 'kreis'"]),
        ("红色圆圈", ["never seen"]),
        ("", ["the prompt is empty"]),
        (" .,! ", ["the prompt is empty"]),
    ],
)
def test_what_was_never_trained_is_told(prompt, parts):
    lines = language_notes(LANGUAGE, prompt)
    assert len(lines) == len(parts)
    assert all(part in line for line, part in zip(lines, parts, strict=True))


def test_captions_of_training_are_read_as_they_are():
    for seed in range(200):
        for template in TEMPLATES:
            prompt = random_prompt(seed, template=template)
            assert caption_of(LANGUAGE, prompt) == prompt


def test_other_prompts_are_read_as_a_caption_of_what_they_say():
    """In any order; of what is named twice the last counts; what is missing is drawn, the same for
    the same prompt."""
    read = lambda prompt: caption_of(LANGUAGE, prompt)
    assert read("moving right, on navy: a circle, red") == (
        "a red circle moves right on a navy background"
    )
    assert read("up, orange disc on black, tiny") == (
        "a small orange circle moves up on a black background"
    )
    assert read("an orange box over gray, not moving, cyan") == (
        "a cyan square stays still on a gray background"
    )
    assert read("blue").startswith("a blue ") and read("blue") == read("Blue!")
    assert read("a red fox moves left on black") != read("a red circle moves left on black")
    assert read("") == "" and "  " not in read("ein roter Kreis")
    for seed in range(300):
        prompt = free_prompt(seed)
        found, wanted = said(LANGUAGE, read(prompt)), said(LANGUAGE, prompt)
        assert wanted.items() <= found.items(), prompt
        assert set(LANGUAGE["needs"]) <= found.keys()


@pytest.mark.parametrize(
    ("prompt", "read"),
    [
        ("a red circle moves right on a blue background", "red circle moves right on a navy"),
        ("on a plain green, a red circle moving up", "red circle moves up on a olive"),
        ("a cross, red, moves up; the background is white", "red cross moves up on a gray"),
        ("a grey disc moves down over black", "white circle moves down on a black"),
        ("on olive circle red moves up", "red circle moves up on a olive"),
        ("a red circle moves up on blue circle", "blue circle moves up on"),
    ],
)
def test_a_word_says_what_it_stands_for(prompt, read):
    assert read.replace("a olive", "an olive") in caption_of(LANGUAGE, prompt)


def test_a_background_that_no_clip_has_is_drawn_and_is_not_the_shape():
    read = caption_of(LANGUAGE, "a white circle moves right on a red background")
    assert read.startswith("a white circle moves right on a") and "red" not in read
    line = understood(LANGUAGE, "a white circle moves right on a red background")
    assert "colour white" in line and "drawn: background" in line


@pytest.mark.parametrize("prompt", ["", " .,! ", "blue", "ein roter Kreis", "up, quickly"])
def test_what_is_asked_for_is_what_the_model_reads(prompt):
    """Also of prompts in free words."""
    for each in (prompt, *map(free_prompt, range(100))):
        read = parse([caption_of(LANGUAGE, each)])
        places = {f: int(getattr(read, f)[0]) for f in LANGUAGE["knows"]}
        assert asked(LANGUAGE, each) == {f: i for f, i in places.items() if i != UNSAID}, each


def test_older_languages_have_nothing_drawn():
    older = {"words": ["a", "circle"], "knows": LANGUAGE["knows"], "says": {"circle": ["shape", 0]}}
    assert asked(older, "a circle") == {"shape": 0} and asked(older, "a") == {}


def test_what_is_understood():
    line = understood(LANGUAGE, "A RED disc, moving to the right, over navy")
    assert line == (
        "understood: colour red, shape circle, motion moves right, background navy;"
        " left to chance: size, speed"
    )


def test_folders_that_say_less_are_read():
    old = {name: LANGUAGE[name] for name in ("words", "knows")}
    assert caption_of(old, "moves left blue") == "moves left blue"
    assert "drawn: shape" in understood(LANGUAGE, "blue")
    assert language_notes(old, "blue") == [] and "'fox'" in language_notes(old, "fox")[0]


def test_of_thirty_prompts_those_that_make_no_sense_are_told():
    """docs/scripts/free_prompts.py has the detector judge their clips."""
    file = Path(__file__).parents[3] / "docs/scripts/thirty_prompts.txt"
    notes = [language_notes(LANGUAGE, prompt) for prompt in file.read_text().splitlines()]
    ordinary, odd, unknown = notes[:12], notes[12:22], notes[22:]
    assert not any(ordinary) and len(unknown) == 8 and all(unknown)
    # Those that say everything once, in another order.
    assert [i for i, told in enumerate(odd) if not told] == [0, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stands": {"colour": 3}}, "is 3, not a table"),
        ({"stands": {"colour": {"before": [], "between": []}}}, "after"),
        ({"stands": {"weight": {"before": [], "after": [], "between": []}}}, "values of 'weight'"),
        ({"near": None}, "near is None"),
        ({"near": {"navy": {"colour": 99}}}, "no value 99 of 'colour'"),
        ({"needs": ["weight"]}, "values of 'weight'"),
        ({"apart": [["shape", 0, "weight"]]}, "values of 'weight'"),
        ({"apart": [["shape", place, "speed"] for place in range(4)]}, "no value of 'shape'"),
        ({"caption": "a {shape"}, "braces"),
        ({"caption": "a {weight}"}, "braces"),
    ],
)
def test_a_language_that_does_not_fit_together(tmp_path, change, message):
    path = tmp_path / "model.json"
    path.write_text(json.dumps({"language": {**LANGUAGE, **change}}))
    with pytest.raises(CheckpointError, match=message):
        _read_facts(path)
    path.write_text(json.dumps({"language": LANGUAGE}))
    _read_facts(path)
