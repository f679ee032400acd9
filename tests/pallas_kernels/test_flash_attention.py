from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import put
from jaxprs import largest
from tolerances import assert_close

from pallas_kernels import attention
from pallas_kernels.flash_attention import cudnn, reference


def qkv(seed=0, b=2, l=37, s=23, h=3, k=20, dtype=jnp.float32):
    draw = np.random.default_rng(seed).normal
    return tuple(put(draw(size=(b, n, h, k)), dtype) for n in (l, s, s))


run = jax.jit(attention, static_argnames=("scale", "impl"))


def exact(q, k, v):
    """float64 in numpy."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    s = np.einsum("blhk,bshk->bhls", q, k) / np.sqrt(q.shape[-1])
    p = np.exp(s - s.max(-1, keepdims=True))
    return np.einsum("bhls,bshk->blhk", p / p.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_is_softmax_attention(impl):
    q, k, v = qkv()
    assert_close(run(q, k, v, impl=impl), exact(q, k, v), "float32")


def test_scale():
    q, k, v = qkv()
    assert_close(run(q, k, v, scale=0.7), exact(q * 0.7 * 20**0.5, k, v), "float32")


def test_bfloat16_keeps_float32_statistics():
    q, k, v = qkv(dtype=jnp.bfloat16)
    o = run(q, k, v)
    assert o.dtype == jnp.bfloat16
    assert_close(o, exact(q, k, v), "bf16")


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 5])
def test_chunks_of_queries_change_nothing(monkeypatch, rows):
    args = qkv()
    tangents = qkv(1)

    def everything():  # a new function at each call, so that the chunk size is read again
        def run(*args):
            grads = jax.grad(lambda *a: jnp.square(reference.attention(*a)).sum(), (0, 1, 2))(*args)
            return *jax.jvp(reference.attention, args, tangents), *grads

        return jax.jit(run)(*args)

    whole = everything()
    monkeypatch.setattr(reference, "SCORE_BYTES", rows * 4 * 2 * 3 * 23)
    for actual, expected in zip(everything(), whole, strict=True):
        assert_close(actual, expected, "float32")


def test_invariances():
    q, k, v = qkv()
    o = run(q, k, v)
    assert_close(run(q, k + 0.7, v), o, "float32", "a constant added to every key")
    assert_close(run(q, k[:, ::-1], v[:, ::-1]), o, "float32", "keys in another order")
    assert_close(run(q, k, 3 * v), 3 * o, "float32", "values scaled")


@pytest.mark.parametrize("l, h", [(32760, 12), (75600, 40)])
def test_memory_is_bounded_at_real_size(l, h):
    x = jax.ShapeDtypeStruct((1, l, h, 128), jnp.bfloat16)
    assert largest(jax.make_jaxpr(reference.attention)(x, x, x).jaxpr) <= max(
        reference.SCORE_BYTES, x.size * 4
    )


def test_lowers_for_cuda():
    x = jax.ShapeDtypeStruct((1, 32760, 12, 128), jnp.bfloat16)
    jax.jit(attention).trace(x, x, x).lower(lowering_platforms=("cuda",))


def test_errors():
    q, k, v = qkv()
    with pytest.raises(ValueError, match=r"impl is 'flash'; allowed: auto, reference, cudnn"):
        attention(q, k, v, impl="flash")
    with pytest.raises(ValueError, match=r"k, v \[b s h k\]"):
        attention(q, k, v[:, :5])
    with pytest.raises(ValueError, match="expected one floating dtype"):
        attention(q, k, v.astype(jnp.bfloat16))
    with pytest.raises(
        ValueError, match=r'bfloat16 and float16, not float32; use impl="reference"'
    ):
        attention(q, k, v, impl="cudnn")
    with pytest.raises(ValueError, match="multiples of 8 up to 128, not 20"):
        attention(*qkv(dtype=jnp.bfloat16), impl="cudnn")
    assert cudnn.refusal(jnp.zeros((1, 1, 1, 64), jnp.float16)) is None


@pytest.mark.slow
@pytest.mark.parametrize("f", [cudnn.attention, attention])
def test_a_kernel_without_a_tangent_gets_one(monkeypatch, f):
    """cuDNN's op has a gradient only. Here a stand-in of that kind; "auto" traces it on every host
    that has CUDA."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")

    @partial(jax.custom_vjp, nondiff_argnums=(3,))
    def gradient_only(q, k, v, scale):
        return reference.attention(q, k, v, scale=scale)

    gradient_only.defvjp(
        lambda q, k, v, scale: (gradient_only(q, k, v, scale), (q, k, v)),
        lambda scale, saved, g: jax.vjp(partial(reference.attention, scale=scale), *saved)[1](g),
    )
    monkeypatch.setattr(cudnn, "fused", gradient_only)
    args, tangents = (tuple(x.astype(jnp.bfloat16) for x in qkv(seed, k=24)) for seed in (0, 1))

    def everything(f, args, tangents):
        stack = lambda q, k, v: jax.lax.scan(
            jax.checkpoint(lambda q, _: (f(q, k, v, scale=0.3), None)), q, None, 2
        )[0]
        grads = jax.grad(lambda *a: jnp.square(stack(*a).astype(jnp.float32)).sum(), (0, 1, 2))(
            *args
        )
        return *jax.jvp(stack, args, tangents), *grads

    actual, expected = (
        jax.jit(partial(everything, f))(args, tangents),
        jax.jit(partial(everything, reference.attention))(args, tangents),
    )
    for ours, theirs in zip(actual, expected, strict=True):
        ours, theirs = (np.asarray(x, np.float32) for x in (ours, theirs))
        assert np.linalg.norm(ours - theirs) < 1e-2 * np.linalg.norm(theirs)


@pytest.mark.gpu
def test_cudnn_agrees_with_the_reference():
    args, tangents = (
        qkv(l=300, s=200, k=64, dtype=jnp.bfloat16),
        qkv(1, l=300, s=200, k=64, dtype=jnp.bfloat16),
    )

    def everything(impl):
        grads = jax.grad(
            lambda *a: jnp.square(attention(*a, impl=impl).astype(jnp.float32)).sum(), (0, 1, 2)
        )
        return *jax.jit(lambda *a: jax.jvp(lambda *b: attention(*b, impl=impl), a, tangents))(
            *args
        ), *jax.jit(grads)(*args)

    for impl in ("auto", "cudnn"):
        for actual, expected in zip(everything(impl), everything("reference"), strict=True):
            actual, expected = (np.asarray(x, np.float32) for x in (actual, expected))
            assert np.linalg.norm(actual - expected) < 1e-2 * np.linalg.norm(expected)
