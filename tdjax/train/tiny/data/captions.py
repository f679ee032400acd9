"""Captions of procedural clips: a small closed language, written from attributes, read back into
them, and its words."""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Sequence

import numpy as np

from tdjax.media.scenes.factors import FIRST_BOUNCE, NAMES, STILL, UNSAID, Attributes, scenes
from tdjax.text import language
from tdjax.text.language import words_of

# Ways to say each value of a factor, the plainest first; it is used half of the time.
_WAYS = {
    "shape": (("circle", "disc"), ("square", "box"), ("triangle",), ("cross", "plus")),
    "colour": tuple((name,) for name in NAMES["colour"]),
    "background": (("black",), ("gray", "grey"), ("navy",), ("olive",)),
    "size": (("small", "little", "tiny"), ("large", "big")),
    "speed": (("slowly", "gently"), ("quickly", "fast", "rapidly")),
}
VERBS = (("moves", "moving"), ("drifts", "drifting"), ("slides", "sliding"))
TOWARDS = (
    ("left", "to the left"),
    ("right", "to the right"),
    ("up", "upwards"),
    ("down", "downwards"),
)
BOUNCE = ("bounces", "bouncing")
STAYS = (
    ("stays still", "staying still"),
    ("stands still", "standing still"),
    ("does not move", "not moving"),
)
BOUNCES = (("horizontally", "from side to side", "left and right"), ("vertically", "up and down"))
ON, PLAIN = ("on", "over"), ("", "plain")
TEMPLATES = (
    "a {size} {colour} {shape} {verb} {speed} {on} a {plain} {background} background",
    "{on} {background}, a {colour} {shape}, {size}, {gerund} {speed}",
    "a {plain} {background} background and a {size} {colour} {shape} {gerund} {speed}",
    "the {size} {colour} {shape} {verb} {speed}, the background is {background}",
    "{size} {colour} {shape} {speed} {gerund}, {plain} {background} background",
)
# no caption of training has this order
EVALUATION = "a {colour} {shape}, {size}, {verb} {speed} over the {background} background"
OMITTED = ("size", "speed")  # what a caption may leave out

# Single words that name a value, for reading; the words of a motion are read together.
SAYS = {
    way: (factor, i)
    for factor, values in _WAYS.items()
    for i, ways in enumerate(values)
    for way in ways
}
HEADINGS = {"left": 0, "right": 1, "up": 2, "upwards": 2, "down": 3, "downwards": 3}
# Where values stand that both shapes and backgrounds could have, and those that are near where only
# the other has one: "a gray circle", "on a blue background".
STANDS = {
    "background": {
        "before": ("background",),
        "after": (*((word,) for word in ON), ("background", "is")),
        "between": ("a", "an", "the", *PLAIN[1:]),
    },
    "colour": {
        "before": tuple(way for ways in _WAYS["shape"] for way in ways),
        "after": (),
        "between": (),
    },
}
NEAR = (("blue", "navy"), ("green", "olive"), ("white", "gray"))
AXES = {"horizontally": 0, "side": 0, "left": 0, "right": 0, "vertically": 1, "up": 1, "down": 1}


def caption(
    said: dict[str, int], rng: random.Random, template: str | None = None, omit: Sequence[str] = ()
) -> str:
    """Returns one caption of one clip. said: factor -> place in NAMES; a factor that is UNSAID, or
    in `omit` (of OMITTED), is left out.

    template: one of TEMPLATES or EVALUATION; None draws one of TEMPLATES.
    """
    stray = [name for name in omit if name not in OMITTED]
    if stray:
        raise ValueError(
            f"a caption cannot leave out {', '.join(stray)}; it can leave out {', '.join(OMITTED)}"
        )
    verb, gerund = _motion(said["motion"], rng)
    words = {"verb": verb, "gerund": gerund, "on": _either(ON, rng), "plain": _either(PLAIN, rng)}
    for factor, values in _WAYS.items():
        silent = factor in omit or said[factor] == UNSAID
        words[factor] = "" if silent else _either(values[said[factor]], rng)
    text = " ".join((template or rng.choice(TEMPLATES)).format(**words).split())
    return re.sub(r"\ba (?=[aeiou])", "an ", re.sub(r"[ ,]*,", ",", text))


def _motion(which: int, rng: random.Random) -> tuple[str, str]:
    """The motion as a finite verb and as a participle."""
    if which == STILL:
        return _either(STAYS, rng)
    if which >= FIRST_BOUNCE:
        verbs, where = BOUNCE, _either(BOUNCES[which - FIRST_BOUNCE], rng)
    else:
        verbs, where = _either(VERBS, rng), _either(TOWARDS[which], rng)
    return tuple(f"{verb} {where}" for verb in verbs)


def _either(ways: Sequence, rng: random.Random):
    """The first way half of the time, else any of the others."""
    return ways[0] if len(ways) == 1 or rng.random() < 0.5 else rng.choice(ways[1:])


def captions(
    said: Attributes, seed: int, template: str | None = None, omit: Sequence[str] = ()
) -> list[str]:
    """Returns a caption for every clip of a batch; the same for the same seed."""
    rng = random.Random(seed)
    columns = {
        field.name: np.asarray(getattr(said, field.name)).tolist()
        for field in dataclasses.fields(Attributes)
    }
    rows = zip(*columns.values(), strict=True)
    return [caption(dict(zip(columns, row, strict=True)), rng, template, omit) for row in rows]


def random_prompt(seed: int, split: str = "train", template: str | None = None) -> str:
    """Returns a caption of a clip that does not exist yet, for trying the model."""
    rng = random.Random(seed)
    scene = rng.choice(scenes(split).tolist())
    said = dict(zip(("shape", "colour", "background"), scene, strict=True))
    said |= {factor: rng.randrange(len(NAMES[factor])) for factor in ("size", "motion", "speed")}
    if said["motion"] == STILL:
        said["speed"] = UNSAID
    return caption(said, rng, template)


def free_prompt(seed: int, split: str = "train") -> str:
    """Returns a prompt as no template has it: any order, any synonyms, each factor left out in one
    of six."""
    rng = random.Random(f"free {seed}")
    said = dict(
        zip(("shape", "colour", "background"), rng.choice(scenes(split).tolist()), strict=True)
    )
    motion = rng.randrange(len(NAMES["motion"]))
    way = lambda factor, place: _either(_WAYS[factor][place], rng)
    pieces = {factor: way(factor, place) for factor, place in said.items()}
    pieces["background"] = f"{_either(ON, rng)} {pieces['background']}"
    pieces["size"] = way("size", rng.randrange(2))
    pieces["motion"] = rng.choice(_motion(motion, rng))
    if motion != STILL:
        pieces["speed"] = way("speed", rng.randrange(2))
    kept = [text for text in pieces.values() if rng.random() > 1 / 6] or list(pieces.values())
    rng.shuffle(kept)
    return rng.choice((" ", ", ")).join(kept)


# -- reading ---------------------------------------------------------------------------------------


def parse(prompts: Sequence[str]) -> Attributes:
    """Returns what prompts ask for: the attributes that their words name, UNSAID where none does.
    The last word on a factor counts."""
    rows = [parse_one(prompt) for prompt in prompts]
    column = lambda factor: np.int32([row.get(factor, UNSAID) for row in rows])
    return Attributes(**{factor: column(factor) for factor in NAMES})


def parse_one(prompt: str) -> dict[str, int]:
    """Returns the factors that one prompt names."""
    return {factor: places[-1] for factor, places in language.said(LANGUAGE, prompt).items()}


def vocabulary() -> list[str]:
    """Returns every word that a caption of training can have, sorted."""
    texts = ["an", *TEMPLATES, *ON, *PLAIN, *SAYS]
    for group in (*VERBS, *TOWARDS, BOUNCE, *BOUNCES, *STAYS):
        texts += group
    return sorted({word for text in texts for word in words_of(re.sub(r"{\w+}", " ", text))})


def knows() -> dict[str, tuple[str, ...]]:
    """Returns what a model of these captions can be asked for: factor -> values in their plainest
    words."""
    plain = {factor: tuple(ways[0] for ways in values) for factor, values in _WAYS.items()}
    straight = [f"moves {ways[0]}" for ways in TOWARDS]
    bounces = [f"bounces {ways[0]}" for ways in BOUNCES]
    plain["motion"] = (*straight, STAYS[0][0], *bounces)
    return {factor: plain[factor] for factor in NAMES}


def orders() -> list[list[str]]:
    """Returns the factors of each template in its order; its verb is where the motion is."""
    fields = {"verb": "motion", "gerund": "motion"}
    named = lambda text: [fields.get(word, word) for word in re.findall(r"{(\w+)}", text)]
    return [[word for word in named(text) if word in NAMES] for text in TEMPLATES]


def near() -> dict[str, dict[str, int]]:
    """Returns {colour or background: {the other factor: place of the value taken for it}}."""
    colours, backgrounds = NAMES["colour"], NAMES["background"]
    out = {colour: {"background": backgrounds.index(other)} for colour, other in NEAR}
    return out | {
        way: {"colour": colours.index(colour)}
        for colour, other in NEAR
        for way in _WAYS["background"][backgrounds.index(other)]
    }


# What is written into model.json; `tdjax.text.language` reads it.
LANGUAGE = {
    "words": vocabulary(),
    "knows": knows(),
    "needs": [factor for factor in NAMES if factor not in OMITTED],
    "says": SAYS,
    "phrases": {
        "motion": [
            {"when": BOUNCE, "says": {word: FIRST_BOUNCE + axis for word, axis in AXES.items()}},
            {"when": ("still", "not"), "says": {"still": STILL, "not": STILL}},
            {"when": (), "says": HEADINGS},
        ]
    },
    "orders": orders(),
    "caption": "a {size} {colour} {shape} {motion} {speed} on a {background} background",
    "apart": [["motion", STILL, "speed"]],
    "stands": STANDS,
    "near": near(),
}
