"""The gradient kernels of sparse-linear attention, interpreted, against automatic differentiation
of the formula in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import put
from tolerances import assert_close

from pallas_kernels import flash_attention, linear_branch
from pallas_kernels.derivatives import with_derivatives
from pallas_kernels.sparse_attention import dense_map, linear_attention, linear_backward, reference
from pallas_kernels.sparse_attention.backward import backward
from pallas_kernels.sparse_attention.transpose import transpose

NAMES = ("dq", "dk", "dv", "dproj_kernel", "dproj_bias")
jit = partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)  # far more is compiled here than computed
sparse_gradient = jit(partial(backward, interpret=True), static_argnums=(7, 8))
reference_forward = jit(reference.forward, static_argnums=(4, 5))


def arguments(l, block_q, block_k, chosen, *, b=2, h=2, k=16, dtype=jnp.float32):
    """args of the op and a cotangent; the block lists are drawn at random."""
    rng = np.random.default_rng(l)
    draw = lambda *shape: put(rng.normal(size=shape), jnp.float32)
    q, keys, v, do = (draw(b, l, h, k).astype(dtype) for _ in range(4))
    n, columns = -(-l // block_q), -(-l // block_k)
    lists = [np.sort(rng.permutation(columns)[:chosen]) for _ in range(b * h * n)]
    return (
        q,
        keys,
        v,
        draw(k, k) / 4,
        draw(k),
        put(lists, jnp.int32).reshape(b, h, n, chosen),
    ), do


def products(q):
    """The sums' dtype, float64 or float32, and einsum in it: what is multiplied has the dtype of
    q."""
    wide = jnp.float64 if q.dtype == jnp.float64 else jnp.float32
    return wide, partial(jnp.einsum, preferred_element_type=wide, precision="highest")


def near(q, k, v, kernel, bias, blocks, block_q, block_k):
    """The sparse branch as JAX differentiates it: the map is a mask on dense scores."""
    keep = dense_map(blocks, -(-k.shape[1] // block_k)).astype(bool)
    keep = jnp.repeat(jnp.repeat(keep, block_q, 2), block_k, 3)[:, :, : q.shape[1], : k.shape[1]]
    dot = products(q)[1]
    p = jax.nn.softmax(
        jnp.where(keep, q.shape[-1] ** -0.5 * dot("blhk,bshk->bhls", q, k), -jnp.inf)
    ).astype(q.dtype)
    return dot("bhls,bshk->blhk", p, v).astype(q.dtype)


def far(q, k, v, kernel, bias, *_):
    """The linear branch as JAX differentiates it."""
    wide, dot = products(q)
    phi_q, phi_k = (jax.nn.softmax(x.astype(wide)).astype(x.dtype) for x in (q, k))
    m = dot("bhij,jo->bhio", dot("blhi,blhj->bhij", phi_k, v), kernel.astype(wide))
    n = (phi_q.astype(wide) * phi_k.sum(1, dtype=wide)[:, None]).sum(
        -1, keepdims=True
    ) + linear_branch.EPS
    return (dot("blhi,bhio->blho", phi_q, m.astype(q.dtype)) / n + bias.astype(wide)).astype(
        q.dtype
    )


def both(*args):
    return near(*args) + far(*args)


@partial(jit, static_argnums=(0, 3, 4))
def differentiated(f, args, do, block_q, block_k):
    return jax.vjp(lambda *a: f(*a, args[5], block_q, block_k), *args[:5])[1](do)


def in_float64(f, args, do, block_q, block_k):
    wide = lambda x: np.asarray(x, np.int32 if x.dtype == jnp.int32 else np.float64)
    with jax.enable_x64(True):
        return [
            np.asarray(g)
            for g in differentiated(f, tuple(map(wide, args)), wide(do), block_q, block_k)
        ]


def sums(args):
    """What the linear branch keeps of the forward pass: phi(k)^T v and the sum of phi(k)."""
    phi = linear_branch.feature(args[1])
    return products(phi)[1]("blhi,blhj->bhij", phi, args[2]), phi.sum(1, dtype=jnp.float32)


def saved(args, block_q, block_k):
    """All that the forward pass keeps."""
    q, k, v, _, _, blocks = args
    return *reference.forward(q, k, v, blocks, block_q, block_k), *sums(args)


@partial(jit, static_argnums=(2, 3))
def gradient(args, do, block_q, block_k):
    return linear_backward.grad(
        args, saved(args, block_q, block_k), do, block_q, block_k, interpret=True
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "l, block_q, block_k, chosen",
    [
        (1, 128, 64, 1),
        (56, 64, 128, 1),
        (128, 128, 64, 1),
        (144, 64, 64, 2),
        (184, 128, 64, 1),
        (208, 64, 128, 2),
        (248, 128, 64, 4),
    ],
)
def test_sparse_branch_equals_float64_at_every_tail(l, block_q, block_k, chosen):
    args, do = arguments(l, block_q, block_k, chosen)
    (q, k, v, _, _, blocks), sizes = args, (block_q, block_k)
    actual = sparse_gradient(
        q, k, v, blocks, *reference_forward(q, k, v, blocks, *sizes), do, *sizes
    )
    chosen = jnp.repeat(dense_map(blocks, -(-l // block_k)).any(2), block_k, -1)[:, :, :l].swapaxes(
        1, 2
    )  # [b l h]
    for name, ours, exact in zip(
        NAMES[:3], actual, in_float64(near, args, do, *sizes)[:3], strict=True
    ):
        assert_close(ours, exact, "float32", name)
        assert name == "dq" or (np.asarray(ours)[~chosen] == 0).all(), (
            f"{name} of keys that no query chose"
        )


@pytest.mark.slow
@pytest.mark.parametrize("l", [1, 208])
def test_linear_branch_equals_float64(monkeypatch, l):
    """Programs take one, and two, chunks of each head."""
    monkeypatch.setattr(linear_backward, "PROGRAMS", 8)
    args, do = arguments(l, 64, 64, 1)
    zeros = tuple(jnp.zeros_like(x) for x in args[:3])
    run = jit(
        lambda args, do: linear_backward.linear_backward(
            *args[:3], *sums(args), args[3], do, zeros, interpret=True
        )
    )
    for name, ours, exact in zip(
        NAMES, run(args, do), in_float64(far, args, do, 64, 64), strict=True
    ):
        assert_close(ours, exact, "float32", name)


@pytest.mark.slow
def test_bfloat16_is_as_exact_as_automatic_differentiation():
    args, do = arguments(184, 128, 64, 2, b=1, k=32, dtype=jnp.bfloat16)
    exact, plain = in_float64(both, args, do, 128, 64), differentiated(both, args, do, 128, 64)
    error = lambda x, e: np.linalg.norm(np.asarray(x, np.float64) - e) / np.linalg.norm(e)
    for name, ours, theirs, e in zip(
        NAMES, gradient(args, do, 128, 64)[:5], plain, exact, strict=True
    ):
        assert ours.dtype == theirs.dtype
        assert error(ours, e) <= min(1.1 * error(theirs, e) + 1e-6, 1e-2), (
            name,
            error(ours, e),
            error(theirs, e),
        )


@pytest.mark.parametrize("l, block_q, block_k, chosen", [(208, 64, 128, 2), (248, 128, 64, 4)])
def test_all_blocks_is_the_dense_gradient(l, block_q, block_k, chosen):
    (q, k, v, *_, blocks), do = arguments(l, block_q, block_k, chosen)
    o, lse = reference_forward(q, k, v, blocks, block_q, block_k)
    dense = jit(lambda *a: jax.vjp(flash_attention.attention, *a)[1](do))(q, k, v)
    for name, ours, expected in zip(
        NAMES[:3],
        sparse_gradient(q, k, v, blocks, o, lse, do, block_q, block_k),
        dense,
        strict=True,
    ):
        assert_close(ours, expected, "float32", name)


def test_what_the_forward_leaves_past_the_end_does_not_matter():
    (q, k, v, *_, blocks), do = arguments(184, 128, 64, 1)
    o, lse = reference_forward(q, k, v, blocks, 128, 64)
    clean = sparse_gradient(q, k, v, blocks, o, lse, do, 128, 64)
    for ours, expected in zip(
        sparse_gradient(q, k, v, blocks, o, lse.at[:, :, 1, 56:].set(jnp.nan), do, 128, 64),
        clean,
        strict=True,
    ):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(expected))


def test_lists_turned_round():
    *_, blocks = arguments(1000, 64, 64, 5)[0]
    columns = jit(transpose, static_argnums=1)(blocks, 16)
    start, queries, order = (np.asarray(x) for x in (columns.start, columns.queries, columns.order))
    chosen = np.asarray(dense_map(blocks, 16)).reshape(4, 16, 16).swapaxes(1, 2).reshape(64, 16)
    for c in range(64):
        np.testing.assert_array_equal(queries[start[c] : start[c + 1]], np.flatnonzero(chosen[c]))
    np.testing.assert_array_equal(np.sort(order), np.arange(64))
    length = chosen.sum(1)[order].reshape(4, 16)
    np.testing.assert_array_equal(
        order.reshape(4, 16) // 16, np.arange(4)[:, None] + np.zeros((4, 16))
    )
    assert (np.diff(length) <= 0).all() and (length[:, 0] > length[:, -1]).all()


@pytest.mark.slow
def test_long_lists_go_first():
    """In each of three heads all eight query blocks chose key block 5, and two others each."""
    rest = np.array([[0, 1], [2, 3], [4, 6], [7, 8], [9, 10], [11, 12], [13, 14], [0, 15]])
    lists = np.sort(np.concatenate([np.full((8, 1), 5), rest], 1))
    blocks = np.stack([lists] * 3)[None].astype(np.int32)
    order = np.asarray(jax.jit(transpose, static_argnums=1)(blocks, 16).order)
    np.testing.assert_array_equal(order[:4], [5, 21, 37, 0])
    np.testing.assert_array_equal(order[3:] // 16, np.repeat(np.arange(3), 15))


def test_pairs_that_do_not_fit():
    blocks = jax.ShapeDtypeStruct((40, 40, 1182, 118), jnp.int32)
    with pytest.raises(
        ValueError,
        match=(
            "1600 heads x 1182 key blocks x 1182 query blocks in 31 bits; allowed here: at most"
            " 1537 heads"
        ),
    ):
        jax.eval_shape(lambda blocks: transpose(blocks, 1182), blocks)


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", [False, True])
def test_inside_a_scan(checkpoint):
    """Two layers of the op with its forward and tangent from the reference, its gradient from the
    kernels."""
    args, do = arguments(150, 128, 64, 2, b=1)

    def forward(*args):
        kept = saved(args, 128, 64)
        return kept[0] + linear_attention(*args[:5]), kept

    plain = lambda *a: reference.sparse_attention(*a[:3], a[5], 128, 64) + linear_attention(*a[:5])
    smooth = lambda *a: reference.forward(*a[:3], args[5], 128, 64)[0] + linear_attention(*a)
    tangent = lambda args, saved, tangents: jax.jvp(smooth, args[:5], tangents[:5])[1]
    pull = partial(linear_backward.grad, block_q=128, block_k=64, interpret=True)
    op = with_derivatives(forward, tangent=tangent, grad=pull)

    def loss(f, q, kernels):
        step = lambda q, kernel: (f(q, *args[1:3], kernel, *args[4:]), None)
        return (
            jax.lax.scan(jax.checkpoint(step) if checkpoint else step, q, kernels)[0] * do
        ).sum()

    kernels = jnp.stack([args[3], -args[3]])
    actual, expected = (
        jit(jax.grad(partial(loss, f), (0, 1)))(args[0], kernels) for f in (op, plain)
    )
    for name, ours, theirs in zip(("dq", "dproj_kernel"), actual, expected, strict=True):
        assert_close(ours, theirs, "float32", name)


@pytest.mark.skipif(
    jax.__version_info__ >= (0, 11),
    reason="newer jax lowers kernels only for a GPU that is there or described",
)
@pytest.mark.parametrize("l, h, block_q, block_k", [(32760, 12, 128, 64), (75600, 40, 64, 128)])
def test_lowers_for_cuda_at_real_size(l, h, block_q, block_k):
    x, number = (
        jax.ShapeDtypeStruct((1, l, h, 128), jnp.bfloat16),
        lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32),
    )
    n, columns = -(-l // block_q), -(-l // block_k)
    args = (
        x,
        x,
        x,
        number(128, 128),
        number(128),
        jax.ShapeDtypeStruct((1, h, n, columns // 10), jnp.int32),
    )
    kept = x, number(1, h, n, block_q), number(1, h, 128, 128), number(1, h, 128)
    run = jax.jit(lambda *a: linear_backward.grad(*a, block_q, block_k, interpret=False)[:5])
    text = run.trace(args, kept, x).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("__gpu$xla.gpu.triton") == 5
