"""The forward kernel of sparse attention, interpreted, against the reference and float64."""

import described
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import put
from tolerances import assert_close

import pallas_kernels.sparse_attention as op
from pallas_kernels import blocking, linear_branch
from pallas_kernels.sparse_attention import chosen_blocks, reference, workloads
from pallas_kernels.sparse_attention.forward import forward


def qkv(b=1, l=300, h=2, k=16, dtype=jnp.float32):
    return tuple(
        put(np.random.default_rng(seed).normal(size=(b, l, h, k)), dtype) for seed in range(3)
    )


MAP = jax.jit(blocking.block_map, static_argnums=(2, 3, 4))


def projection(k=16):
    rng = np.random.default_rng(7)
    return put(rng.normal(size=(k, k)) / 4, jnp.float32), put(rng.normal(size=k), jnp.float32)


def kernel(q, k, v, blocks, sizes, **more):
    return jax.jit(lambda *args: forward(*args, *sizes, save=True, interpret=True, **more))(
        q, k, v, blocks
    )


def exact(q, k, v, blocks, block_q, block_k):
    """The same function in numpy float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    (b, l, h, d), o = q.shape, np.zeros(q.shape)
    for where in np.ndindex(b, h, blocks.shape[2]):
        at = (where[0], slice(where[2] * block_q, (where[2] + 1) * block_q), where[1])
        keys = np.concatenate(
            [np.arange(j * block_k, min(l, (j + 1) * block_k)) for j in np.asarray(blocks)[where]]
        )
        s = q[at] @ k[where[0], keys, where[1]].T / np.sqrt(d)
        p = np.exp(s - s.max(1, keepdims=True))
        o[at] = p @ v[where[0], keys, where[1]] / p.sum(1, keepdims=True)
    return o


def relative(actual, expected):
    """Sum of errors over sum of values."""
    a, e = (np.asarray(x, np.float64) for x in (actual, expected))
    return np.abs(a - e).sum() / np.abs(e).sum()


# lengths modulo the blocks: 0, 1, 16, 56, 80 and 120
@pytest.mark.slow
@pytest.mark.parametrize(
    "l, block_q, block_k",
    [(256, 128, 64), (257, 64, 128), (272, 128, 64), (312, 64, 64), (208, 64, 128), (376, 128, 64)],
)
def test_every_tail(l, block_q, block_k):
    q, k, v = qkv(b=2, l=l)
    blocks = np.array(MAP(q, k, 2, block_q, block_k))
    blocks[:, :, 0, -1] = -(-l // block_k) - 1  # the tail block is among them
    blocks[:, :, 0, 0] = 0
    o, o_s, lse = kernel(q, k, v, blocks, (block_q, block_k))
    expected, expected_lse = jax.jit(reference.forward, static_argnums=(4, 5))(
        q, k, v, blocks, block_q, block_k
    )
    assert_close(o, expected, "float32")
    assert_close(o_s, expected, "float32")
    assert_close(lse, expected_lse, "float32", "logarithm of the normaliser")


@pytest.mark.slow
def test_less_than_one_block_of_keys_with_both_branches():
    q, k, v = qkv(l=100)
    run = lambda impl: jax.jit(
        lambda *a: op.sparse_linear_attention(*a, topk=0.1, block_q=64, block_k=128, impl=impl)
    )(q, k, v, *projection())
    assert_close(run("interpret"), run("reference"), "float32")


def test_order_of_the_list_does_not_matter():
    q, k, v = qkv(l=312)
    blocks = jnp.broadcast_to(put([4, 0, 2], jnp.int32), (1, 2, 3, 3))
    o = kernel(q, k, v, blocks, (128, 64))[0]
    assert_close(o, kernel(q, k, v, jnp.sort(blocks), (128, 64))[0], "float32")


def test_large_scores_neither_overflow_nor_leak_past_the_end():
    q, k, v = qkv(l=312)
    blocks = jnp.broadcast_to(put([1, 4], jnp.int32), (1, 2, 3, 2))
    k = k.at[:, 248:256].mul(
        1000
    )  # keys of block 3, which no list holds, but which the tile of the tail block begins with
    assert_close(
        kernel(10 * q, k, v, blocks, (128, 64))[0], exact(10 * q, k, v, blocks, 128, 64), "float32"
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_dtypes_are_as_good_as_the_reference(dtype):
    q, k, v = qkv(l=380, h=1, k=64, dtype=dtype)
    blocks = MAP(q, k, 3, 128, 64)
    expected = exact(q, k, v, blocks, 128, 64)
    o = kernel(q, k, v, blocks, (128, 64))[0]
    assert o.dtype == dtype
    plain = jax.jit(reference.forward, static_argnums=(4, 5))(q, k, v, blocks, 128, 64)[0]
    assert relative(o, expected) <= min(5e-3, 1.1 * relative(plain, expected))


@pytest.mark.slow
@pytest.mark.parametrize("save", [False, True])
def test_linear_branch_beside_the_sparse_one(save):
    q, k, v = qkv(l=200)
    blocks = blocking.block_map(q, k, 2, 128, 64)
    proj_kernel, proj_bias = projection()
    phi = linear_branch.feature(k)
    m = jnp.einsum("blhi,blhj,jo->bhio", phi, v, proj_kernel, precision="highest")
    linear = q, m, phi.sum(1), proj_bias
    out = jax.jit(
        lambda: forward(q, k, v, blocks, 128, 64, linear=linear, save=save, interpret=True)
    )()
    near, lse = jax.jit(reference.forward, static_argnums=(4, 5))(q, k, v, blocks, 128, 64)
    both = near + linear_branch.linear_attention(q, k, v, proj_kernel, proj_bias)
    assert_close(out[0] if save else out, both, "float32")
    if save:
        assert_close(out[1], near, "float32", "sparse branch alone")
        assert_close(out[2], lse, "float32")


@pytest.mark.slow
def test_golden(golden):
    """The sparse branch of the published Triton kernel, and its sum with the linear branch."""
    g = golden("sla_op")
    q, k, v = (put(g[f"in/{name}"]) for name in "qkv")
    proj = put(g["w/proj_l.weight"].T), put(g["w/proj_l.bias"])
    run = lambda *a: op.sparse_linear_attention(*a, topk=0.2, impl="interpret")
    assert_close(jax.jit(run)(q, k, v, *proj), g["out/q128k64_t0.2/o"], "sla")


@pytest.mark.slow
def test_cuda_kernel_of_the_publishers(golden):
    """Theirs rounds the pooled scores to bfloat16, so near ties choose other blocks: query blocks
    are compared one by one."""
    g = golden("sla_cuda")
    q, k, v = (put(g[name], jnp.bfloat16) for name in "qkv")
    run = lambda *a: op.sparse_linear_attention(*a, topk=0.2, impl="interpret")
    o = jax.jit(run)(q, k, v, put(g["proj_w"].T), put(g["proj_b"]))
    error = np.abs(np.asarray(o, np.float32) - g["out_sla"])[0]  # [l h k]
    worst = np.array([error[i : i + 128].max((0, 2)) for i in range(0, 2000, 128)])  # [q_blocks h]
    assert (worst < 2e-2).mean() >= 0.8, worst
    assert np.median(worst) < 1e-2


@pytest.mark.slow
def test_derivatives_are_those_of_the_reference():
    """In one program; what the gradient needs is written only where it is asked for."""
    q, k, v = qkv(l=140, h=1)
    args = q, k, v, *projection()

    def derivatives(impl):
        run = lambda *a: op.sparse_linear_attention(*a, topk=0.7, block_q=64, impl=impl)
        tangent = jax.jvp(run, args, args)[1]
        return run(*args), tangent, *jax.grad(lambda *a: jnp.sin(run(*a)).sum(), range(5))(*args)

    ours, theirs = (
        jax.jit(derivatives, static_argnums=0)(impl) for impl in ("interpret", "reference")
    )
    for name, a, b in zip(
        ("primal", "tangent", "dq", "dk", "dv", "dkernel", "dbias"), ours, theirs, strict=True
    ):
        assert_close(a, b, "float32", name)
    run = lambda *a: op.sparse_linear_attention(*a, topk=0.7, block_q=64, impl="interpret")
    lse = "f32[1,1,3,64]"
    assert lse not in str(jax.make_jaxpr(run)(*args))
    assert lse in str(jax.make_jaxpr(lambda *a: jax.vjp(run, *a)[0])(*args))


@pytest.mark.parametrize("name", workloads.SHAPES)
def test_real_shapes_lower_for_cuda(name):
    (l, h), load = workloads.SHAPES[name], workloads.WORKLOADS[name]
    args = jax.eval_shape(load.make, jax.random.key(0))
    lists = jax.eval_shape(workloads.SPARSE[name].make, jax.random.key(0))[3]
    assert (
        lists.shape == (1, h, -(-l // 128), chosen_blocks(l, 0.1, 64))
        and load.bytes == 8 * args[0].size
    )
    assert load.flops > workloads.SPARSE[name].flops == 4 * 128 * 64 * 128 * lists.size
    run = jax.jit(lambda *a: op.sparse_linear_attention(*a, topk=0.1, impl="triton"))
    assert "attend_kernel" in described.lower(described.trace(run, *args)).as_text()


def test_errors():
    q, k, v = qkv(l=100, k=24)
    blocks = jnp.zeros((1, 2, 1, 1), jnp.int32)
    with pytest.raises(
        ValueError, match="head width is 24; allowed: powers of two from 16 on; nearest: 16 and 32"
    ):
        op.sparse_attention(q, k, v, blocks, impl="interpret")
    q, k, v = qkv(l=100)
    with pytest.raises(
        ValueError,
        match="float32 is for impl='interpret' and 'reference'; allowed: bfloat16, float16",
    ):
        op.sparse_attention(q, k, v, blocks, impl="triton")
