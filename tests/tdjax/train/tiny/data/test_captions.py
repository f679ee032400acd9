"""Captions say their attributes and nothing else; the words are closed; reading is the inverse of
writing."""

import jax
import numpy as np
import pytest

from tdjax.media.scenes import clips
from tdjax.media.scenes.factors import FIRST_BOUNCE, HELD_OUT, NAMES, STILL, UNSAID
from tdjax.train.tiny.data import captions

PROMPT = "a small red circle moves left slowly on a gray background"


@pytest.fixture(scope="module")
def said():
    return jax.tree.map(np.asarray, clips.sample(jax.random.key(1), 4096, "all").said)


def ids(**values):
    return {k: NAMES[k].index(values[k]) if k in values else UNSAID for k in NAMES}


@pytest.mark.parametrize("template", [None, captions.EVALUATION])
def test_reading_is_the_inverse_of_writing(said, template):
    read = captions.parse(captions.captions(said, 3, template))
    for name in NAMES:
        assert np.array_equal(getattr(read, name), getattr(said, name)), name


def test_omitted_factors_are_not_said(said):
    texts = captions.captions(said, 3, omit=("size", "speed"))
    read = captions.parse(texts)
    assert (read.size == UNSAID).all() and (read.speed == UNSAID).all()
    assert np.array_equal(read.motion, said.motion)
    assert not any(
        ",," in text or ", ," in text or "  " in text or " ," in text or text[-1] in " ,"
        for text in texts
    )
    with pytest.raises(ValueError, match="it can leave out size, speed"):
        captions.captions(said, 3, omit=("colour",))


def test_captions_are_english_and_seeded(said):
    texts = captions.captions(said, 3)
    assert texts == captions.captions(said, 3) != captions.captions(said, 4)
    assert not any(f" a {vowel}" in f" {text}" for text in texts for vowel in "aeiou")
    assert not any(
        ",," in text or "  " in text or " ," in text or text != text.strip(" ,") for text in texts
    )
    assert len({text.split()[0] for text in texts}) >= 5


def test_the_plain_words_of_the_first_template():
    class First:
        def random(self):
            return 0.0

    assert captions.caption(captions.parse_one(PROMPT), First(), captions.TEMPLATES[0]) == PROMPT


def words_in(texts):
    return {word for text in texts for word in captions.words_of(text)}


def test_words_are_without_case_and_punctuation():
    assert captions.words_of("A cat over the Red, 猫 cat!") == [
        "a",
        "cat",
        "over",
        "the",
        "red",
        "猫",
        "cat",
    ]
    assert captions.words_of("") == []


def test_every_way_is_used(said):
    words = words_in(captions.captions(said, 3))
    assert words == set(captions.vocabulary())  # the list is complete, and nothing in it is idle


def test_evaluation_uses_known_words_in_an_order_of_its_own(said):
    texts = captions.captions(said, 3, captions.EVALUATION)
    assert words_in(texts) <= set(captions.vocabulary())
    assert not set(texts) & set(captions.captions(said, 3))
    assert captions.EVALUATION not in captions.TEMPLATES


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (
            PROMPT,
            ids(
                shape="circle",
                colour="red",
                background="gray",
                size="small",
                motion="left",
                speed="slowly",
            ),
        ),
        (
            "on gray, a red circle, small, drifting left",
            ids(shape="circle", colour="red", background="gray", size="small", motion="left"),
        ),
        (
            "A BIG box drifts slowly to the right!",
            ids(shape="square", size="large", motion="right", speed="slowly"),
        ),
        (
            "white plus bouncing up and down over navy",
            ids(shape="cross", colour="white", background="navy", motion="bounces vertically"),
        ),
        (
            "a disc bounces left and right fast",
            ids(shape="circle", motion="bounces horizontally", speed="quickly"),
        ),
        ("it does not move", ids(motion="still")),
        ("", ids()),
        ("a cat on a skateboard", ids()),
    ],
)
def test_prompts_are_read(prompt, expected):
    read = captions.parse([prompt])
    assert {name: int(getattr(read, name)[0]) for name in NAMES} == expected


def test_what_is_known_can_be_said():
    for name, values in captions.knows().items():
        read = [captions.parse_one(value)[name] for value in values]
        assert read == list(range(len(NAMES[name])))
        assert words_in(values) <= set(captions.vocabulary())


def test_random_prompts():
    prompts = [captions.random_prompt(seed) for seed in range(400)]
    assert (
        prompts == [captions.random_prompt(seed) for seed in range(400)] and len(set(prompts)) > 390
    )
    read = captions.parse(prompts)
    assert all((getattr(read, name) != UNSAID).all() for name in NAMES if name != "speed")
    assert (
        np.array_equal(read.speed == UNSAID, read.motion == STILL)
        and (read.motion >= FIRST_BOUNCE).any()
    )
    pairs = lambda read: {
        (NAMES["shape"][i], NAMES["colour"][j])
        for i, j in zip(read.shape, read.colour, strict=True)
    }
    assert not pairs(read) & set(HELD_OUT)
    held = captions.parse(
        [captions.random_prompt(seed, "held_out", captions.EVALUATION) for seed in range(60)]
    )
    assert pairs(held) == set(HELD_OUT)
