"""The products of the three schemes in plain JAX: the specification."""

from __future__ import annotations

import jax.numpy as jnp
from einops import rearrange, repeat
from jax import lax

from pallas_kernels.int8_matmul.quantize import BLOCK
from pallas_kernels.primitives import EXACT
from pallas_kernels.quantized import QTensor

__all__ = [
    "added",
    "block_product",
    "block_sum",
    "fp8_product",
    "fp8_product_xla",
    "in_groups",
    "low_rank_product",
    "row_product",
]

SUM_BYTES = 2**28  # float32 sums held at a time


def block_product(x: QTensor, weight: QTensor, bias, out_dtype):  # values [m k], [n k] -> [m n]
    """`block_sum` rounded to out_dtype, then the bias added in that dtype."""
    y, info = block_sum(x, weight), jnp.finfo(out_dtype)
    # a cast alone may be fused away before the bias
    y = lax.reduce_precision(y, info.nexp, info.nmant).astype(out_dtype)
    return y if bias is None else y + bias.astype(out_dtype)


def block_sum(x: QTensor, weight: QTensor):  # values [m k], [n k] -> [m n] float32
    """Sum over the 128-wide blocks of k, in order, of float(int32 dot) * (scale_x *
    scale_weight)."""
    m, n = x.values.shape[0], weight.values.shape[0]
    rows = max(SUM_BYTES // (4 * n * BLOCK), 1) * BLOCK
    if rows >= m:
        return _rows_sum(x, weight)
    pieces = -(-m // rows)
    values = jnp.pad(x.values, ((0, pieces * rows - m), (0, 0)))
    scale = jnp.pad(x.scale, ((0, pieces * rows // BLOCK - x.scale.shape[0]), (0, 0)))
    split = QTensor(
        rearrange(values, "(p m) k -> p m k", p=pieces),
        rearrange(scale, "(p r) c -> p r c", p=pieces),
    )
    y = lax.map(lambda piece: _rows_sum(piece, weight), split)
    return rearrange(y, "p m n -> (p m) n")[:m]


def _rows_sum(x: QTensor, weight: QTensor):
    m, n = x.values.shape[0], weight.values.shape[0]

    def step(total, block):
        xv, xs, wv, ws = block  # [m 128], [r], [n 128], [o]
        dot = lax.dot_general(xv, wv, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
        xs, ws = repeat(xs, "r -> (r m) 1", m=BLOCK)[:m], repeat(ws, "o -> 1 (o n)", n=BLOCK)[:, :n]
        return total + dot.astype(jnp.float32) * (xs * ws), None

    blocks = (_columns(x.values), x.scale.T, _columns(weight.values), weight.scale.T)
    return lax.scan(step, jnp.zeros((m, n), jnp.float32), blocks)[0]


def _columns(values):
    return rearrange(values, "m (c k) -> c m k", k=BLOCK)


def row_product(
    x: QTensor, weight: QTensor, bias, low_rank=None, stream=None, gate=None, *, out_dtype
):
    """Values [m k], [n k] -> [m n]: float32(int32 dot) * scale_x * scale_weight, plus the product
    of low_rank (narrow [m r], up [n r]), plus bias; times gate [n] and added to stream [m n], if
    they are given; rounded once to out_dtype."""
    total = _dot(x, weight, jnp.int32).astype(jnp.float32)
    y = _epilogue(total, x, weight, bias, jnp.float32, low_rank)
    return (y if stream is None else added(y, stream, gate)).astype(out_dtype)


def added(y, stream, gate):  # [m n], [m n], [n] or None -> [m n]
    """stream + y gate in float32, rounded to the dtype of y."""
    total = y.astype(jnp.float32)
    total = total if gate is None else total * gate
    return (stream.astype(jnp.float32) + total).astype(y.dtype)


def in_groups(y, groups: int):  # [m n] -> itself, or [groups m n/groups]
    """Neighbouring columns together, group by group."""
    return y if groups == 1 else rearrange(y, "m (g n) -> g m n", g=groups)


def low_rank_product(narrow, up):  # [m r], [n r] -> float32 [m n]
    """narrow up^T."""
    return jnp.matmul(narrow, up.T, precision=EXACT, preferred_element_type=jnp.float32)


def fp8_product(x: QTensor, weight: QTensor, bias, out_dtype):  # values [m k], [n k] -> [m n]
    """The float32 dot of float8 values, rounded to bfloat16 if that is the output, then scales and
    bias and the last rounding.

    The dot leaves a GPU in the dtype of the output; scales by row and column keep its relative
    precision.
    """
    total = _dot(_float32(x), _float32(weight), jnp.float32)
    if out_dtype == jnp.bfloat16:
        total = lax.reduce_precision(total, 8, 7)
    return _epilogue(total, x, weight, bias, out_dtype)


def fp8_product_xla(x: QTensor, weight: QTensor, bias, out_dtype):  # values [m k], [n k] -> [m n]
    """`fp8_product` with a dot of float8 operands: a matrix instruction on GPUs of compute
    capability 8.9 and newer."""
    total = _dot(x, weight, jnp.bfloat16 if out_dtype == jnp.bfloat16 else jnp.float32)
    return _epilogue(total.astype(jnp.float32), x, weight, bias, out_dtype)


def _float32(q: QTensor) -> QTensor:
    return QTensor(q.values.astype(jnp.float32), q.scale)


def _dot(x: QTensor, weight: QTensor, dtype):
    precision = lax.Precision.HIGHEST if x.values.dtype == jnp.float32 else None
    dims = (((1,), (1,)), ((), ()))
    return lax.dot_general(
        x.values, weight.values, dims, precision=precision, preferred_element_type=dtype
    )


def _epilogue(total, x, weight, bias, out_dtype, low_rank=None):  # float32 [m n]
    y = total * x.scale[:, None] * weight.scale[None, :]
    if low_rank is not None:
        y = y + low_rank_product(*low_rank)
    if bias is not None:
        y = y + bias.astype(jnp.float32)[None, :]
    return y.astype(out_dtype)
