"""The Mosaic GPU pass over tokens, interpreted with threads, barriers and copies, against the
references."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import put
from tolerances import assert_close

from pallas_kernels import mosaic as shared
from pallas_kernels.linear_branch import feature, linear_attention, operand
from pallas_kernels.sage_attention.reference import quantize_keys

interpreted = pytest.mark.skipif(shared.unavailable() is not None, reason=str(shared.unavailable()))


def token_pass(*args, **options):
    """Interpreted; the module imports the backend, which older versions of jax lack."""
    from pallas_kernels.token_pass_mosaic import token_pass

    return fields(*token_pass(*args, interpret=True, **options))


def query_pass(*args, **options):
    from pallas_kernels.token_pass_mosaic import query_pass

    return fields(*query_pass(*args, interpret=True, **options))


def fields(rounded, other):
    return (rounded.values, rounded.scale, rounded.length) if rounded else None, other


def tokens(seed, l, h=1):
    """With a mean to take off."""
    rng = np.random.default_rng(seed)
    return put(rng.normal(size=(1, l, h, 128)) + 1, jnp.bfloat16)


def check_rounded(x, mean, values, scale, length):
    """As the reference, but for values that lie between two, and longer than every token."""
    expected, scales = quantize_keys(x, mean, block=64)
    n = scales.shape[2]
    assert (np.abs(np.asarray(values, int) - np.asarray(expected, int)) <= 1).all()
    assert (np.asarray(values) != np.asarray(expected)).mean() < 1e-2
    assert_close(scale[:, :, :n], scales, "float32")
    rounded = (
        np.asarray(values, np.float32)
        * np.repeat(np.asarray(scale)[0, 0], 64)[None, : x.shape[1], None, None]
    )
    lengths = np.linalg.norm(rounded[0, :, 0], axis=-1)
    longest = [lengths[i : i + 64].max() for i in range(0, x.shape[1], 64)]
    assert (np.asarray(length)[0, 0, :n] >= longest).all()
    assert (np.asarray(length)[0, 0, :n] <= np.add(longest, 0.5)).all()


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize("l", [200, 256, 330])
def test_keys_and_sums(l):
    """The last tile is cut, whole, or has one block; zeros past the end are in no sum."""
    k, v = tokens(0, l), tokens(1, l)
    mean = k.astype(jnp.float32).mean(1)
    run = lambda k, v, mean: token_pass(k, v, mean=mean, rounds=True)
    rounded, (product, total) = jax.jit(run)(k, v, mean)
    check_rounded(k, mean, *rounded)
    phi = feature(k).astype(jnp.float32)
    exact = jnp.einsum("blhi,blhj->bhij", phi, v.astype(jnp.float32), precision="highest")
    assert_close(product, exact, "float32")
    assert_close(total, phi.sum(1), "float32")


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize("l", [200, 256])
def test_tokens_that_only_fill_up_are_in_no_sum(l):
    k, v = tokens(0, 384), tokens(1, 384)
    k, mean = k.at[:, l:].set(0), k[:, :l].astype(jnp.float32).mean(1)
    run = lambda *args, **options: token_pass(*args, mean=mean, rounds=True, **options)
    both = lambda: (run(k, v, tokens=l), run(k[:, :l], v[:, :l]))
    (rounded, sums), (expected, exact) = jax.jit(both)()
    n = -(-l // 64)
    np.testing.assert_array_equal(rounded[0][:, :l], expected[0])
    for ours, theirs in zip(rounded[1:], expected[1:], strict=True):
        np.testing.assert_array_equal(ours[:, :, :n], theirs[:, :, :n])
    jax.tree.map(lambda a, e: assert_close(a, e, "float32"), sums, exact)


@interpreted
@pytest.mark.slow
def test_queries():
    q = tokens(2, 140)
    rounded, sums = jax.jit(lambda q: token_pass(q, rounds=True))(q)
    check_rounded(q, jnp.zeros((1, 1, 128)), *rounded)
    assert sums is None


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize("rounds", [True, False])
def test_queries_and_their_linear_branch(rounds):
    """Two heads, each with its own product; the last tile is cut."""
    q, k, v = (tokens(seed, 300, 2) for seed in (2, 3, 4))
    rng = np.random.default_rng(7)
    kernel = put(rng.normal(size=(128, 128)) / 12, jnp.float32)
    bias = put(rng.normal(size=128), jnp.float32)
    phi = feature(k).astype(jnp.float32)
    product = jnp.einsum("blhi,blhj->bhij", phi, v.astype(jnp.float32), precision="highest")
    _, *linear = operand(q, (product, phi.sum(1)), kernel, bias)
    run = lambda q, *linear: query_pass(q, *linear, rounds=rounds)
    rounded, branch = jax.jit(run)(q, *linear)
    assert_close(branch, linear_attention(q, k, v, kernel, bias), "bf16")
    assert (rounded is not None) == rounds
    if rounds:
        values, *rows = rounded
        head = q[:, :, :1], jnp.zeros((1, 1, 128)), values[:, :, :1]
        check_rounded(*head, *(row[:, :1] for row in rows))


@interpreted
def test_programs_are_filled():
    """Chunks of a head: all multiprocessors end at about the same time, and none without a tile."""
    from pallas_kernels.token_pass_mosaic import FILL, _chunks

    for heads, tiles in ((12, 256), (40, 591), (1, 5), (3, 1)):
        chunks = _chunks(heads, tiles, 132)
        steps = -(-tiles // chunks)
        assert (chunks - 1) * steps < tiles
        if heads * tiles > 132 * 8:
            time = -(-heads * chunks // 132) * (steps + FILL)
            assert time < 1.25 * heads * tiles / 132 + 2 * FILL
