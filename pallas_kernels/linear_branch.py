"""The linear branch of sparse-linear attention: phi(q) M / (phi(q) . z + eps) + bias over all keys,
with phi the softmax over the head width, M = (phi(k)^T v) proj and z = sum of phi(k) (arXiv
2509.24006).

First in plain JAX, which is the specification; then as kernels: the two sums over all keys in one
pass over k and v, and what the kernel of `online_softmax` adds to its output.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.primitives import EXACT, LOG2E, dot, exp2, fma_exp2, launch, load, store
from pallas_kernels.primitives import blocks as count
from pallas_kernels.tuning import SHARED, tile

__all__ = [
    "EPS",
    "feature",
    "linear_attention",
    "operand",
    "operands",
    "rows_of_branch",
    "summaries",
]

EPS = 1e-5
ROWS = 64  # keys in one product
PROGRAMS = 512  # about as many programs, each over a chunk of the keys of one head


def linear_attention(q, k, v, proj_kernel, proj_bias):
    """Returns phi(q) M / (phi(q) . z + eps) + bias over all keys [b l h k].

    q k v [b l h k]; proj_kernel [k k] (i o) and proj_bias [k], float32. M, z and the quotient are
    float32; the products' operands have the input dtype.
    """
    phi_q, phi_k = feature(q), feature(k)
    product = partial(jnp.einsum, preferred_element_type=jnp.float32, precision=EXACT)
    m = product("bhij,jo->bhio", product("blhi,blhj->bhij", phi_k, v), proj_kernel)
    z = phi_k.sum(1, dtype=jnp.float32)
    n = (phi_q.astype(jnp.float32) * z[:, None]).sum(-1, keepdims=True) + EPS
    # Heads before tokens, as the product gives them: on a CPU XLA has no product of bfloat16 with
    # float32 sums that is transposed as well.
    rows = rearrange(product("blhi,bhio->bhlo", phi_q, m.astype(q.dtype)), "b h l o -> b l h o")
    return (rows / n + proj_bias).astype(q.dtype)


def feature(x):  # float32 island
    """phi(x): softmax over the head width, in x.dtype."""
    return jax.nn.softmax(x.astype(jnp.float32), -1).astype(x.dtype)


def operands(q, k, v, proj_kernel, proj_bias, *, keys=None, interpret):
    """-> phi(k)^T v f32 [b h k k] and the sum of phi(k) f32 [b h k], and the operand `linear` of
    `online_softmax.attend` made of them. keys: how many of k and v count, by default all."""
    sums = summaries(k, v, keys=keys, interpret=interpret)
    return sums, operand(q, sums, proj_kernel, proj_bias)


def operand(q, sums, proj_kernel, proj_bias):
    """Returns the operand `linear` of `online_softmax.attend` made of both sums of `summaries`."""
    product, total = sums
    m = jnp.einsum("bhij,jo->bhio", product, proj_kernel, precision=EXACT)
    return q, m.astype(q.dtype), total, proj_bias


def rows_of_branch(q, m, z, bias, interpret):
    """Within a kernel, q [rows k], m [k k], z and bias f32 [k] -> the branch, f32 [rows k].

    phi(q) = e / sum(e) is not divided out: e m / (e . (z + eps)) + bias.
    """
    x = q.astype(jnp.float32)
    e = exp2((x - x.max(1)[:, None]) * LOG2E, interpret).astype(q.dtype)
    n = (e.astype(jnp.float32) * (z + EPS)[None]).sum(1)
    return dot(e, m, (1, 0)) * (1 / n)[:, None] + bias[None]


def summaries(k, v, *, keys=None, interpret):  # k v [b l h k] -> f32 [b h k k], f32 [b h k]
    """phi(k)^T v and the sum of phi(k), phi = softmax over the head width, rounded to k.dtype as in
    `feature`; of the first `keys` tokens, by default all.

    Each program sums a chunk of the keys in float32; XLA adds the chunks, so the result does not
    depend on their timing.
    """
    b, l, h, d = k.shape
    l = l if keys is None else keys
    steps = count(count(l, ROWS), max(1, PROGRAMS // (b * h)))
    chunks = count(l, steps * ROWS)
    tokens = pl.BlockSpec((None, steps * ROWS, None, d), lambda i, g: (g // h, i, g % h, 0))
    at = tile(SHARED, "summaries")
    products, sums = launch(
        partial(summaries_kernel, length=l, steps=steps, interpret=interpret),
        [
            jax.ShapeDtypeStruct((b, h, chunks, d, d), jnp.float32),
            jax.ShapeDtypeStruct((b, h, chunks, d), jnp.float32),
        ],
        (chunks, b * h),
        [tokens, tokens],
        [
            pl.BlockSpec((None, None, None, d, d), lambda i, g: (g // h, g % h, i, 0, 0)),
            pl.BlockSpec((None, None, None, d), lambda i, g: (g // h, g % h, i, 0)),
        ],
        warps=at.warps,
        stages=at.stages,
        interpret=interpret,
    )(k, v)
    return products.sum(2), sums.sum(2)


def summaries_kernel(k_ref, v_ref, product_ref, sum_ref, *, length, steps, interpret):
    """k v [steps*ROWS k] -> phi(k)^T v [k k] and the sum of phi(k) [k] over the rows before the
    end."""
    width = k_ref.shape[1]
    start = pl.program_id(0) * steps * ROWS

    def step(t, state):
        product, total = state
        rows = pl.ds(t * ROWS, ROWS)
        inside = (start + t * ROWS + jnp.arange(ROWS) < length)[:, None]
        phi = masked_feature(load(k_ref.at[rows], inside), inside, interpret)
        # 16 equal columns: the tensor cores add up rows
        total = total + dot(phi, jnp.ones((ROWS, 16), phi.dtype), (0, 0))
        return product + dot(phi, load(v_ref.at[rows], inside), (0, 0)), total

    zeros = jnp.zeros((width, width)), jnp.zeros((width, 16))
    product, total = lax.fori_loop(0, steps, step, zeros)
    store(product_ref, product)
    store(sum_ref, total.max(1))


def masked_feature(x, inside, interpret):  # [n k], [n 1] -> [n k]
    """softmax over the head width, rounded to x.dtype; zeros where `inside` is false."""
    y = x.astype(jnp.float32)
    p = fma_exp2(y, LOG2E, -LOG2E * y.max(1, keepdims=True), interpret)
    return (p * jnp.where(inside, 1 / p.sum(1, keepdims=True), 0.0)).astype(x.dtype)
