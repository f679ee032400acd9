"""The detector is right on true clips and wrong on false ones; its numbers are the numbers that
were put in."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange

from tdjax.media.scenes import clips, detector
from tdjax.media.scenes.factors import (
    BACKGROUND_RGB,
    COLOURS,
    FIRST_BOUNCE,
    FRAMES,
    NAMES,
    SHAPES,
    SIDE,
    SPEED,
    STILL,
    UNSAID,
)

pytestmark = pytest.mark.optimized

N = 16  # clips at once, always: one program


@functools.cache
def drawn():
    """The clips. Nothing is drawn, nor compiled for it, while tests are collected."""
    return jax.tree.map(np.asarray, clips.sample(jax.random.key(3), N, "all"))


@functools.cache
def centres():
    return np.asarray(clips.track(drawn()))


def moves():
    return drawn().said.motion != STILL


def judged(video, said=None):
    measured = detector.measure(jnp.asarray(video))
    return measured, detector.correct(measured, said or drawn().said)


@pytest.fixture(scope="module")
def truth():
    return clips.draw(drawn().said, centres())


@pytest.mark.slow
def test_true_clips_are_right():
    """The recipe asks for 99.5 %, here all of 128. Measured over 2,560 clips of other keys: all
    right."""
    right = []
    for seed in range(8):
        f = clips.sample(jax.random.key(100 + seed), N, "all")
        measured = detector.measure(clips.draw(f.said, clips.track(f)))
        right.append(detector.correct(measured, f.said)["all"])
        scores = detector.scores(measured, f.said)
        assert scores["present"] == 1 and scores["flicker"] < 1e-6 and scores["colour_error"] < 0.02
        assert (
            scores["overlap"] > 0.98
            and scores["constancy"] < 0.02
            and scores["area_cv"] < 0.002
            and scores["speed_error"] < 0.002
        )
        offset = clips.centroid_offset()[f.said.shape, f.said.size]
        assert np.abs(np.asarray(measured.start) - np.asarray(f.start) - offset).max() < 0.1
    assert np.mean(right) >= 0.995


@pytest.mark.slow
def test_bytes_and_pixel_noise_change_little(truth):
    _, right = judged(clips.to_uint8(truth))
    assert right["all"].all()
    measured, right = judged(
        truth + 0.1 * np.random.default_rng(0).standard_normal(truth.shape, np.float32)
    )
    assert right["all"].mean() >= 0.98 and float(jnp.nanmean(measured.constancy)) < 0.2


def swapped(**changes):
    return dataclasses.replace(drawn().said, **changes)


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("colour", lambda said: (said.colour + 1 + np.arange(N) % 7) % len(COLOURS)),
        ("shape", lambda said: (said.shape + 1 + np.arange(N) % 3) % len(SHAPES)),
        ("size", lambda said: 1 - said.size),
        ("background", lambda said: (said.background + 1 + np.arange(N) % 3) % 4),
    ],
    ids=["colour", "shape", "size", "background"],
)
def test_another_value_is_seen_as_such(name, other):
    shown = swapped(**{name: other(drawn().said)})
    measured, right = judged(clips.draw(shown, centres()))
    assert not right[name].any() and not right["all"].any()
    assert (np.asarray(getattr(measured.seen, name)) == getattr(shown, name)).all()
    assert all(right[each].all() for each in NAMES if each != name)


def test_frozen_motion():
    measured, right = judged(clips.draw(drawn().said, np.repeat(centres()[:, :1], FRAMES, axis=1)))
    assert (np.asarray(measured.seen.motion) == STILL).all() and (
        np.asarray(measured.seen.speed) == UNSAID
    ).all()
    assert np.array_equal(right["all"], ~moves())


def test_half_and_double_speed():
    straight = moves() & (drawn().said.motion < FIRST_BOUNCE)
    for factor in (0.5, 2.0):
        centre = centres()[:, :1] + factor * (centres() - centres()[:, :1])
        middle = (centre.min(1, keepdims=True) + centre.max(1, keepdims=True)) / 2
        measured, right = judged(
            clips.draw(drawn().said, 32 + (centre - middle) * np.float32(0.9 if factor == 2 else 1))
        )  # kept in the frame
        assert not right["all"][moves()].any() and not right["speed"][straight].any()
        assert right["motion"][straight].all()
        assert detector.scores(measured, drawn().said)["speed_error"] > 0.2


@pytest.mark.slow
def test_backwards_and_diagonal():
    measured, right = judged(clips.draw(drawn().said, centres()[:, ::-1]))
    straight = moves() & (drawn().said.motion < FIRST_BOUNCE)
    assert not right["motion"][straight].any() and right["motion"][~straight].all()
    time = np.arange(FRAMES, dtype=np.float32) - 16
    for x, y in ((0.5, 0.5), (-0.5, 0.5), (0.3, -0.35)):
        centre = np.broadcast_to(32 + np.stack([x * time, y * time], -1), centres().shape)
        measured, right = judged(clips.draw(drawn().said, centre))
        assert (np.asarray(measured.seen.motion) == UNSAID).all() and not right["all"].any()
        assert np.abs(np.asarray(measured.speed) - np.hypot(x, y)).max() < 0.03


@pytest.mark.slow
def test_a_slow_drift_is_still_and_a_shallow_turn_is_a_bounce():
    time = np.arange(FRAMES, dtype=np.float32)
    for x, motion in (
        (0.05 * time, STILL),
        (0.2 * time, 1),
        (0.5 * np.abs(time - 7), FIRST_BOUNCE),
        (-0.5 * np.abs(time - 25), FIRST_BOUNCE),
    ):
        centre = np.stack([32 + x - x.mean(), np.full_like(x, 30)], -1)
        measured, _ = judged(clips.draw(drawn().said, np.broadcast_to(centre, centres().shape)))
        assert (np.asarray(measured.seen.motion) == motion).all()


def test_no_object():
    measured, right = judged(
        np.broadcast_to(
            rearrange(BACKGROUND_RGB[drawn().said.background], "b c -> b 1 1 1 c"),
            (N, FRAMES, SIDE, SIDE, 3),
        )
    )
    assert not np.asarray(measured.present).any()
    assert not any(rates.any() for name, rates in right.items() if name not in ("speed",))
    assert all((np.asarray(i) == UNSAID).all() for i in jax.tree.leaves(measured.seen))
    scores = detector.scores(measured, drawn().said)
    assert (
        scores["all"] == scores["present"] == 0
        and np.isnan(scores["overlap"])
        and np.isnan(scores["speed_error"])
    )


def test_an_object_that_vanishes(truth):
    empty = rearrange(BACKGROUND_RGB[drawn().said.background], "b c -> b 1 1 1 c")
    for frames, present in ((3, True), (4, False)):
        measured, right = judged(
            jnp.concatenate(
                [truth[:, :-frames], jnp.broadcast_to(empty, (N, frames, SIDE, SIDE, 3))], 1
            )
        )
        assert (np.asarray(measured.present) == present).all()
        assert right["all"].mean() == (
            1 if present else 0
        )  # a motion is fitted to the frames that have the object


@pytest.mark.parametrize("kind", ["uniform", "nan"])
def test_noise(kind):
    shape = (N, FRAMES, SIDE, SIDE, 3)
    video = np.full(shape, np.nan, np.float32)
    if kind == "uniform":
        video = np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)
    measured, right = judged(video)
    assert not right["all"].any() and not right["shape"].any() and not right["size"].any()


def test_constancy_is_the_jitter_that_was_put_in():
    jitter = 0.5 * np.random.default_rng(0).standard_normal(centres().shape).astype(np.float32)
    measured, right = judged(clips.draw(drawn().said, centres() + jitter))
    assert (
        abs(float(jnp.mean(measured.constancy)) / (0.5 * 2**0.5) - 1) < 0.08
    )  # the fit takes up a few of 66 degrees of freedom
    assert right["motion"].mean() >= 0.98


def test_area_variation_and_flicker():
    small, large = (
        np.asarray(clips.draw(swapped(size=np.full(N, i, np.int32)), np.full_like(centres(), 32)))
        for i in (0, 1)
    )
    video = np.where(rearrange(np.arange(FRAMES) % 2 == 0, "t -> 1 t 1 1 1"), small, large)
    areas = np.where(np.arange(FRAMES) % 2 == 0, 7.0**2, 11.0**2)
    measured, _ = judged(video)
    assert np.abs(np.asarray(measured.area_cv) / (areas.std() / areas.mean()) - 1).max() < 0.03
    wobble = 0.05 * np.where(np.arange(FRAMES) % 2 == 0, 1.0, -1.0).astype(np.float32)
    measured, right = judged(
        0.9 * small + rearrange(wobble, "t -> 1 t 1 1 1"), swapped(size=np.zeros(N, np.int32))
    )
    assert np.abs(np.asarray(measured.flicker) / wobble.std() - 1).max() < 1e-3


def test_scores_are_means_over_what_was_asked(truth):
    measured, right = judged(truth)
    wanted = swapped(
        colour=np.where(np.arange(N) < N // 4, (drawn().said.colour + 1) % 8, drawn().said.colour),
        size=np.full(N, UNSAID, np.int32),
    )
    scores = detector.scores(measured, wanted)
    assert scores["colour"] == scores["all"] == 0.75 and scores["size"] == scores["shape"] == 1
    error = np.abs(np.asarray(measured.speed) - SPEED[drawn().said.speed])[moves()].mean()
    assert scores["speed_error"] == pytest.approx(error)


def test_the_same_numbers_again(truth):
    a, b = (jax.tree.leaves(detector.measure(truth)) for _ in range(2))
    assert all(np.array_equal(x, y, equal_nan=True) for x, y in zip(a, b, strict=True))


def test_other_sizes_are_refused():
    with pytest.raises(
        ValueError, match=r"takes clips of \(33, 64, 64, 3\), got \(17, 64, 64, 3\)"
    ):
        detector.measure(np.zeros((1, 17, 64, 64, 3), np.float32))
