"""What a procedural clip can show: the values of every factor by name, and dataclasses of arrays
that say which."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import numpy as np

FRAMES, SIDE = 33, 64  # pixels of a square frame

SHAPES = ("circle", "square", "triangle", "cross")
# In [-1, 1]^3 every two colours are at least 0.7 apart, and every colour 0.9 from every background,
# so that all pairs are clear.
COLOURS = {
    "red": "#e01818",
    "green": "#18d038",
    "blue": "#2848ff",
    "yellow": "#fff000",
    "magenta": "#f020e0",
    "cyan": "#20e8f0",
    "white": "#ffffff",
    "orange": "#ff8800",
}
BACKGROUNDS = {"black": "#000000", "gray": "#808080", "navy": "#001058", "olive": "#585c08"}
SIZES = {"small": 7.0, "large": 11.0}  # half the side of the square that holds the shape, in pixels
SPEEDS = {"slowly": 0.5, "quickly": 1.0}  # pixels a frame
# Unit vectors (x to the right, y down). A bounce starts along its vector or against it.
MOTIONS = {
    "left": (-1, 0),
    "right": (1, 0),
    "up": (0, -1),
    "down": (0, 1),
    "still": (0, 0),
    "bounces horizontally": (1, 0),
    "bounces vertically": (0, 1),
}
STILL, FIRST_BOUNCE = 4, 5  # places in MOTIONS; motions below FIRST_BOUNCE can be learnt first
NAMES = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "background": tuple(BACKGROUNDS),
    "size": tuple(SIZES),
    "motion": tuple(MOTIONS),
    "speed": tuple(SPEEDS),
}
# The value of a factor that a caption leaves open, and of the speed of what stays still.
UNSAID = -1

# Pairs kept from training: 3 of 32.
HELD_OUT = (
    ("circle", "cyan"),
    ("triangle", "yellow"),
    ("cross", "magenta"),
)
SPLITS = ("train", "held_out", "all")


def _rgb(hexes) -> np.ndarray:  # "#rrggbb" x n -> f32[n 3] in [-1, 1]
    return np.float32([[int(h[i : i + 2], 16) / 127.5 - 1 for i in (1, 3, 5)] for h in hexes])


COLOUR_RGB = _rgb(COLOURS.values())
BACKGROUND_RGB = _rgb(BACKGROUNDS.values())
RADIUS = np.float32(list(SIZES.values()))
SPEED = np.float32(list(SPEEDS.values()))
DIRECTION = np.float32(list(MOTIONS.values()))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Attributes:
    """What a caption says of each clip: places in NAMES, i32[b], UNSAID where it says nothing."""

    shape: jax.Array | np.ndarray
    colour: jax.Array | np.ndarray
    background: jax.Array | np.ndarray
    size: jax.Array | np.ndarray
    motion: jax.Array | np.ndarray
    speed: jax.Array | np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Factors:
    """Whole clips: the captioned attributes, and what is free.

    start: f32[b 2], centre (x, y) of the object in frame 0, in pixels from the left and top edge of
    the frame.
    heading: f32[b], 1, or -1 for a bounce that starts to the left or upwards.
    """

    said: Attributes
    start: jax.Array | np.ndarray
    heading: jax.Array | np.ndarray


def scenes(split: str) -> np.ndarray:
    """Returns every allowed (shape, colour, background) of a split, i32[n 3]. "train" is without
    the HELD_OUT pairs."""
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; allowed: {', '.join(SPLITS)}")
    held_out = split == "held_out"
    pairs = [
        (i, j)
        for (i, shape), (j, colour) in itertools.product(enumerate(SHAPES), enumerate(COLOURS))
        if split == "all" or ((shape, colour) in HELD_OUT) == held_out
    ]
    return np.int32([(i, j, k) for i, j in pairs for k in range(len(BACKGROUNDS))])
