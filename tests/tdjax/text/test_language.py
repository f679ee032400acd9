"""The closed language of the demo: captions of training are read as they were written, and what was
never trained is told."""

import random

import pytest

from tdjax.text.language import language_notes, said, understood
from tdjax.train.tiny.data.captions import LANGUAGE, TEMPLATES, caption, random_prompt
from tdjax.train.tiny.data.factors import STILL, UNSAID


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
        ("a red circle on a red background", ["no background", "the colour 2 times (red and red)"]),
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


def test_what_is_understood():
    line = understood(LANGUAGE, "A RED disc, moving to the right, over navy")
    assert line == (
        "understood: colour red, shape circle, background navy, motion moves right;"
        " left to chance: size, speed"
    )


def test_folders_that_say_less_are_read():
    old = {name: LANGUAGE[name] for name in ("words", "knows")}
    assert language_notes(old, "blue") == [] and "'fox'" in language_notes(old, "fox")[0]
