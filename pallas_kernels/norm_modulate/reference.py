"""The row ops in plain JAX: the specification. float32 inside, one rounding at each output."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax

from pallas_kernels.quantized import QTensor, quantize_rows

__all__ = ["gelu", "norm"]


def norm(x, y, gate, factor, shift, *, eps, floats, dtype):
    """(x + y gate, h, h quantised), h = layer_norm(x + y gate) factor + shift: x y [b l d], the
    rest float32 [b or 1, d].

    The norm is that of the stream as it is stored, so it does not depend on whether the sum is
    fused with it.
    """
    if y is not None:
        x = stream(x, y, gate)
    h = x.astype(jnp.float32)
    h = h - h.mean(-1, keepdims=True)
    h = h * lax.rsqrt(jnp.square(h).mean(-1, keepdims=True) + eps)
    h = h * factor[:, None] + shift[:, None]
    q = flat(h, dtype) if dtype else None
    return x, h.astype(x.dtype) if floats else None, q


def stream(x, y, gate):
    total = y.astype(jnp.float32) if gate is None else y.astype(jnp.float32) * gate[:, None]
    total, info = x.astype(jnp.float32) + total, jnp.finfo(x.dtype)
    # a cast alone may be fused away before the norm
    return lax.reduce_precision(total, info.nexp, info.nmant).astype(x.dtype)


def gelu(x, *, dtype) -> QTensor:  # [b l d] -> values [(b l) d], scale [(b l)]
    """GELU in its tanh form, quantised by row."""
    return flat(jax.nn.gelu(x.astype(jnp.float32), approximate=True), dtype)


def flat(x, dtype) -> QTensor:
    return quantize_rows(rearrange(x, "b l d -> (b l) d"), dtype)
