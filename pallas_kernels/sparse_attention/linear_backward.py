"""The gradient of the linear branch, whose projection is folded into one matrix for each head, and
of the whole op.

With phi = softmax over the head width, H = phi(k)^T v, M = H proj, z = sum of phi(k) + eps and n =
phi(q) . z (the eps of the denominator may join z, because phi(q) sums to one), the branch is y =
phi(q) M / n + bias. For the cotangent do of y:

    G = do M^T, t = phi(q) . G / n        dq = phi(q) (G - t z) / n
    dM = phi(q)^T (do / n)                dz = - sum of phi(q) t / n
    U = v dH^T + dz, dH = dM proj^T       dk = phi(k) (U - phi(k) . U), dv = phi(k) dH
    dproj = H^T dM, dbias = sum of do
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.linear_branch import EPS
from pallas_kernels.primitives import EXACT, LOG2E, dot, fma_exp2, launch, load, store
from pallas_kernels.primitives import blocks as count
from pallas_kernels.sparse_attention.backward import backward
from pallas_kernels.tuning import tile

__all__ = ["grad", "linear_backward"]

ROWS = 64  # tokens that a program takes at a time
PROGRAMS = 512  # about as many programs sum over the queries, each over a chunk of one head
COLUMNS = 16  # equal ones, in which tensor cores add up rows: the narrowest product they take


def grad(args, saved, do, block_q, block_k, *, interpret):
    """Cotangents of the args of sparse-linear attention, as `with_derivatives` asks for them; the
    block list has none.

    args: q k v [b l h k], proj_kernel [k k], proj_bias [k], blocks int32 [b h q_blocks chosen];
    saved: o of the sparse branch alone [b l h k], its lse f32 [b h q_blocks block_q], and
    `linear_branch.summaries` f32 [b h k k], [b h k]; do [b l h k].
    """
    q, k, v, proj_kernel, proj_bias, blocks = args
    o, lse, product, total = saved
    near = backward(q, k, v, blocks, o, lse, do, block_q, block_k, interpret=interpret)
    *dqkv, dkernel, dbias = linear_backward(
        q, k, v, product, total, proj_kernel, do, near, interpret=interpret
    )
    return *dqkv, dkernel.astype(proj_kernel.dtype), dbias.astype(proj_bias.dtype), None


def linear_backward(q, k, v, product, total, proj_kernel, do, near, *, interpret):
    """near + (dq, dk, dv) of the linear branch [b l h k], and dproj_kernel [k k], dproj_bias [k] in
    float32.

    near: the gradients of the sparse branch, to which these are added in float32; product, total:
    phi(k)^T v and the sum of phi(k) in float32, from `linear_branch.summaries`. Sums over the
    sequence are float32, by chunks that XLA adds up: no result depends on timing.
    """
    product_of = partial(jnp.einsum, precision=EXACT)
    m = product_of("bhij,jo->bhio", product, proj_kernel).astype(q.dtype)
    dq, t = query_side(q, m, total + EPS, do, near[0], interpret=interpret)
    dm, dz, dbias = query_sums(q, total + EPS, t, do, interpret=interpret)
    dproduct = product_of("bhio,jo->bhij", dm, proj_kernel).astype(q.dtype)
    dk, dv = key_side(k, v, dproduct, dz, *near[1:], interpret=interpret)
    return dq, dk, dv, product_of("bhij,bhio->jo", product, dm), dbias


def query_side(q, m, z, do, near, *, interpret):  # m [b h k k] in q.dtype, z f32 [b h k]
    """near + dq [b l h k], and t float32 [b h l]."""
    b, l, h, d = q.shape
    tokens = pl.BlockSpec((None, ROWS, None, d), lambda i, g: (g // h, i, g % h, 0))
    head = lambda *shape: pl.BlockSpec(
        (None, None, *shape), lambda i, g: (g // h, g % h, *(0 for _ in shape))
    )
    at = tile("sparse_attention", "linear_query")
    return launch(
        partial(query_kernel, length=l, interpret=interpret),
        (jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((b, h, l), jnp.float32)),
        (count(l, ROWS), b * h),
        [tokens, tokens, tokens, head(d, d), head(d)],
        (tokens, pl.BlockSpec((None, None, ROWS), lambda i, g: (g // h, g % h, i))),
        warps=at.warps,
        stages=at.stages,
        interpret=interpret,
    )(q, do, near, m, z)


def query_kernel(q_ref, do_ref, near_ref, m_ref, z_ref, dq_ref, t_ref, *, length, interpret):
    """q do near dq [ROWS k]; m [k k]; z [k]; t [ROWS]."""
    inside = pl.program_id(0) * ROWS + jnp.arange(ROWS) < length
    z = load(z_ref)[None]
    g = dot(load(do_ref, inside[:, None]), load(m_ref), (1, 1))
    phi = feature(load(q_ref, inside[:, None]), interpret)
    phi = phi * (1 / (phi * z).sum(1, keepdims=True))
    t = (phi * g).sum(1)
    dq = phi * (g - t[:, None] * z) + load(near_ref, inside[:, None]).astype(jnp.float32)
    store(t_ref, t, inside)
    store(dq_ref, dq.astype(dq_ref.dtype), inside[:, None])


def query_sums(q, z, t, do, *, interpret):  # z f32 [b h k], t f32 [b h l]
    """float32 dm [b h k k], dz [b h k], dbias [k]."""
    b, l, h, d = q.shape
    steps = count(count(l, ROWS), max(1, PROGRAMS // (b * h)))
    chunks = count(l, steps * ROWS)
    tokens = pl.BlockSpec((None, steps * ROWS, None, d), lambda i, g: (g // h, i, g % h, 0))
    number = pl.BlockSpec((None, None, steps * ROWS), lambda i, g: (g // h, g % h, i))
    part = lambda *shape: pl.BlockSpec(
        (None, None, None, *shape), lambda i, g: (g // h, g % h, i, *(0 for _ in shape))
    )
    partial_sum = lambda *shape: jax.ShapeDtypeStruct((b, h, chunks, *shape), jnp.float32)
    at = tile("sparse_attention", "linear_query_sums")
    dm, dz, dbias = launch(
        partial(query_sums_kernel, length=l, steps=steps, interpret=interpret),
        (partial_sum(d, d), partial_sum(d), partial_sum(d)),
        (chunks, b * h),
        [tokens, tokens, number, pl.BlockSpec((None, None, d), lambda i, g: (g // h, g % h, 0))],
        (part(d, d), part(d), part(d)),
        warps=at.warps,
        stages=at.stages,
        interpret=interpret,
    )(q, do, t, z)
    return dm.sum(2), dz.sum(2), dbias.sum((0, 1, 2))


def query_sums_kernel(
    q_ref, do_ref, t_ref, z_ref, dm_ref, dz_ref, dbias_ref, *, length, steps, interpret
):
    """q do [steps*ROWS k]; t [steps*ROWS]; dm [k k]; z dz dbias [k]. Rows past the end have do = t
    = 0 and add nothing."""
    start, width = pl.program_id(0) * steps * ROWS, q_ref.shape[1]
    z = load(z_ref)[None]

    def step(i, state):
        dm, dz, dbias = state
        rows = pl.ds(i * ROWS, ROWS)
        inside = start + i * ROWS + jnp.arange(ROWS) < length
        q, do = (load(ref.at[rows], inside[:, None]) for ref in (q_ref, do_ref))
        phi = feature(q, interpret)
        phi = (phi * (1 / (phi * z).sum(1, keepdims=True))).astype(do.dtype)
        t = load(t_ref.at[rows], inside).astype(do.dtype)
        t = jnp.broadcast_to(t[:, None], (ROWS, COLUMNS))
        ones = jnp.ones((ROWS, COLUMNS), do.dtype)
        return dm + dot(phi, do, (0, 0)), dz - dot(phi, t, (0, 0)), dbias + dot(do, ones, (0, 0))

    column = jnp.zeros((width, COLUMNS))
    dm, dz, dbias = lax.fori_loop(0, steps, step, (jnp.zeros((width, width)), column, column))
    store(dm_ref, dm)
    store(dz_ref, dz.max(1))
    store(dbias_ref, dbias.max(1))


def key_side(k, v, dproduct, dz, near_k, near_v, *, interpret):
    """near_k + dk, near_v + dv [b l h k] of dproduct [b h k k] in k.dtype, dz f32 [b h k]."""
    b, l, h, d = k.shape
    tokens = pl.BlockSpec((None, ROWS, None, d), lambda i, g: (g // h, i, g % h, 0))
    head = lambda *shape: pl.BlockSpec(
        (None, None, *shape), lambda i, g: (g // h, g % h, *(0 for _ in shape))
    )
    at = tile("sparse_attention", "linear_key")
    return launch(
        partial(key_kernel, length=l, interpret=interpret),
        (jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)),
        (count(l, ROWS), b * h),
        [tokens, tokens, head(d, d), head(d), tokens, tokens],
        (tokens, tokens),
        warps=at.warps,
        stages=at.stages,
        interpret=interpret,
    )(k, v, dproduct, dz, near_k, near_v)


def key_kernel(
    k_ref, v_ref, dproduct_ref, dz_ref, near_k_ref, near_v_ref, dk_ref, dv_ref, *, length, interpret
):
    """k v near_k near_v dk dv [ROWS k]; dproduct [k k]; dz [k]."""
    inside = (pl.program_id(0) * ROWS + jnp.arange(ROWS) < length)[:, None]
    dproduct = load(dproduct_ref)
    phi = feature(load(k_ref, inside), interpret)
    dv = dot(phi.astype(k_ref.dtype), dproduct, (1, 0))
    dv = dv + load(near_v_ref, inside).astype(jnp.float32)
    store(dv_ref, dv.astype(dv_ref.dtype), inside)
    u = dot(load(v_ref, inside), dproduct, (1, 1)) + load(dz_ref)[None]
    dk = phi * (u - (phi * u).sum(1, keepdims=True)) + load(near_k_ref, inside).astype(jnp.float32)
    store(dk_ref, dk.astype(dk_ref.dtype), inside)


def feature(x, interpret):  # [n k] -> f32 [n k]
    """softmax over the head width."""
    x = x.astype(jnp.float32)
    p = fma_exp2(x, LOG2E, -LOG2E * x.max(1, keepdims=True), interpret)
    return p * (1 / p.sum(1, keepdims=True))
