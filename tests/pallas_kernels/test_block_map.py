import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import put
from tolerances import assert_close

from pallas_kernels import blocking, sage_sparse_linear_attention, sparse_linear_attention
from pallas_kernels.block_map import WIDEST, block_map, block_map_and_mean, choose, pool

WIDE, NARROW = jnp.float32, jnp.bfloat16


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def many_ties(shape):
    return np.random.default_rng(0).integers(-2, 3, shape).astype(np.float32)


def zeros_of_both_signs(shape):
    return np.random.default_rng(0).choice(np.array([0.0, -0.0, 1e-45, -1e-45], np.float32), shape)


def negative(shape):
    return -np.exp(20 * normal(0, *shape))


def extremes(shape):
    return np.random.default_rng(0).choice(
        np.array([np.inf, -np.inf, 3e38, -3e38, 0, -1], np.float32), shape
    )


@pytest.mark.parametrize(
    "scores", [lambda shape: normal(0, *shape), many_ties, zeros_of_both_signs, negative, extremes]
)
@pytest.mark.parametrize("blocks, chosen", [(1, 1), (7, 3), (64, 1), (64, 64), (1182, 118)])
def test_choice_is_that_of_top_k(scores, blocks, chosen):
    """To the index, ties and signs of zero included; 1182 is a real size and no power of two."""
    s = put(scores((2, 2, 2, blocks)))
    expected = jnp.sort(jax.lax.top_k(s, chosen)[1], -1)
    lists = jax.jit(choose, static_argnames=("chosen", "interpret"))(
        s, chosen=chosen, interpret=True
    )
    assert lists.dtype == jnp.int32
    np.testing.assert_array_equal(np.asarray(lists), np.asarray(expected))


def test_ties_go_to_the_lowest_index():
    s = put([[[[1, 3, 2, 3, 2, 2, 3, 2]]]], jnp.float32)
    np.testing.assert_array_equal(
        np.asarray(choose(s, 5, interpret=True))[0, 0, 0], [1, 2, 3, 4, 6]
    )
    np.testing.assert_array_equal(np.asarray(choose(s, 2, interpret=True))[0, 0, 0], [1, 3])


token_mean = jax.jit(blocking.token_mean, static_argnums=(1, 2))


@pytest.mark.slow
@pytest.mark.parametrize(
    "tail, dtype", [(0, WIDE), (1, WIDE), (16, NARROW), (56, NARROW), (80, WIDE), (120, NARROW)]
)
def test_means(tail, dtype):
    """The tail block is averaged over its own length, and the mean of the blocks' means is that of
    the tokens."""
    x = put(normal(tail, 2, 128 + tail, 2, 16) + 1, dtype)
    exact = np.asarray(x, np.float64)
    pooled = pool(x, 64, interpret=True)
    assert pooled.dtype == jnp.float32
    expected = np.stack([exact[:, i : i + 64].mean(1) for i in range(0, x.shape[1], 64)], 2)
    assert_close(pooled, expected, "float32")
    assert_close(token_mean(pooled, x.shape[1], 64), exact.mean(1), "float32")


@pytest.mark.slow
@pytest.mark.parametrize("l, block_q, block_k", [(335, 128, 64), (376, 64, 128), (30, 64, 64)])
def test_map_is_that_of_the_reference(l, block_q, block_k):
    q, k = (put(normal(seed, 2, l, 2, 16) + seed, jnp.bfloat16) for seed in range(2))
    chosen = max(1, -(-l // block_k) // 2)
    blocks, mean = jax.jit(
        lambda q, k: block_map_and_mean(q, k, chosen, block_q, block_k, interpret=True)
    )(q, k)
    np.testing.assert_array_equal(
        np.asarray(blocks), np.asarray(blocking.block_map(q, k, chosen, block_q, block_k))
    )
    assert_close(mean, np.asarray(k, np.float64).mean(1), "float32")


def test_no_gradient_flows_through_the_choice():
    x = put(normal(0, 1, 130, 1, 16))
    total = lambda q: (
        q.sum() * block_map(q, x, 2, 64, 64, interpret=True).sum().astype(jnp.float32)
    ).sum()
    grad = jax.jit(jax.grad(total))(x)
    assert (grad == grad[0, 0, 0, 0]).all() and grad[0, 0, 0, 0] > 0


def test_errors():
    with pytest.raises(
        ValueError,
        match=f"block_map: {WIDEST + 1} key blocks; the kernel sorts out at most {WIDEST}",
    ):
        choose(jnp.zeros((1, 1, 1, WIDEST + 1)), 1, interpret=True)


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["reference", "interpret"])
@pytest.mark.parametrize("op", [sparse_linear_attention, sage_sparse_linear_attention])
def test_means_at_hand_give_the_same_output(op, impl):
    """Means of the rotation's pass; with others the map, and so the output, is another."""
    q, k, v = (put(normal(seed, 1, 300, 2, 16)) for seed in range(3))
    proj = put(normal(3, 16, 16)) / 4, put(normal(4, 16))
    mean = lambda x, size: blocking.block_means(x, size)
    means = jax.jit(lambda q, k: (mean(q, 128), mean(k, 64)))(q, k)
    run = jax.jit(
        lambda *a, means=None: op(*a, topk=0.5, block_q=128, block_k=64, means=means, impl=impl)
    )
    expected = run(q, k, v, *proj)
    assert_close(run(q, k, v, *proj, means=means), expected, "float32")
    assert np.abs(run(q, k, v, *proj, means=(-means[0], means[1])) - expected).max() > 0.1
    with pytest.raises(
        ValueError,
        match=(
            r"means float32 \(1, 2, 5, 16\), float32 \(1, 2, 3, 16\); expected float32 \(1, 2, 3,"
            r" 16\) and"
        ),
    ):
        run(q, k, v, *proj, means=means[::-1])


@pytest.mark.slow
def test_means_have_no_gradient():
    q, k, v = (put(normal(seed, 1, 130, 1, 16)) for seed in range(3))
    means = put(normal(3, 1, 1, 2, 16)), put(normal(4, 1, 1, 3, 16))
    loss = lambda means: sparse_linear_attention(
        q, k, v, np.eye(16, dtype=np.float32), np.zeros(16, np.float32), topk=0.5, means=means
    ).sum()
    assert not any(g.any() for g in jax.jit(jax.grad(loss))(means))
