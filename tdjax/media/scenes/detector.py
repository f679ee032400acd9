"""What a clip shows, measured from its pixels alone: no network, the same numbers on every run.

A clip is [33 64 64 3] in [-1, 1]. Everything is written for one clip; `measure` maps it over a
batch, some clips at a time.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, reduce
from jax import lax

from tdjax.media.scenes import clips
from tdjax.media.scenes.factors import (
    BACKGROUND_RGB,
    COLOUR_RGB,
    FRAMES,
    MOTIONS,
    RADIUS,
    SHAPES,
    SIDE,
    SPEED,
    STILL,
    UNSAID,
    Attributes,
)

_AT_ONCE = 16  # clips measured together, for memory
_DIFFERENT = 0.5  # distance from the background at which a pixel belongs to the object
_AREA = 20.0  # less is no object in a frame
_FRAMES_MISSING = 3  # no object in more frames is no object in the clip
_RECOGNISED = 0.5  # overlap with the best template below which the object has none of the shapes
_EVERY = 4  # shape and size are judged on every 4th frame: 9 of 33
# How many pixels (RMS over frames) a model of motion must gain on the next simpler one. A straight
# track at 0.1 px/frame is 1.0 px from "still"; the V of the slowest bounce is 1.6 px or more from
# every straight track.
_STRAIGHT_GAIN = 1.0
_BOUNCE_GAIN = 0.5
_DIAGONALS = ((1, 1), (1, -1), (-1, 1), (-1, -1))  # motions that no caption asks for
# Frames at which a bounce may meet its wall.
_TURNS = np.arange(4.0, 28.0 + 1 / 16, 1 / 16, np.float32)
_RATIO = 2**0.5  # a speed counts as one of SPEED within this factor


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """What clips show, one value a clip (f32[b] unless said).

    seen: places in factors.NAMES; UNSAID for a shape like none of ours, a diagonal motion, a speed
    near none of ours (and of what stays still), and for all of them where there is no object.
    present: bool[b], an object is there. flicker: deviation over frames of the border's colour.
    colour_error: distance of the object's colour from the named one. overlap: with the best
    template. speed: px/frame of the fitted motion. start: f32[b 2], its position (x, y) in frame 0.
    constancy: RMS distance of the track from it, px. area_cv: deviation of the area over its mean.
    """

    seen: Attributes
    present: jax.Array
    flicker: jax.Array
    colour_error: jax.Array
    overlap: jax.Array
    speed: jax.Array
    start: jax.Array
    constancy: jax.Array
    area_cv: jax.Array


@jax.jit
def measure(videos) -> Measured:  # f32[b t h w 3] in [-1, 1], or uint8
    """Returns what every clip of a batch shows by itself. Raises ValueError for another size."""
    if videos.shape[1:] != (FRAMES, SIDE, SIDE, 3):
        raise ValueError(
            f"the detector takes clips of {(FRAMES, SIDE, SIDE, 3)}, got {videos.shape[1:]}"
        )
    floats = lambda video: jnp.clip(video, -1, 1)
    if videos.dtype == jnp.uint8:
        floats = clips.from_uint8
    return lax.map(lambda video: _measure_one(floats(video)), videos, batch_size=_AT_ONCE)


def _measure_one(video) -> Measured:  # [t h w 3]
    ground, flicker = _border(video)
    weight, colour = _mask(video, ground)
    area = reduce(weight, "t h w -> t", "sum")
    valid = (area >= _AREA).astype(jnp.float32)
    present = valid.sum() >= FRAMES - _FRAMES_MISSING
    centre = _centroid(weight, area)
    (shape, size), overlap = _best_template(weight, centre)
    motion, speed, start, constancy = _best_motion(centre, valid)
    named, colour_error = _nearest(colour, COLOUR_RGB)
    mean = _average(area, valid)
    seen = Attributes(
        shape=jnp.where(overlap >= _RECOGNISED, shape, UNSAID),
        colour=named,
        background=_nearest(ground, BACKGROUND_RGB)[0],
        size=jnp.where(overlap >= _RECOGNISED, size, UNSAID),
        motion=jnp.where(motion < len(MOTIONS), motion, UNSAID),
        speed=jnp.where(motion == STILL, UNSAID, _nearest_speed(speed)),
    )
    there = lambda x: jnp.where(present, x, jnp.nan)
    return Measured(
        seen=jax.tree.map(lambda i: jnp.where(present, i, UNSAID), seen),
        present=present,
        flicker=flicker,
        colour_error=there(colour_error),
        overlap=there(overlap),
        speed=there(speed),
        start=there(start),
        constancy=there(constancy),
        area_cv=there(jnp.sqrt(_average(jnp.square(area - mean), valid)) / mean),
    )


# -- one clip: colours, mask, shape ----------------------------------------------------------------


def _border(video):  # [t h w 3] -> colour [3], flicker []
    """Median colour of the frame's outermost pixels over all frames; RMS over channels of its
    deviation from frame to frame."""
    rows = video[:, :: SIDE - 1]
    columns = rearrange(video[:, 1:-1, :: SIDE - 1], "t h w c -> t w h c")
    edge = jnp.concatenate([rearrange(x, "t a b c -> t (a b) c") for x in (rows, columns)], axis=1)
    colour = jnp.median(rearrange(edge, "t n c -> (t n) c"), axis=0)
    frames = jnp.median(edge, axis=1)
    return colour, jnp.sqrt(jnp.var(frames, axis=0).mean())


def _mask(video, ground):  # [t h w 3], [3] -> weight [t h w] in 0..1, the object's colour [3]
    """How much of each pixel is the object: its distance from the background as a share of the
    whole object's.

    Pixels beside those that differ count too: without the faint half of its edge an object seems to
    move by whole pixels.
    """
    distance = jnp.sqrt(jnp.square(video - ground).sum(-1))
    inside = distance > _DIFFERENT
    middle = jnp.where(~_grown(~inside), distance, 0)
    total = jnp.einsum("thw,thwc->c", middle, video, precision=lax.Precision.HIGHEST)
    colour = total / jnp.maximum(middle.sum(), 1e-6)
    full = jnp.maximum(jnp.sqrt(jnp.square(colour - ground).sum()), _DIFFERENT)
    return jnp.where(_grown(inside), jnp.minimum(distance / full, 1), 0), colour


def _grown(inside):  # bool[t h w] -> bool[t h w]
    """With the eight neighbours of every pixel; the frame's sides are neighbours too."""
    for axis in (1, 2):
        inside = inside | jnp.roll(inside, 1, axis) | jnp.roll(inside, -1, axis)
    return inside


def _centroid(weight, area):  # [t h w], [t] -> (x, y) [t 2]
    """The middle of the frame where there is nothing."""
    pixel = jnp.arange(SIDE, dtype=jnp.float32) + 0.5 - SIDE / 2
    x = jnp.sum(reduce(weight, "t h w -> t w", "sum") * pixel, -1)
    y = jnp.sum(reduce(weight, "t h w -> t h", "sum") * pixel, -1)
    return jnp.stack([x, y], -1) / rearrange(jnp.maximum(area, 1e-6), "t -> t 1") + SIDE / 2


def _best_template(weight, centre):  # [t h w], [t 2] -> (shape, size) i32, overlap []
    """The shape and size with the largest overlap (sum of minima over sum of maxima) when drawn at
    the measured centroid."""
    weight, centre = weight[::_EVERY], centre[::_EVERY]
    shapes, sizes = (
        rearrange(i, "shape size -> (shape size)")
        for i in np.indices((len(SHAPES), len(RADIUS)), np.int32)
    )

    def overlap(shape, size):
        at = centre - jnp.asarray(clips.centroid_offset())[shape, size]
        template = clips.coverage(shape[None], jnp.asarray(RADIUS)[size][None], at[None])[0]
        shared = jnp.minimum(weight, template).sum((1, 2))
        return jnp.mean(shared / jnp.maximum(weight, template).sum((1, 2)))

    overlaps = jax.vmap(overlap)(jnp.asarray(shapes), jnp.asarray(sizes))
    best = jnp.argmax(overlaps)
    return (jnp.asarray(shapes)[best], jnp.asarray(sizes)[best]), overlaps[best]


def _nearest(colour, table):  # [3], [n 3] -> i32[], distance []
    distance = jnp.sqrt(jnp.square(table - colour).sum(-1))
    return jnp.argmin(distance).astype(jnp.int32), distance.min()


def _nearest_speed(speed):
    ratio = jnp.abs(jnp.log(jnp.maximum(speed, 1e-6) / SPEED))
    close = ratio.min() < np.float32(np.log(_RATIO))
    return jnp.where(close, jnp.argmin(ratio), UNSAID).astype(jnp.int32)


# -- one clip: motion ------------------------------------------------------------------------------


def _average(x, valid):  # [t], [t] -> []
    return jnp.sum(x * valid) / jnp.maximum(valid.sum(), 1)


def _line(y, z, valid, least=-jnp.inf):  # [t] x3 -> slope, value at frame 0, sum of squares
    """Least squares of y = a + b z over the valid frames, b not below `least`."""
    z_mean = _average(z, valid)
    y_mean = _average(y, valid)
    covariance = _average((z - z_mean) * (y - y_mean), valid)
    variance = jnp.maximum(_average(jnp.square(z - z_mean), valid), 1e-6)
    b = jnp.maximum(covariance / variance, least)
    a = y_mean - b * z_mean
    return b, a + b * z[0], _average(jnp.square(y - a - b * z), valid)


def _best_motion(centre, valid):  # [t 2], [t] -> motion, speed, start [2], RMS residual
    """The model of motion with the smallest residual, a simpler one first: still, eight directions,
    one turn at a wall.

    motion is a place in MOTIONS, or beyond them for a diagonal.
    """
    time = jnp.arange(FRAMES, dtype=jnp.float32)
    mean = jnp.stack([_average(x, valid) for x in centre.T])
    spread = jnp.stack(
        [_average(jnp.square(x - m), valid) for x, m in zip(centre.T, mean, strict=True)]
    )

    def straight(direction):  # unit [2]
        normal = jnp.stack([-direction[1], direction[0]])
        b, first, rest = _line(centre @ direction, time, valid, 0.0)
        _, other, side = _line(centre @ normal, jnp.zeros_like(time), valid)
        return b, first * direction + other * normal, jnp.sqrt(rest + side)

    def bounce(axis):
        folded = lambda turn: _line(centre[:, axis], jnp.abs(time - turn), valid)
        b, first, rest = jax.vmap(folded)(jnp.asarray(_TURNS))
        i = jnp.argmin(rest)
        return jnp.abs(b[i]), mean.at[axis].set(first[i]), jnp.sqrt(rest[i] + spread[1 - axis])

    directions = np.float32([*list(MOTIONS.values())[:STILL], *_DIAGONALS])
    directions /= np.linalg.norm(directions, axis=-1, keepdims=True)
    candidates = [
        jax.vmap(straight)(jnp.asarray(directions)),
        (jnp.zeros(1), mean[None], jnp.sqrt(spread.sum())[None]),
    ]
    candidates += [jax.tree.map(lambda x: x[None], bounce(axis)) for axis in (0, 1)]
    speed, start, residual = (jnp.concatenate(x) for x in zip(*candidates, strict=True))
    # The candidates' order is directions, diagonals, still, bounces; their places in MOTIONS:
    motion = jnp.asarray(
        [0, 1, 2, 3, *range(len(MOTIONS), len(MOTIONS) + 4), STILL, STILL + 1, STILL + 2]
    )
    bounced = _STRAIGHT_GAIN + _BOUNCE_GAIN
    handicap = jnp.float32([*[_STRAIGHT_GAIN] * 8, 0.0, bounced, bounced])
    best = jnp.argmin(residual + handicap)
    return motion[best], speed[best], start[best], residual[best]


# -- many clips ------------------------------------------------------------------------------------


def correct(measured: Measured, wanted: Attributes) -> dict[str, np.ndarray]:
    """Returns which clips show what their captions say: bool[b] for every attribute and for "all"
    of them."""
    out = {}
    for field in dataclasses.fields(Attributes):
        want, seen = (np.asarray(getattr(x, field.name)) for x in (wanted, measured.seen))
        out[field.name] = (want == seen) | (want == UNSAID)
    return out | {"all": np.all(list(out.values()), axis=0) & np.asarray(measured.present)}


def scores(measured: Measured, wanted: Attributes) -> dict[str, float]:
    """Returns means over the clips: rates of `correct` and of present objects; errors over the
    clips that have an object.

    speed_error (px/frame) is over the clips that should move.
    """
    out = {name: float(np.mean(right)) for name, right in correct(measured, wanted).items()}
    out["present"] = float(np.mean(measured.present))
    moves = np.asarray(wanted.speed) != UNSAID
    error = np.abs(np.asarray(measured.speed) - SPEED[np.asarray(wanted.speed)])[moves]
    names = ("flicker", "colour_error", "overlap", "constancy", "area_cv")
    values = {name: np.asarray(getattr(measured, name)) for name in names}
    values["speed_error"] = error
    return out | {name: _finite_mean(x) for name, x in values.items()}


def _finite_mean(x: np.ndarray) -> float:
    """Mean of what is not NaN; NaN where nothing is left."""
    x = x[~np.isnan(x)]
    return float(x.mean()) if x.size else float("nan")
