"""Palettes far enough apart, splits, motion as said, shapes of the right area and place, and clips
that stay in the frame."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import assert_close

from tdjax.media.scenes import clips, factors
from tdjax.media.scenes.factors import (
    BACKGROUND_RGB,
    COLOUR_RGB,
    FIRST_BOUNCE,
    FRAMES,
    RADIUS,
    SHAPES,
    SIDE,
    SPEED,
    STILL,
    UNSAID,
)

N = 4096
coverage = jax.jit(clips.coverage)
first = lambda factors, n: jax.tree.map(lambda a: a[:n], factors)


@pytest.fixture(scope="module")
def many():
    return jax.tree.map(np.asarray, clips.sample(jax.random.key(1), N, "all"))


def apart(a, b):
    return np.linalg.norm(a[:, None] - b[None], axis=-1)


def test_palettes_are_apart():
    for table in (COLOUR_RGB, BACKGROUND_RGB):
        assert apart(table, table)[~np.eye(len(table), dtype=bool)].min() >= 0.7
    assert (
        apart(COLOUR_RGB, BACKGROUND_RGB).min() >= 0.9
    )  # so every pair of object and background is allowed


def test_held_out_pairs_are_in_their_split_alone():
    pairs = {
        split: {(SHAPES[i], factors.NAMES["colour"][j]) for i, j, _ in factors.scenes(split)}
        for split in factors.SPLITS
    }
    assert pairs["held_out"] == set(factors.HELD_OUT)
    assert pairs["all"] == set(itertools.product(*(factors.NAMES[k] for k in ("shape", "colour"))))
    assert pairs["train"] == pairs["all"] - pairs["held_out"]
    assert {i for i, _ in pairs["train"]} == set(SHAPES) and {j for _, j in pairs["train"]} == set(
        factors.COLOURS
    )
    with pytest.raises(ValueError, match="allowed: train, held_out, all"):
        factors.scenes("test")


@pytest.mark.slow
@pytest.mark.parametrize("split", ["train", "held_out"])
def test_samples_cover_their_split(split):
    said = clips.sample(jax.random.key(0), N, split).said
    drawn = {
        tuple(row) for row in np.stack([said.shape, said.colour, said.background], -1).tolist()
    }
    assert drawn == {tuple(row) for row in factors.scenes(split).tolist()}


def test_all_values_are_drawn_alike(many):
    for name in ("shape", "colour", "background", "size", "motion"):
        share = (
            np.bincount(getattr(many.said, name), minlength=len(factors.NAMES[name]))
            / N
            * len(factors.NAMES[name])
        )
        assert np.abs(share - 1).max() < 0.25, name  # five deviations of a share of 1/8 of 4096
    assert np.array_equal(many.said.speed == UNSAID, many.said.motion == STILL)
    assert set(np.unique(many.said.speed)) == {UNSAID, 0, 1}


@pytest.mark.slow
def test_first_motions_can_be_drawn_alone():
    motion = np.asarray(clips.sample(jax.random.key(0), N, "train", FIRST_BOUNCE).said.motion)
    assert set(np.unique(motion)) == set(range(FIRST_BOUNCE))


@pytest.mark.slow
def test_tracks_move_as_said(many):
    steps = np.diff(np.asarray(clips.track(many)), axis=1)  # [b 32 2]
    for name, (i, direction) in zip(factors.MOTIONS, enumerate(factors.DIRECTION), strict=True):
        mine = many.said.motion == i
        speed = SPEED[many.said.speed[mine]][:, None, None]
        if i < FIRST_BOUNCE:
            assert_close(
                steps[mine], np.broadcast_to(speed * direction, steps[mine].shape), "float32", name
            )
        else:
            along = steps[mine] @ direction
            turned = np.sign(along[:, 0]) != np.sign(along[:, -1])
            assert turned.all(), name
            whole = np.abs(np.abs(along) - speed[:, 0]) < 1e-4
            assert (whole.sum(1) >= FRAMES - 2).all()  # every step but the one in which it turns
            assert (along[:, :7] * along[:, :1] > 0).all() and (
                along[:, 25:] * along[:, -1:] > 0
            ).all()  # turns in frames 8 to 24
            assert np.abs(steps[mine] @ direction[::-1]).max() == 0
    assert set(many.heading[many.said.motion < FIRST_BOUNCE]) == {1.0} and set(
        np.unique(many.heading)
    ) == {-1.0, 1.0}


def test_objects_stay_in_the_frame(many):
    centre, reach = (
        np.asarray(clips.track(many)),
        (RADIUS[many.said.size] + clips.MARGIN)[:, None, None],
    )
    assert (centre >= reach - 1e-4).all() and (centre <= SIDE - reach + 1e-4).all()


def test_border_is_background(many):
    f = first(many, 32)
    video = np.asarray(clips.render(f))
    error = np.abs(video - BACKGROUND_RGB[f.said.background][:, None, None, None])
    for edge in (error[:, :, [0, -1]], error[:, :, :, [0, -1]]):
        assert edge.max() < 0.01


def test_free_positions_fill_their_range(many):
    """Straight movers: the position across fills its range, the start along the path what the path
    leaves."""
    mine = (
        (many.said.motion == 1) & (many.said.size == 0) & (many.said.speed == 0)
    )  # right, small, slowly
    x, y = many.start[mine].T
    low = RADIUS[0] + clips.MARGIN
    for z, end in ((x, SIDE - low - 16), (y, SIDE - low)):
        assert z.min() < low + 0.1 * (end - low) and z.max() > end - 0.1 * (end - low)
        assert abs(z.mean() - (low + end) / 2) < 0.1 * (end - low)


def polygon(shape, r):
    """Which points of a fine grid (16 a pixel) around a centre between pixels are inside: bool, and
    the grid; plain definitions."""
    x, y = np.meshgrid(*[(np.arange(-24 * 16, 24 * 16) + 0.5) / 16] * 2)
    inside = {
        "circle": x**2 + y**2 < r**2,
        "square": np.maximum(abs(x), abs(y)) < r,
        "triangle": (y < r) & (abs(x) < (y + r) / 2),
        "cross": ((abs(x) < r) & (abs(y) < r / 3)) | ((abs(y) < r) & (abs(x) < r / 3)),
    }[shape]
    return inside, x, y


@pytest.mark.parametrize("size", range(2))
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_have_their_area_place_and_outline(shape, size):
    i = SHAPES.index(shape)
    centre = np.float32([[[32.0, 32.0], [32.3, 31.6]]])
    alpha = np.asarray(coverage(np.array([i]), RADIUS[[size]], centre))[0]
    inside, x, y = polygon(shape, RADIUS[size])
    exact = inside.reshape(48, 16, 48, 16).mean((1, 3))
    assert (
        abs(alpha[0].sum() / exact.sum() - 1) < 0.015
    )  # measured 0.000 to 0.012, corners are a little rounder
    assert (
        np.abs(alpha[0, 8:56, 8:56] - exact).mean() < 0.01
    )  # measured up to 0.0092, where edges lie between pixels
    assert (alpha[0, 8:56, 8:56][exact == 1] > 0.85).all() and (
        alpha[0, 8:56, 8:56][exact == 0] < 0.15
    ).all()
    pixel = np.arange(SIDE) + 0.5
    for a, c in zip(alpha, centre[0], strict=True):
        measured = np.array([(a.sum(0) * pixel).sum(), (a.sum(1) * pixel).sum()]) / a.sum() - c
        assert np.abs(measured - [x[inside].mean(), y[inside].mean()]).max() < 0.06
        assert np.abs(measured - clips.centroid_offset()[i, size]).max() < 0.06


def test_moving_by_whole_pixels_moves_the_picture(many):
    centre, draw = jnp.full((8, 1, 2), 30.25), clips.draw
    a, b = (
        np.asarray(draw(first(many, 8).said, c)) for c in (centre, centre + jnp.float32([3, 5]))
    )
    assert_close(b[:, :, 5:, 3:], a[:, :, :-5, :-3], "float32")


@pytest.mark.slow
def test_colours_are_the_palettes(many):
    f = first(many, 32)
    video = np.asarray(clips.render(f))
    centre = np.asarray(clips.track(f))[:, 0].astype(int)
    middle = video[np.arange(32), 0, centre[:, 1], centre[:, 0]]
    assert np.abs(middle - COLOUR_RGB[f.said.colour]).max() < 0.01
    assert (
        video.dtype == np.float32
        and video.shape == (32, FRAMES, SIDE, SIDE, 3)
        and np.abs(video).max() <= 1
    )


def test_same_key_same_clips(many):
    again, other = (clips.sample(jax.random.key(k), N, "all") for k in (1, 2))
    assert all(
        np.array_equal(x, y) for x, y in zip(*map(jax.tree.leaves, (many, again)), strict=True)
    )
    assert not np.array_equal(many.start, other.start)


def test_short_clips_are_beginnings(many):
    f = first(many, 32)
    assert_close(clips.render(f, 17), np.asarray(clips.render(f))[:, :17], "float32")


def test_place_keeps_what_is_said(many):
    f = clips.place(jax.random.key(8), many.said)
    for field in dataclasses.fields(many.said):
        assert np.array_equal(getattr(f.said, field.name), getattr(many.said, field.name))
    assert not np.array_equal(f.start, many.start)


def test_uint8_round_trip():
    values = np.arange(256, dtype=np.uint8)
    assert np.array_equal(clips.to_uint8(clips.from_uint8(values)), values)
    assert clips.to_uint8(jnp.float32([-3, -1, 0, 1, 7])).tolist() == [0, 0, 128, 255, 255]
