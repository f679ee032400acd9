"""The dense kernels under the interpreter, against float64; the cases in which one op must serve;
and lowering."""

from functools import partial

import described
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import put
from jax.sharding import PartitionSpec as P
from tolerances import assert_close

from pallas_kernels import attention
from pallas_kernels.flash_attention import IMPLEMENTATIONS, cudnn, reference, triton
from pallas_kernels.flash_attention.forward import forward
from pallas_kernels.flash_attention.tangent import tangent
from pallas_kernels.flash_attention.workloads import WORKLOADS

ours = partial(attention, impl="interpret")
f64 = lambda x: put(np.asarray(x, np.float64))


def draw(seed, b, l, s, h, k, dtype, shift=0.0):
    """q, k, v."""
    rng = np.random.default_rng(seed)
    q, k, v = (
        put(rng.normal(size=(b, n, h, k)) + m, dtype) for n, m in ((l, 0.0), (s, shift), (s, 0.0))
    )
    return q, k, v


def plain(q, k, v, scale=None):
    """The formula, in the dtype of its arguments."""
    p = jax.nn.softmax(
        (q.shape[-1] ** -0.5 if scale is None else scale) * jnp.einsum("blhk,bshk->bhls", q, k)
    )
    return jnp.einsum("bhls,bshk->blhk", p, v)


def derivatives(f, args, tangents, g):
    """Output, tangent, and the three gradients, with one forward pass: the tangent transposed."""
    out, push = jax.linearize(f, *args)
    return out, push(*tangents), *jax.linear_transpose(push, *args)(g)


def exact(args, tangents, g, scale=None):
    """The same in float64, by hand."""
    (q, k, v), (tq, tk, tv), g = jax.tree.map(
        lambda x: np.asarray(x, np.float64), (args, tangents, g)
    )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    product = partial(np.einsum, "blhk,bshk->bhls")
    over_keys, over_queries = (
        partial(np.einsum, "bhls,bshk->blhk"),
        partial(np.einsum, "bhls,blhk->bshk"),
    )
    x, tx, dp = scale * product(q, k), scale * (product(tq, k) + product(q, tk)), product(g, v)
    p = np.exp(x - x.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    centred = lambda y: p * (y - (p * y).sum(-1, keepdims=True))
    t = over_keys(p, tv) + over_keys(centred(tx), v)
    dx = scale * centred(dp)
    return over_keys(p, v), t, over_keys(dx, k), over_queries(dx, q), over_queries(p, g)


NAMES = ("o", "tangent", "dq", "dk", "dv")


def close(actual, expected, bound, names=NAMES, floor=1e-6):
    """Relative L2; `floor` for results that are exactly zero in float64."""
    for name, a, e in zip(names, actual, expected, strict=True):
        error = np.linalg.norm(np.asarray(a, np.float64) - e)
        assert error <= bound * np.linalg.norm(e) + floor * e.size**0.5, (
            f"{name}: {error} of {np.linalg.norm(e)}"
        )


def check(b, l, s, h, k, dtype, scale=None, seed=0):
    args, tangents = draw(seed, b, l, s, h, k, dtype), draw(seed + 1, b, l, s, h, k, dtype)
    g = draw(seed + 2, b, l, s, h, k, dtype)[0]
    actual = jax.jit(partial(derivatives, partial(ours, scale=scale)))(args, tangents, g)
    assert all(x.dtype == dtype for x in actual)
    close(actual, exact(args, tangents, g, scale), 1e-2 if dtype == jnp.bfloat16 else 2e-6)


# Rows mod 128 and keys mod 64 are 0, 1, 16, 56, 80, 120; one block of keys, one key; as many keys
# as a prompt has tokens.
@pytest.mark.slow
@pytest.mark.parametrize("l, s", [(128, 512), (129, 65), (144, 16), (248, 184), (80, 1)])
def test_bfloat16(l, s):
    check(1, l, s, 1, 32, jnp.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("l, s, scale", [(33, 16, 0.7), (56, 97, None)])
def test_float32(l, s, scale):
    check(1, l, s, 1, 32, jnp.float32, scale)


@pytest.mark.slow
def test_head_width_128_heads_and_batch():
    check(2, 70, 90, 3, 128, jnp.bfloat16)


def test_the_formulas_are_the_derivatives():
    """The float64 tangent and gradients above equal automatic differentiation and a finite
    difference."""
    with jax.enable_x64(True):
        args, tangents = (
            tuple(map(f64, draw(seed, 1, 20, 30, 2, 32, jnp.float32))) for seed in (0, 1)
        )
        auto = jax.jit(partial(derivatives, plain))(args, tangents, args[0])
        along = jax.jit(lambda e: plain(*(a + e * t for a, t in zip(args, tangents, strict=True))))
        slope = (along(1e-5) - along(-1e-5)) / 2e-5
        expected = exact(args, tangents, args[0])
        close(auto, expected, 1e-12, floor=0)
        close([slope], expected[1:2], 1e-7, ["finite difference"])


@pytest.mark.slow
def test_large_tangents_and_what_keys_share():
    """A common part of the keys moves no output; in bfloat16 it must not drown the rest of the
    tangent."""
    args, tangents = (
        draw(0, 1, 70, 150, 1, 64, jnp.bfloat16, shift=8.0),
        draw(1, 1, 70, 150, 1, 64, jnp.bfloat16, shift=8.0),
    )
    tangents = tuple(100 * t for t in tangents)
    _, t = jax.jit(partial(jax.jvp, ours))(args, tangents)
    close([t], exact(args, tangents, args[0])[1:2], 1e-2, ["tangent"])


@pytest.mark.slow
def test_the_tangent_needs_no_exact_statistics():
    """A rounded lse leaves the tangent as it is."""
    args, tangents = draw(0, 1, 40, 70, 1, 32, jnp.float32), draw(1, 1, 40, 70, 1, 32, jnp.float32)
    options = {"scale": 32**-0.5, "tile": triton.FLOAT32, "interpret": True}
    o, lse = forward(*args, **options)
    s = np.einsum("blhk,bshk->bhls", *args[:2]) * 32**-0.5
    assert_close(lse, np.log2(np.exp(s.astype(np.float64)).sum(-1)), "float32")
    run = lambda lse: tangent(*args, o, lse, *tangents, **options)
    assert_close(run(lse + 3.5), run(lse), "float32")


# The cases of one op in both modes, in float32 against the reference.


@pytest.fixture(scope="module")
def qkv():
    return draw(0, 2, 37, 20, 2, 32, jnp.float32)


def same(f, *args):
    for actual, expected in zip(
        jax.tree.leaves(jax.jit(partial(f, ours))(*args)),
        jax.tree.leaves(jax.jit(partial(f, plain))(*args)),
        strict=True,
    ):
        assert_close(actual, expected, "float32")


def loss(f, *args):
    return jnp.square(f(*args)).mean()


@pytest.mark.slow
@pytest.mark.parametrize("i", range(3))
def test_one_operand(qkv, i):
    alone = lambda f, x: f(*qkv[:i], x, *qkv[i + 1 :])
    same(lambda f, x: jax.jvp(partial(alone, f), (x,), (2 * x,)), qkv[i])
    same(lambda f, x: jax.grad(lambda x: jnp.square(alone(f, x)).mean())(x), qkv[i])


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", [False, True])
def test_inside_a_scan(qkv, checkpoint):
    def stacked(f, q, k, v):
        step = lambda q, i: (f(q, i * k, v), None)
        return jax.lax.scan(jax.checkpoint(step) if checkpoint else step, q, jnp.arange(1.0, 3.0))[
            0
        ]

    same(lambda f, *args: jax.jvp(partial(stacked, f), args, args[:1] + args[:0:-1]), *qkv)
    same(
        lambda f, *args: jax.grad(
            partial(loss, partial(stacked, f)), 1 if checkpoint else (0, 1, 2)
        )(*args),
        *qkv,
    )


@pytest.mark.slow
def test_tangent_target_outside_gradient_inside(qkv):
    def step(f, q, k, v):
        target = jax.lax.stop_gradient(jax.jvp(f, (q, k, v), (q, v, k))[1])
        return jax.grad(lambda w: jnp.square(f(w * q, w * k, w * v) - target).mean())(
            jnp.float32(0.9)
        )

    same(step, *qkv)


@pytest.mark.slow
def test_under_shard_map(qkv):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    heads = P(None, None, "x", None)
    split = lambda f: jax.shard_map(
        f, mesh=mesh, in_specs=(heads,) * 3, out_specs=heads, check_vma=False
    )
    same(lambda f, *args: jax.jvp(split(f), args, args[:1] + args[:0:-1]), *qkv)
    same(lambda f, *args: jax.grad(partial(loss, split(f)), (0, 1, 2))(*args), *qkv)


@pytest.mark.slow
def test_cudnn_with_our_tangent(monkeypatch, qkv):
    """cuDNN's statistics are natural logarithms, [b l h], and rounded to bfloat16."""

    def stand_in(q, k, v, scale, return_residual):
        lse = jax.nn.logsumexp(
            scale * jnp.einsum("blhk,bshk->blhs", q, k, preferred_element_type=jnp.float32), -1
        )
        return reference.attention(q, k, v, scale=scale), lse.astype(q.dtype)

    monkeypatch.setattr(cudnn, "fused", stand_in)
    args, tangents = (draw(seed, 1, 50, 70, 2, 32, jnp.bfloat16) for seed in (0, 1))
    run = partial(cudnn.with_triton_tangent, scale=0.5, interpret=True)
    actual = jax.jit(partial(derivatives, run))(args, tangents, args[0])
    close(actual, exact(args, tangents, args[0], 0.5), 1e-2)


def test_errors():
    args = draw(0, 1, 5, 5, 1, 48, jnp.bfloat16)
    with pytest.raises(ValueError, match=r'head widths 32, 64, 128, not 48; use impl="reference"'):
        attention(*args, impl="triton")
    with pytest.raises(ValueError, match="take bfloat16, not float32"):
        attention(*(x[..., :32].astype(jnp.float32) for x in args), impl="triton")
    with pytest.raises(ValueError, match="take bfloat16, not float16"):
        attention(*(x[..., :32].astype(jnp.float16) for x in args), impl="cudnn+triton")
    with pytest.raises(ValueError, match="a positive scale, not -1"):
        attention(*(x[..., :32] for x in args), impl="triton", scale=-1.0)


@pytest.mark.parametrize("name", WORKLOADS)
def test_real_shapes_lower_for_cuda(name):
    q, k, v = jax.eval_shape(WORKLOADS[name].make, jax.random.key(0))
    assert WORKLOADS[name].flops == 4 * q.size * k.shape[1] and WORKLOADS[name].bytes == 2 * (
        2 * q.size + 2 * k.size
    )
    run = lambda q, k, v: derivatives(partial(attention, impl="triton"), (q, k, v), (q, k, v), q)
    text = described.lower(described.trace(jax.jit(run), q, k, v)).as_text()
    for kernel in ("forward_kernel", "tangent_kernel", "query_kernel", "key_kernel"):
        assert kernel in text


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["triton", "cudnn+triton"])
@pytest.mark.parametrize("l, s, k", [(300, 200, 64), (1000, 512, 128), (257, 1, 32)])
def test_on_the_gpu(impl, l, s, k):
    args, tangents = draw(0, 2, l, s, 3, k, jnp.bfloat16), draw(1, 2, l, s, 3, k, jnp.bfloat16)
    assert impl in IMPLEMENTATIONS["attention"]
    actual = jax.jit(partial(derivatives, partial(attention, impl=impl)))(args, tangents, args[0])
    close(actual, exact(args, tangents, args[0]), 1e-2)
