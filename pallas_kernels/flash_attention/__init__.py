"""Dense softmax attention."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import automatic, choose
from pallas_kernels.flash_attention import cudnn, reference, triton

IMPLS = {
    "reference": reference.attention,
    "cudnn": cudnn.attention,
    "triton": triton.attention,
    "cudnn+triton": cudnn.with_triton_tangent,
    "interpret": partial(triton.attention, interpret=True),
}


def attention(
    q, k, v, *, scale: float | None = None, impl: str = "auto"
):  # q [b l h k], k v [b s h k] -> [b l h k]
    """softmax(scale q k^T) v for each head, softmax in float32; scale defaults to 1 / sqrt(k).

    q [b l h k], k and v [b s h k], one floating dtype -> [b l h k] of that dtype. ValueError for
    other shapes, dtypes and names.
    impl: "auto" (cuDNN on CUDA for bfloat16 and float16 with a head width it takes, with the
          tangent of our kernel where it takes
    the arguments; else the reference), "reference", "cudnn" (with the tangent of the reference),
    "triton" (our kernels for all of forward, tangent and gradient), "cudnn+triton" (our kernel for
    the tangent, cuDNN for the rest), "interpret" (our kernels without a GPU, for tests).
    """
    check(q, k, v)
    ready = {name: partial(function, scale=scale) for name, function in IMPLS.items()}
    refusal = cudnn.refusal(q) if jax.default_backend() == "gpu" else "no cuDNN"
    derivative = ready["cudnn" if triton.refusal(q, scale) else "cudnn+triton"]
    return choose(
        "attention", impl, ready, automatic(ready["cudnn"], ready["reference"], refusal, derivative)
    )(q, k, v)


def check(q, k, v):
    """Raise ValueError unless the shapes are q [b l h k] and k, v [b s h k] of one floating
    dtype."""
    if (
        q.ndim != 4
        or k.shape != v.shape
        or k.ndim != 4
        or (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:])
    ):
        raise ValueError(
            f"attention: q {q.shape}, k {k.shape}, v {v.shape}; expected q [b l h k] and k, v [b s"
            " h k]"
        )
    if not (q.dtype == k.dtype == v.dtype and jnp.issubdtype(q.dtype, jnp.floating)):
        raise ValueError(
            f"attention: dtypes {q.dtype}, {k.dtype}, {v.dtype}; expected one floating dtype for"
            " all three"
        )
