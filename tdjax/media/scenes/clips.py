"""Procedural clips: one object of a plain colour moves over a plain background. Everything runs on
the device, under jit.

Pixel (i, j) has its centre at x = j + 1/2, y = i + 1/2. Edges are anti-aliased: coverage is a
sigmoid, one pixel wide, of the signed distance to the outline.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax import lax

from tdjax.media.scenes.factors import (
    BACKGROUND_RGB,
    COLOUR_RGB,
    DIRECTION,
    FIRST_BOUNCE,
    FRAMES,
    MOTIONS,
    RADIUS,
    SHAPES,
    SIDE,
    SPEED,
    STILL,
    UNSAID,
    Attributes,
    Factors,
    scenes,
)

# Pixels between the object's square and the frame's edge, so that the border shows the background
# alone.
MARGIN = 2.0
# A bounce meets its wall between these frames: once in a clip, and not at its ends.
TURN = (8.0, 24.0)
EDGE = 4.0  # slope of the sigmoid, so that coverage changes by one in a pixel
ARM = 1 / 3  # half the width of a cross's arms, as a share of its half side


# -- sampling --------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("n", "split", "motions"))
def sample(key, n: int, split: str = "train", motions: int = len(MOTIONS)) -> Factors:
    """Returns n clips: attributes uniform over the allowed ones of a split (`factors.scenes`),
    positions uniform where they fit.

    motions: how many of MOTIONS to draw from; FIRST_BOUNCE leaves the bounces out.
    """
    names = ("scene", "size", "motion", "speed", "place")
    keys = dict(zip(names, jax.random.split(key, len(names)), strict=True))
    drawn = lambda name, count: jax.random.randint(keys[name], (n,), 0, count)
    table = jnp.asarray(scenes(split))
    shape, colour, background = rearrange(table[drawn("scene", len(table))], "b f -> f b")
    motion = drawn("motion", motions)
    said = Attributes(
        shape=shape,
        colour=colour,
        background=background,
        size=drawn("size", len(RADIUS)),
        motion=motion,
        speed=jnp.where(motion == STILL, UNSAID, drawn("speed", len(SPEED))),
    )
    return place(keys["place"], said)


@jax.jit
def place(key, said: Attributes) -> Factors:
    """Returns clips whose attributes are all given: start and heading are uniform where the clip
    stays in the frame."""
    n = said.motion.shape[0]
    where, way = jax.random.split(key)
    bounces = said.motion >= FIRST_BOUNCE
    heading = jnp.where(bounces, jax.random.rademacher(way, (n,), jnp.float32), jnp.float32(1))
    v = _velocity(said, heading)
    low, high = walls(said)
    ahead = jnp.where(v > 0, high, low)
    bounces = rearrange(bounces, "b -> b 1") & (v != 0)
    travel = v * (FRAMES - 1)
    first = jnp.where(bounces, ahead - v * TURN[1], low + jnp.maximum(-travel, 0))
    last = jnp.where(bounces, ahead - v * TURN[0], high - jnp.maximum(travel, 0))
    start = first + jax.random.uniform(where, (n, 2)) * (last - first)
    return Factors(said=said, start=start, heading=heading)


def _velocity(said: Attributes, heading):  # -> f32[b 2], pixels a frame, before any bounce
    speed = jnp.asarray(SPEED)[jnp.maximum(said.speed, 0)] * heading
    return jnp.asarray(DIRECTION)[said.motion] * rearrange(speed, "b -> b 1")


def walls(said: Attributes):  # -> f32[b 1] x2
    """Returns the lowest and the highest coordinate of the object's centre."""
    low = rearrange(jnp.asarray(RADIUS)[said.size] + MARGIN, "b -> b 1")
    return low, SIDE - low


@functools.partial(jax.jit, static_argnames="frames")
def track(factors: Factors, frames: int = FRAMES):  # -> f32[b t 2]
    """Returns the centre (x, y) in every frame: a straight line, folded back at the walls."""
    low, high = (rearrange(w, "b 1 -> b 1 1") for w in walls(factors.said))
    v = rearrange(_velocity(factors.said, factors.heading), "b c -> b 1 c")
    time = rearrange(jnp.arange(frames, dtype=jnp.float32), "t -> 1 t 1")
    way = jnp.mod(rearrange(factors.start, "b c -> b 1 c") + v * time - low, 2 * (high - low))
    return low + jnp.minimum(way, 2 * (high - low) - way)


# -- drawing ---------------------------------------------------------------------------------------


def distances(x, y, r) -> tuple:
    """Returns the signed distance to the outline of each of SHAPES, negative inside; x, y from the
    centre of its square of side 2 r."""
    across, along, arm = jnp.abs(x), jnp.abs(y), ARM * r
    circle = jnp.sqrt(x * x + y * y) - r
    cross = jnp.minimum(_box(across, along, r, arm), _box(across, along, arm, r))
    return circle, _box(across, along, r, r), _triangle(across, y, r), cross


def _box(x, y, half_width, half_height):  # x, y >= 0
    x, y = x - half_width, y - half_height
    outside = jnp.sqrt(jnp.square(jnp.maximum(x, 0)) + jnp.square(jnp.maximum(y, 0)))
    return outside + jnp.minimum(jnp.maximum(x, y), 0)


def _triangle(x, y, r):  # x >= 0
    """Apex in the middle above, base below; a side falls two pixels in one."""
    # Where along the side, from apex to corner, its nearest point lies.
    t = jnp.clip((x + 2 * (y + r)) / (5 * r), 0, 1)
    side = jnp.square(x - t * r) + jnp.square(y + r - 2 * t * r)
    base = jnp.square(jnp.maximum(x - r, 0)) + jnp.square(y - r)
    distance = jnp.sqrt(jnp.minimum(side, base))
    return jnp.where((y < r) & (2 * x < y + r), -distance, distance)


def coverage(shape, r, centres):  # i32[b], f32[b], f32[b t 2] -> f32[b t h w] in 0..1
    """Returns how much of each pixel the object covers."""
    pixel = jnp.arange(SIDE, dtype=jnp.float32) + 0.5
    x = pixel - rearrange(centres[..., 0], "b t -> b t 1 1")
    y = rearrange(pixel, "h -> h 1") - rearrange(centres[..., 1], "b t -> b t 1 1")
    cases = [
        jnp.broadcast_to(d, (*centres.shape[:2], SIDE, SIDE))
        for d in distances(x, y, rearrange(r, "b -> b 1 1 1"))
    ]
    which = jnp.broadcast_to(rearrange(shape, "b -> b 1 1 1"), cases[0].shape)
    return jax.nn.sigmoid(-EDGE * lax.select_n(which, *cases))


@jax.jit
def draw(said: Attributes, centres):  # centres f32[b t 2] -> f32[b t h w 3] in [-1, 1]
    """Returns the object of each clip at the given centres, over its background."""
    alpha = coverage(said.shape, jnp.asarray(RADIUS)[said.size], centres)
    alpha = rearrange(alpha, "b t h w -> b t h w 1")
    colour = rearrange(jnp.asarray(COLOUR_RGB)[said.colour], "b c -> b 1 1 1 c")
    background = rearrange(jnp.asarray(BACKGROUND_RGB)[said.background], "b c -> b 1 1 1 c")
    return background + alpha * (colour - background)


@functools.partial(jax.jit, static_argnames="frames")
def render(factors: Factors, frames: int = FRAMES):  # -> f32[b t h w 3] in [-1, 1]
    """Returns the clips. 4 bytes x 3 x 64 x 64 x 33 are 1.6 MB a clip: render as many as are used
    at once."""
    return draw(factors.said, track(factors, frames))


@jax.jit
def to_uint8(video):  # float [... 3] in [-1, 1] -> uint8
    return jnp.round((jnp.clip(video, -1, 1) + 1) * 127.5).astype(jnp.uint8)


def from_uint8(video):  # -> f32 in [-1, 1]
    return video.astype(jnp.float32) / 127.5 - 1


def centroid_offset() -> np.ndarray:  # -> f32[shape size 2]
    """Returns the centroid of each shape from the centre of its square: zero, but for the triangle,
    a third of r below."""
    out = np.zeros((len(SHAPES), len(RADIUS), 2), np.float32)
    out[SHAPES.index("triangle"), :, 1] = RADIUS / 3
    return out
