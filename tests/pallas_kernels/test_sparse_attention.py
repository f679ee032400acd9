from functools import partial

import described
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import put
from jaxprs import largest
from tolerances import assert_close

import pallas_kernels.sparse_attention as op
from pallas_kernels import flash_attention, gathering
from pallas_kernels.sparse_attention import chosen_blocks, dense_map

SIZED = ("block_q", "block_k")
attention = jax.jit(flash_attention.attention)
block_map = jax.jit(op.block_map, static_argnames=("topk", *SIZED))
linear_attention = jax.jit(op.linear_attention)
pooled_scores = jax.jit(op.pooled_scores, static_argnums=(2, 3))
sparse_attention = jax.jit(op.sparse_attention, static_argnames=(*SIZED, "impl"))
sparse_linear_attention = jax.jit(op.sparse_linear_attention, static_argnames=("topk", *SIZED))

SIZES = {"q128k64": (128, 64), "q64k128": (64, 128)}


def normal(seed, *shape):
    return put(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def qkv(b=1, l=300, h=2, k=16):
    return tuple(normal(seed, b, l, h, k) for seed in range(3))


def golden_qkv(g, dtype=jnp.float32):
    return tuple(put(g[f"in/{name}"], dtype) for name in "qkv")


def projection(g):
    return put(g["w/proj_l.weight"].T), put(g["w/proj_l.bias"])


def masked(q, k, v, blocks, block_q, block_k):
    """The same function with the map as a mask on dense scores; plain, so that JAX differentiates
    it."""
    l = q.shape[1]
    keep = dense_map(blocks, -(-l // block_k)).astype(bool)
    keep = jnp.repeat(jnp.repeat(keep, block_q, 2), block_k, 3)[:, :, :l, :l]
    s = jnp.einsum("blhk,bshk->bhls", q, k) * q.shape[-1] ** -0.5
    return jnp.einsum("bhls,bshk->blhk", jax.nn.softmax(jnp.where(keep, s, -jnp.inf)), v)


@pytest.mark.parametrize("tag", ["q128k64_t0.1", "q128k64_t0.2", "q64k128_t0.2", "q64k128_t0.3"])
def test_golden_maps_and_sparse_branch(golden, tag):
    g = golden("sla_op")
    (block_q, block_k), topk = SIZES[tag.split("_t")[0]], float(tag.split("_t")[1])
    q, k, v = golden_qkv(g)
    assert_close(
        pooled_scores(q, k, block_q, block_k), g[f"mid/{tag}/pooled_score"], "sla", "pooled scores"
    )
    blocks = block_map(q, k, topk=topk, block_q=block_q, block_k=block_k)
    expected = g[f"out/{tag}/sparse_map"]
    np.testing.assert_array_equal(np.asarray(dense_map(blocks, expected.shape[-1])), expected)
    if f"out/{tag}/o_s" in g:
        o = sparse_attention(q, k, v, blocks, block_q=block_q, block_k=block_k)
        assert_close(o, g[f"out/{tag}/o_s"], "sla", "sparse branch")


def test_golden_linear_branch_and_sum(golden):
    g = golden("sla_op")
    q, k, v = golden_qkv(g)
    kernel, bias = projection(g)
    assert_close(
        linear_attention(q, k, v, jnp.eye(64), jnp.zeros(64)),
        g["mid/o_l_raw"],
        "sla",
        "before the projection",
    )
    assert_close(linear_attention(q, k, v, kernel, bias), g["mid/o_l"], "sla", "projected")
    assert_close(
        sparse_linear_attention(q, k, v, kernel, bias, topk=0.2),
        g["out/q128k64_t0.2/o"],
        "sla",
        "sum",
    )


def test_golden_bfloat16(golden):
    g = golden("sla_op")
    q, k, v = golden_qkv(g, jnp.bfloat16)
    o = sparse_linear_attention(q, k, v, *projection(g), topk=0.2)
    assert o.dtype == jnp.bfloat16
    assert_close(o, g["out/q128k64_t0.2/o_bf16"], "bf16")


def test_cuda_kernel_of_the_publishers(golden):
    """Theirs rounds the pooled scores to bfloat16, so near ties choose other blocks: query blocks
    are compared one by one."""
    g = golden("sla_cuda")
    q, k, v = (put(g[name], jnp.bfloat16) for name in "qkv")
    o = sparse_linear_attention(q, k, v, put(g["proj_w"].T), put(g["proj_b"]), topk=0.2)
    error = np.abs(np.asarray(o, np.float32) - g["out_sla"])[0]  # [l h k]
    worst = np.array([error[i : i + 128].max((0, 2)) for i in range(0, 2000, 128)])  # [q_blocks h]
    assert (worst < 2e-2).mean() >= 0.8, worst
    assert np.median(worst) < 1e-2


def test_at_least_one_block_is_kept(golden):
    """The published code keeps none here and divides zero by zero."""
    g = golden("sla_op")
    assert not g["out/q64k128_t0.1/sparse_map"].any()
    q, k, v = golden_qkv(g)
    blocks = block_map(q, k, topk=0.1, block_q=64, block_k=128)
    assert blocks.shape == (1, 2, 15, 1)
    assert np.isfinite(np.asarray(sparse_attention(q, k, v, blocks, block_q=64, block_k=128))).all()


def test_number_of_blocks():
    cases = {
        (32760, 0.1, 64): 51,
        (32760, 0.1, 128): 25,
        (75600, 0.1, 64): 118,
        (75600, 0.15, 64): 177,
        (300, 0.1, 64): 1,
        (64, 1.0, 64): 1,
    }
    for args, chosen in cases.items():
        assert chosen_blocks(*args) == chosen, args


def test_map_is_sorted_unique_and_breaks_ties_low():
    q, k, _ = qkv(b=2, l=1000)
    blocks = np.asarray(block_map(q, k, topk=0.4, block_q=128, block_k=64))
    assert blocks.dtype == np.int32 and blocks.shape == (2, 2, 8, 6)
    assert (np.diff(blocks, axis=-1) > 0).all()
    scores = np.asarray(pooled_scores(q, k, 128, 64))
    kept = np.asarray(dense_map(put(blocks), 16)).astype(bool)
    assert (np.where(kept, scores, np.inf).min(-1) >= np.where(kept, -np.inf, scores).max(-1)).all()
    same = jnp.ones((1, 640, 1, 8))
    np.testing.assert_array_equal(
        np.asarray(block_map(same, same, topk=0.3, block_q=128, block_k=64)),
        np.tile(np.arange(3), (1, 1, 5, 1)),
    )


@pytest.mark.parametrize(
    "tail, block_q, block_k", [(0, 128, 64), (1, 64, 64), (16, 64, 128), (56, 128, 64)]
)
def test_all_blocks_is_dense_attention(tail, block_q, block_k):
    q, k, v = qkv(l=256 + tail, h=1)
    o = sparse_linear_attention(
        q, k, v, jnp.zeros((16, 16)), jnp.zeros(16), topk=1.0, block_q=block_q, block_k=block_k
    )
    assert_close(o, attention(q, k, v), "float32")


@pytest.mark.parametrize("l", [1, 65, 335])
def test_tails_of_every_kind(l):
    q, k, v = qkv(l=l)
    scores = np.asarray(pooled_scores(q, k, 128, 64), np.float64)
    tail = (l - 1) // 64 * 64
    mean = np.asarray(k, np.float64)[0, tail:, 1].mean(0) - np.asarray(k, np.float64)[0, :, 1].mean(
        0
    )
    first = np.asarray(q, np.float64)[0, :128, 1].mean(0)
    assert_close(
        scores[0, 1, 0, -1],
        first @ mean,
        "float32",
        "the tail block is averaged over its own length",
    )
    blocks = block_map(q, k, topk=0.4)
    assert_close(
        sparse_attention(q, k, v, blocks),
        jax.jit(masked, static_argnums=(4, 5))(q, k, v, blocks, 128, 64),
        "float32",
    )


def test_invariances():
    q, k, v = qkv(l=256)
    blocks = block_map(q, k, topk=0.5)
    o = sparse_attention(q, k, v, blocks)
    assert_close(
        sparse_attention(q, k + 0.7, v, blocks), o, "float32", "a constant added to every key"
    )
    np.testing.assert_array_equal(np.asarray(block_map(q, k + 0.7, topk=0.5)), np.asarray(blocks))
    assert_close(sparse_attention(q, k, -2 * v, blocks), -2 * o, "float32", "values scaled")
    move = lambda x: jnp.roll(x, 64, 1)
    assert_close(
        sparse_attention(q, move(k), move(v), jnp.sort((blocks + 1) % 4)),
        o,
        "float32",
        "key blocks in another order",
    )


@pytest.mark.slow
@pytest.mark.parametrize("pieces", [1, 3])
def test_derivatives_are_those_of_the_masked_softmax(monkeypatch, pieces):
    args = q, k, _ = qkv(b=2, l=335)
    blocks = block_map(q, k, topk=0.4)
    out = normal(3, *q.shape)
    if pieces > 1:
        monkeypatch.setattr(gathering, "CHUNK_BYTES", 1)

    def derivatives(f, q, k, v):  # not constants: the compiler would compute with them
        run = lambda *qkv: f(*qkv, blocks)
        tangent = jax.jvp(run, (q, k, v), (v, q, k))[1]
        return tangent, *jax.grad(lambda *qkv: (run(*qkv) * out).sum(), (0, 1, 2))(q, k, v)

    actual = jax.jit(partial(derivatives, op.sparse_attention))(*args)
    expected = jax.jit(partial(derivatives, lambda *a: masked(*a, 128, 64)))(*args)
    for name, ours, theirs in zip(("tangent", "dq", "dk", "dv"), actual, expected, strict=True):
        assert_close(ours, theirs, "float32", name)


@pytest.mark.slow
def test_gradients_of_the_whole_op():
    """Against central differences along a random direction, projection included."""
    q, k, v = qkv(l=200)
    args = (q, k, v, 0.3 * normal(3, 16, 16), jnp.ones(16))
    ways = tuple(normal(4 + i, *a.shape) for i, a in enumerate(args))
    blocks = block_map(q, k, topk=0.4)
    f = jax.jit(lambda *a: jnp.sin(sparse_attention(*a[:3], blocks) + linear_attention(*a)).sum())
    g = jax.jit(
        jax.grad(lambda *a: jnp.sin(sparse_linear_attention(*a, topk=0.4)).sum(), range(5))
    )(*args)
    for i in range(5):
        move = lambda s, i=i: f(
            *(
                a + s * 1e-2 * w if j == i else a
                for j, (a, w) in enumerate(zip(args, ways, strict=True))
            )
        )
        slope = (move(1) - move(-1)) / 2e-2
        np.testing.assert_allclose(
            float((g[i] * ways[i]).sum()), float(slope), rtol=5e-3, atol=5e-2
        )


@pytest.mark.parametrize("l, h", [(32760, 12), (75600, 40)])
def test_memory_is_bounded_at_real_size_and_it_lowers_for_cuda(l, h):
    x = jax.ShapeDtypeStruct((1, l, h, 128), jnp.bfloat16)
    proj = jax.ShapeDtypeStruct((128, 128), jnp.float32), jax.ShapeDtypeStruct((128,), jnp.float32)
    run = lambda *a: op.sparse_linear_attention(*a, topk=0.1)
    traced = described.trace(jax.jit(run), x, x, x, *proj)
    described.lower(traced)
    assert largest(traced.jaxpr.jaxpr) <= max(gathering.CHUNK_BYTES, x.size * 4 * 1.01)
    backward = described.trace(
        jax.jit(jax.grad(lambda *a: run(*a).astype(jnp.float32).sum(), range(5))), x, x, x, *proj
    )
    described.lower(backward)
    assert largest(backward.jaxpr.jaxpr) <= max(gathering.CHUNK_BYTES, x.size * 4 * 1.01)


def test_errors():
    q, k, v = qkv()
    blocks = block_map(q, k, topk=0.5)
    with pytest.raises(
        ValueError, match=r"block list int32 \(1, 2, 3, 2\); expected int32 \(1, 2, 5, 'chosen'\)"
    ):
        sparse_attention(q, k, v, blocks, block_q=64)
    with pytest.raises(ValueError, match=r"impl is 'cudnn'; allowed: auto, reference"):
        sparse_attention(q, k, v, blocks, impl="cudnn")
    proj = jnp.zeros((q.shape[-1],) * 2), jnp.zeros(q.shape[-1])
    for keys in (0, k.shape[1] + 1):
        with pytest.raises(ValueError, match=rf"keys is {keys}; allowed: 1 to {k.shape[1]}"):
            op.sparse_linear_attention(q, k, v, *proj, topk=0.5, keys=keys)
