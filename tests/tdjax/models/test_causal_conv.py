"""Causal convolutions against the convolution over three dimensions, in chunks and tap by tap."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from tolerances import assert_close

import pallas_kernels as kernels
from tdjax.config import VAEConfig
from tdjax.models import causal_conv as layers
from tdjax.models.causal_conv import CausalConv, NarrowCausalConv, conv2d, conv2d_upsampled
from tdjax.models.wan_vae import over_chunks
from tdjax.precision import FLOAT32

CFG = VAEConfig(dim=8, policy=FLOAT32)
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
call = jit(lambda conv, *args: conv(*args))


def normal(shape):
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(np.float32)


def causal_conv(size, inputs, outputs, kind=CausalConv):
    shapes = jax.eval_shape(lambda: kind(size, inputs, outputs, CFG, rngs=nnx.Rngs(0)))
    return jax.tree.map(lambda leaf: normal(leaf.shape) / 10, shapes)


def conv3d(x, conv, stride=1):
    """lax's convolution over three dimensions, without frames before or after."""
    spatial = [(n // 2, n // 2) for n in conv.kernel.shape[1:3]]
    layout = ("NDHWC", "DHWIO", "NDHWC")
    return (
        lax.conv_general_dilated(
            x, conv.kernel[...], (stride, 1, 1), [(0, 0), *spatial], dimension_numbers=layout
        )
        + conv.bias[...]
    )


@pytest.mark.slow
def test_chunks_equal_the_whole():
    """A causal convolution over chunks of two frames is the one over all frames after two zero
    frames."""
    conv = causal_conv((3, 3, 3), 5, 7)
    both = jit(lambda conv, x: (over_chunks(conv, x, 2), conv(x, None)[0]))
    chunks, whole = both(conv, normal((2, 7, 3, 4, 5)))
    assert_close(chunks, whole, "float32", "chunks")


@pytest.mark.slow
@pytest.mark.parametrize("size", [(3, 3, 3), (3, 1, 1)])
@pytest.mark.parametrize("gain", [None, normal((11,))])
def test_causal_convolution_is_the_one_over_three_dimensions(size, gain):
    """After the two frames of the past, with and without norm and SiLU before it."""
    conv, x, past = (
        causal_conv(size, 11, 13),
        normal((2, 5, 5, 6, 11)),
        normal((1, 2, 2, 5, 6, 11))[0],
    )
    y = x
    if gain is not None:
        y = x / np.sqrt(np.square(x).sum(-1, keepdims=True)) * np.sqrt(11).astype(np.float32) * gain
        y = y / (1 + np.exp(-y))
    plus = normal((2, 5, 5, 6, 13))
    out, following = call(conv, x, past, gain, plus)
    expected = jit(conv3d)(np.concatenate([past, y], axis=1), conv) + plus
    assert_close(out, expected, "float32", "convolution")
    assert_close(following, y[:, -2:], "float32", "past")


@pytest.mark.parametrize("impl, divided", [("auto", False), ("auto", True), ("reference", False)])
def test_pairs_of_frames_where_they_run(monkeypatch, impl, divided):
    """One GPU that takes them, and the kernels chosen by themselves: the same convolution."""
    conv, made = causal_conv((3, 3, 3), 11, 13), []
    conv.impl = impl
    x, past, plus = normal((2, 4, 5, 6, 11)), normal((2, 2, 5, 6, 11)), normal((2, 4, 5, 6, 13))
    expected = conv(x, past, normal((11,)), plus)

    def pairs(*given):
        made.append(given)
        return kernels.causal_conv.reference.causal_conv(*given)

    monkeypatch.setattr(kernels.causal_conv, "refusal", lambda *_: None)
    monkeypatch.setattr(kernels.causal_conv, "causal_conv", pairs)
    monkeypatch.setattr(layers, "is_divided", lambda: divided)
    for ours, wanted in zip(conv(x, past, normal((11,)), plus), expected, strict=True):
        assert_close(ours, wanted, "float32")
    assert len(made) == (impl == "auto" and not divided)


@pytest.mark.slow
@pytest.mark.parametrize("gain", [None, normal((11,))])
def test_few_outputs_tap_by_tap(gain):
    """The same convolution; chunk by chunk it remembers outputs of the taps."""
    wide, narrow = (causal_conv((3, 3, 3), 11, 3, kind) for kind in (CausalConv, NarrowCausalConv))
    x = normal((2, 5, 5, 6, 11))
    expected = call(wide, x, None, gain)[0]
    assert_close(call(narrow, x, None, gain)[0], expected, "float32", "whole")
    first, past = call(narrow, x[:, :1], None, gain)
    assert past.shape == (2, 2, 5, 6, 9)
    chunks = [first]
    for part in (x[:, 1:3], x[:, 3:]):
        out, past = call(narrow, part, past, gain)
        chunks.append(out)
    assert_close(np.concatenate(chunks, axis=1), expected, "float32", "chunks")


def test_halving_takes_every_second_output():
    conv, x, past = (
        causal_conv((3, 1, 1), 11, 11),
        normal((2, 4, 5, 6, 11)),
        normal((1, 2, 1, 5, 6, 11))[0],
    )
    out, following = jit(lambda conv, *args: conv.halving(*args))(conv, x, past)
    whole = np.concatenate([past, x], axis=1)
    expected = jit(functools.partial(conv3d, stride=2))(whole, conv)
    assert_close(out, expected, "float32", "halving")
    np.testing.assert_array_equal(following, x[:, -1:])


@pytest.mark.slow
@pytest.mark.parametrize("outputs", [13, 14])
@pytest.mark.parametrize(("dtype", "bound"), [(jnp.float32, 1e-6), (jnp.bfloat16, 2.0**-7)])
def test_convolution_of_repeated_pixels(outputs, dtype, bound):
    """By four kernels of 2 x 2 taps: what the 3 x 3 taps give on the larger frames, at their edges
    too; and the gradients of it."""
    x, kernel, bias = (
        a.astype(dtype)
        for a in (normal((2, 3, 5, 6, 11)), normal((3, 3, 11, outputs)) / 10, normal((outputs,)))
    )
    larger = lambda x: jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3)
    plain = lambda x, k: conv2d(larger(x), k, bias)
    ours = lambda x, k: conv2d_upsampled(x, k, bias)

    @functools.partial(jax.jit, static_argnums=0)
    def pulled(f, x, kernel):
        def loss(x, kernel):
            y = f(x, kernel)
            return (y.astype(jnp.float32) ** 2).sum(), y

        (_, y), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(x, kernel)
        return y, *gradients

    for made, expected in zip(*(pulled(f, x, kernel) for f in (ours, plain)), strict=True):
        made, expected = np.asarray(made, np.float64), np.asarray(expected, np.float64)
        assert made.shape == expected.shape
        assert np.linalg.norm(made - expected) < bound * np.linalg.norm(expected)
