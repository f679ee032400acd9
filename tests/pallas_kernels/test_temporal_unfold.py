"""Taps of causal convolutions: the reference against float64, the kernel against the reference, and
what "auto" lowers to."""

import functools

import described
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import put

from pallas_kernels.temporal_unfold import temporal_unfold, triton

taps = jax.jit(temporal_unfold, static_argnames="impl")


def arrays(b, t, h, w, c, dtype=jnp.float32):
    """x with pixels of very different lengths, one of them zero, y of two frames before it, and a
    gain."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(b, t, h, w, c)) * 10.0 ** rng.uniform(-3, 3, (b, t, h, w, 1))
    x[0, 0, 0, 0] = 0
    return tuple(put(a, dtype) for a in (x, rng.normal(size=(b, 2, h, w, c)), rng.normal(size=c)))


def expected(x, past, gain):
    """From float64: y, one rounding to x.dtype, and every frame beside the two before it."""
    y = np.asarray(x, np.float64)
    if gain is not None:
        y = (
            y
            / np.maximum(np.linalg.norm(y, axis=-1, keepdims=True), 1e-12)
            * np.sqrt(y.shape[-1])
            * np.asarray(gain, np.float64)
        )
        y = y / (1 + np.exp(-y))
    before = np.zeros_like(y[:, :1]).repeat(2, 1) if past is None else np.asarray(past, np.float64)
    y = np.concatenate([before, y], axis=1)
    t = x.shape[1]
    return np.concatenate([y[:, :t], y[:, 1 : 1 + t], y[:, 2:]], axis=-1), y[:, -2:]


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["reference", "interpret"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(1, 4, 8, 12, 96), (2, 1, 4, 8, 384), (1, 3, 4, 4, 160)])
@pytest.mark.parametrize("given", ["x past", "x gain", "x past gain"])
def test_taps(impl, dtype, shape, given):
    x, past, gain = arrays(*shape, dtype)
    past, gain = past if "past" in given else None, gain if "gain" in given else None
    wide, following = taps(x, past, gain, impl=impl)
    b, t, h, w, c = shape
    assert (
        wide.shape == (b, t, h, w, 3 * c)
        and following.shape == (b, 2, h, w, c)
        and wide.dtype == following.dtype == dtype
    )
    rtol, atol = (0, 0) if gain is None else (2.0**-8 if dtype == jnp.bfloat16 else 2e-6, 1e-6)
    for made, wanted in zip((wide, following), expected(x, past, gain), strict=True):
        np.testing.assert_allclose(np.asarray(made, np.float64), wanted, rtol=rtol, atol=atol)


@pytest.mark.slow
def test_programs_cover_the_pixels():
    """More pixels than one program owns, and a number of them that only 16 divides."""
    shape = (1, 2, 4, 12, 96)
    assert triton.refusal(2, 48, 96) is None and 48 > triton.ELEMENTS // 96 >= 16
    for made, wanted in zip(
        taps(*arrays(*shape), impl="interpret"),
        taps(*arrays(*shape), impl="reference"),
        strict=True,
    ):
        np.testing.assert_allclose(made, wanted, rtol=2e-6, atol=1e-6)


def test_chunks_are_the_whole():
    x, past, gain = arrays(1, 7, 4, 4, 32)
    whole, last = taps(x, past, gain)
    first, between = taps(x[:, :3], past, gain)
    second, after = taps(x[:, 3:], between, gain)
    np.testing.assert_array_equal(np.concatenate([first, second], axis=1), whole)
    np.testing.assert_array_equal(after, last)


def lowered(x, past, gain):
    return described.lower(described.trace(jax.jit(temporal_unfold), x, past, gain)).as_text()


def test_auto_is_the_kernel_on_cuda_where_it_takes_the_shapes():
    spec = lambda t, c: (
        jax.ShapeDtypeStruct((1, t, 60, 104, c), jnp.bfloat16),
        jax.ShapeDtypeStruct((1, 2, 60, 104, c), jnp.bfloat16),
    )
    gain = lambda c: jax.ShapeDtypeStruct((c,), jnp.bfloat16)
    assert "triton" in lowered(*spec(4, 384), gain(384))
    for t, c in ((4, 3), (4, 16), (9, 384)):
        assert "triton" not in lowered(*spec(t, c), gain(c))
    assert triton.refusal(4, 40, 96) == "40 pixels are not a multiple of 16"


def test_the_past_is_renewed_in_place():
    """Of an argument that is donated, as from chunk to chunk of a clip: no copy of it in the
    program."""
    frames = lambda t: jax.ShapeDtypeStruct((1, t, 60, 104, 96), jnp.bfloat16)
    run = jax.jit(functools.partial(temporal_unfold, impl="triton"), donate_argnums=1)
    text = described.lower(
        described.trace(run, frames(4), frames(2), jax.ShapeDtypeStruct((96,), jnp.bfloat16))
    ).as_text()
    assert "operand_index = 1" in text and "output_operand_alias" in text


def test_the_past_is_read_before_it_is_renewed():
    """By all threads of a program: a barrier stands between the loads of the past and the stores to
    the same memory."""
    spec = lambda frames: jax.ShapeDtypeStruct((1, frames, 16, 32), jnp.bfloat16)
    kernel = functools.partial(triton.temporal_unfold, interpret=False)
    call = jax.make_jaxpr(kernel)(spec(1), spec(2), jax.ShapeDtypeStruct((32,), jnp.bfloat16)).eqns[
        0
    ]
    inside = call.params["jaxpr"]
    _, past, _, _, following = inside.invars
    at = lambda ref: [i for i, eqn in enumerate(inside.eqns) if ref in eqn.invars[:1]]
    (barrier,) = [i for i, eqn in enumerate(inside.eqns) if "debug_barrier" in eqn.primitive.name]
    assert call.params["input_output_aliases"] == ((1, 1),)
    assert len(at(past)) == len(at(following)) == 2 and max(at(past)) < barrier < min(at(following))


@pytest.mark.slow
def test_derivative_is_that_of_the_reference(monkeypatch):
    """Also where the default device is a GPU: no kernel in it, which has no derivative."""
    x, past, gain = arrays(1, 2, 4, 4, 32)
    x = jnp.clip(x, -3, 3)
    total = lambda impl: lambda *args: sum((a * a).sum() for a in temporal_unfold(*args, impl=impl))
    grad = lambda impl: jax.jit(jax.grad(total(impl), argnums=(0, 1, 2)))
    for a, e in zip(grad("auto")(x, past, gain), grad("reference")(x, past, gain), strict=True):
        assert np.isfinite(a).all() and np.abs(e).max() > 0
        np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert "pallas_call" not in str(jax.make_jaxpr(grad("auto"))(x, past, gain))


def test_errors():
    x, past, gain = arrays(1, 4, 4, 4, 32)
    with pytest.raises(
        ValueError,
        match=(
            r"\(1, 4, 4, 4, 32\), past float32 \(1, 1, 4, 4, 32\); expected .* \[b 2 h w c\] of one"
            r" dtype"
        ),
    ):
        temporal_unfold(x, past[:, :1], gain)
    with pytest.raises(ValueError, match=r"past bfloat16"):
        temporal_unfold(x, past.astype(jnp.bfloat16), gain)
    with pytest.raises(ValueError, match=r"gain \(31,\); expected \(32,\)"):
        temporal_unfold(x, past, gain[:31])
    with pytest.raises(
        ValueError, match=r"impl is 'cuda'; allowed: auto, reference, triton, interpret"
    ):
        temporal_unfold(x, past, gain, impl="cuda")
    with pytest.raises(
        ValueError, match=r"16 channels are not a multiple of 32 up to 2048; use impl='reference'"
    ):
        temporal_unfold(x[..., :16], None, None, impl="interpret")
