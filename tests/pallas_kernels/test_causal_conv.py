"""Causal convolutions of pairs of frames: the reference against float64, Winograd's form, the
kernels against both, and what "auto" chooses."""

import dataclasses
import functools

import described
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import put
from tolerances import assert_close

from pallas_kernels import mosaic
from pallas_kernels.causal_conv import causal_conv, refusal, winograd
from pallas_kernels.causal_conv.triton import frame_pairs

run = jax.jit(causal_conv, static_argnames="impl")
interpreted = pytest.mark.skipif(mosaic.unavailable() is not None, reason=str(mosaic.unavailable()))


def arrays(b, t, h, w, i, o, dtype=jnp.float32):
    """x, past, gain, kernel, bias, plus."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.normal(size=shape)
    kernel = normal(3, 3, 3, i, o) * (27 * i) ** -0.5
    x, past, plus = normal(b, t, h, w, i), normal(b, 2, h, w, i), normal(b, t, h, w, o)
    given = x, past, 1 + normal(i) / 10, kernel, normal(o), plus
    return tuple(put(a, dtype) for a in given)


def activated(x, gain):
    """silu(unit_norm(x, gain)) in float64."""
    x = np.asarray(x, np.float64)
    if gain is None:
        return x
    y = x / np.linalg.norm(x, axis=-1, keepdims=True) * np.sqrt(x.shape[-1])
    y = y * np.asarray(gain, np.float64)
    return y / (1 + np.exp(-y))


def direct(x, past, gain, kernel, bias, plus=None):
    """The convolution in float64, tap by tap."""
    frames = np.concatenate([np.asarray(past, np.float64), activated(x, gain)], axis=1)
    frames = np.pad(frames, [(0, 0), (0, 0), (1, 1), (1, 1), (0, 0)])
    _, t, h, w, _ = x.shape
    y = np.zeros((*x.shape[:4], kernel.shape[-1])) + np.asarray(bias, np.float64)
    for n, i, j in np.ndindex(3, 3, 3):
        y += frames[:, n : n + t, i : i + h, j : j + w] @ np.asarray(kernel[n, i, j], np.float64)
    return y if plus is None else y + np.asarray(plus, np.float64)


@pytest.mark.slow
@pytest.mark.parametrize("without", [(), (2,), (5,), (2, 5)])
def test_the_reference_is_the_convolution(without):
    given = [None if n in without else a for n, a in enumerate(arrays(2, 4, 5, 6, 3, 7))]
    y, past = run(*given, impl="reference")
    assert_close(y, direct(*given), "float32", "outputs")
    assert_close(past, activated(given[0], given[2])[:, -2:], "float32", "past")


@pytest.mark.slow
def test_a_gradient_in_bfloat16():
    """What is differentiated on a GPU too."""
    given = arrays(1, 2, 4, 4, 3, 5, jnp.bfloat16)
    total = lambda *given: causal_conv(*given)[0].astype(jnp.float32).var()
    gradients = jax.jit(jax.grad(total, tuple(range(6))))
    exact = gradients(*(a.astype(jnp.float32) for a in given))
    for made, wanted in zip(gradients(*given), exact, strict=True):
        assert made.dtype == jnp.bfloat16
        error = np.linalg.norm(np.asarray(made, np.float32) - wanted)
        assert error < 1e-2 * np.linalg.norm(wanted)


def test_four_products_are_two_outputs_of_three_taps():
    rng = np.random.default_rng(0)
    d, taps = rng.normal(size=(4, 5)), rng.normal(size=(3, 5))
    frames = winograd.combined_frames([put(frame, jnp.float32) for frame in d])
    m = np.stack(frames) * np.asarray(winograd.combined_taps(put(taps, jnp.float32)))
    outputs = np.stack([m[0] + m[1] + m[2], m[1] - m[2] + m[3]])
    assert_close(outputs, np.stack([sum(taps * d[n : n + 3]) for n in range(2)]), "float32")


def in_slabs(frames):
    """What `frame_pairs` makes of frames [b t+2 h w c], by indices."""
    b, t, h, w, c = frames.shape
    d = [frames[:, n : n + t - 2 : 2] for n in range(4)]
    made = np.stack([d[0] - d[2], d[1] + d[2], d[2] - d[1], d[3] - d[1]], axis=2)
    out = np.zeros((b, t // 2 - 1, 4, c // 32, h // 8 + 2, w + 2, 8, 32), np.float32)
    for strip, row in np.ndindex(8, h // 8 + 2):
        line = strip * (h // 8) + row - 1
        if 0 <= line < h:
            parts = made[:, :, :, line].reshape(b, -1, 4, w, c // 32, 32)
            out[:, :, :, :, row, 1 : w + 1, strip] = np.moveaxis(parts, 4, 3)
    return out.reshape(*out.shape[:5], (w + 2) * 8, 32)


@pytest.mark.slow
@pytest.mark.parametrize("shape, gain", [((1, 4, 16, 8, 96), True), ((2, 2, 8, 4, 32), False)])
def test_pairs_of_frames(shape, gain):
    x, past, weights, *_ = arrays(*shape, 96, jnp.bfloat16)
    weights = weights if gain else None
    pairs = jax.jit(functools.partial(frame_pairs, interpret=True))
    made, following = pairs(winograd.in_strips(x), past, weights)
    y = jnp.asarray(activated(x, weights), jnp.float32)
    frames = np.concatenate([past.astype(np.float32), y.astype(jnp.bfloat16)], 1)
    assert_close(made, in_slabs(frames.astype(np.float32)), "bf16", "pairs")
    assert_close(following, frames[:, -2:], "bf16", "past")
    edges = np.asarray(made, np.float32).reshape(*made.shape[:5], -1, 8, 32)
    assert not edges[..., [0, -1], :, :].any()
    assert not edges[:, :, :, :, 0, :, 0].any() and not edges[:, :, :, :, -1, :, 7].any()


@interpreted
@pytest.mark.parametrize("without", [(), (2, 5)])
def test_the_kernels_are_the_convolution(without):
    """Rows and columns that tiles do not divide."""
    given = arrays(1, 2, 32, 12, 32, 96, jnp.bfloat16)
    given = [None if n in without else a for n, a in enumerate(given)]
    y, past = run(*given, impl="interpret")
    expected, following = run(*given, impl="reference")
    assert y.dtype == jnp.bfloat16
    exact = direct(*given)
    # Roundings of outputs (1.7e-3) and of combinations of frames and of taps (1.1e-3 each, of sums
    # that are sqrt(5/3) times as large as what they sum) are 2.6e-3 together.
    assert np.linalg.norm(np.asarray(y, np.float64) - exact) < 3e-3 * np.linalg.norm(exact)
    assert_close(past, following, "bf16", "past")


def test_no_output_sees_more_than_it_should():
    """Not the frame after it, and not the third one before it."""
    x, past, _, kernel, bias, _ = arrays(1, 4, 8, 4, 32, 96)
    seen = np.zeros((6, 4), bool)
    for n in range(6):
        frames = jnp.concatenate([past, x], 1).at[:, n].set(jnp.nan)
        d = [frames[:, i : i + 4 : 2] for i in range(4)]
        taps = winograd.combined_taps(kernel)[:, 1, 1]
        m = [frame @ tap for frame, tap in zip(winograd.combined_frames(d), taps, strict=True)]
        y = jnp.stack([m[0] + m[1] + m[2], m[1] - m[2] + m[3]], axis=2)
        seen[n] = np.isnan(y).any((0, 3, 4, 5)).reshape(-1)
    assert (seen == [[n <= i <= n + 2 for n in range(4)] for i in range(6)]).all()


def choice(*given):
    """What "auto" is for these arguments, for a described H100."""
    return "causal_conv" in str(described.trace(jax.jit(causal_conv), *given).jaxpr)


@interpreted
def test_auto():
    given = arrays(1, 2, 8, 4, 32, 96, jnp.bfloat16)
    assert choice(*given)
    assert not choice(*arrays(1, 2, 8, 4, 32, 96))
    assert not choice(*arrays(1, 3, 8, 4, 32, 96, jnp.bfloat16))
    text = str(jax.jit(causal_conv).trace(*given).jaxpr)
    assert "pallas" not in text and "mpmd" not in text


@dataclasses.dataclass
class Shape:
    shape: tuple
    dtype: type = jnp.bfloat16


@pytest.mark.parametrize(
    "x, past, kernel, said",
    [
        ((1, 4, 8, 4, 32), True, (3, 3, 3, 32, 96), None),
        ((1, 1, 8, 4, 32), True, (3, 3, 3, 32, 96), "1 frames; allowed: 2, 4, 6 or 8"),
        ((1, 10, 8, 4, 32), True, (3, 3, 3, 32, 96), "10 frames"),
        ((1, 4, 8, 4, 32), False, (3, 3, 3, 32, 96), "4 frames and no past"),
        ((1, 4, 12, 4, 32), True, (3, 3, 3, 32, 96), "12 rows are not a multiple of 8"),
        ((1, 4, 8, 6, 32), True, (3, 3, 3, 32, 96), "6 columns are not a multiple of 4"),
        ((1, 4, 8, 4, 16), True, (3, 3, 3, 16, 96), "16 inputs are not a multiple of 32"),
        ((1, 4, 8, 4, 32), True, (3, 3, 3, 32, 64), "64 outputs are not a multiple of 96"),
        ((1, 4, 8, 4, 32), True, (3, 1, 1, 32, 96), r"the kernel is \(3, 1, 1\)"),
        ((1, 4, 8, 4, 4096), True, (3, 3, 3, 4096, 96), "4096 inputs are more than 1024"),
        ((1, 4, 2160, 3840, 96), True, (3, 3, 3, 96, 96), "1 x 4 frames of 2160 x 3840 and 96"),
    ],
)
def test_what_the_kernels_refuse(x, past, kernel, said):
    reason = winograd.refusal(Shape(x), past or None, Shape(kernel))
    if said is None:
        assert reason is None
    else:
        with pytest.raises(ValueError, match=said):
            raise ValueError(reason)


def test_floats_that_the_kernels_refuse():
    given = Shape((1, 4, 8, 4, 32), jnp.dtype(jnp.float32)), True, Shape((3, 3, 3, 32, 96))
    assert winograd.refusal(*given) == "frames are float32; allowed: bfloat16, float16"


@interpreted
def test_a_refusal_by_name_says_what_takes_it():
    said = 'causal_conv: frames are float32; .*\nimpl="auto" and impl="reference" take it'
    with pytest.raises(ValueError, match=said):
        causal_conv(*arrays(1, 2, 8, 4, 32, 96), impl="mosaic")


def test_without_a_gpu_it_says_so():
    reason = refusal(*(Shape(s) for s in ((1, 4, 8, 4, 32), (1, 2, 8, 4, 32), (3, 3, 3, 32, 96))))
    assert reason == (mosaic.unavailable() or "no GPU is at hand")


@pytest.mark.parametrize("wrong", range(6))
def test_shapes_that_do_not_fit(wrong):
    given = list(arrays(1, 2, 8, 4, 32, 96))
    given[wrong] = given[wrong][..., :1]
    names = ("x", "past", "gain", "kernel", "bias", "plus")
    blamed = names[wrong] if wrong not in (0, 3) else "(past|bias|kernel)"
    with pytest.raises(ValueError, match=rf"causal_conv: {blamed} is float32 .*; expected"):
        causal_conv(*given)


def test_a_past_is_needed():
    x, _, *more = arrays(1, 2, 8, 4, 32, 96)
    with pytest.raises(ValueError, match=r"past is None; expected float32 \(1, 2, 8, 4, 32\)"):
        causal_conv(x, None, *more)
