"""Dense softmax attention."""

from __future__ import annotations

import jax

from pallas_kernels.checks import check_attention
from pallas_kernels.dispatch import automatic, bound, choose, implementations
from pallas_kernels.flash_attention import cudnn, reference, triton

__all__ = ["IMPLEMENTATIONS", "attention"]

IMPLEMENTATIONS = {
    "attention": implementations(
        reference.attention,
        triton.attention,
        cudnn=cudnn.attention,
        **{"cudnn+triton": cudnn.with_triton_tangent},
    )
}


def attention(q, k, v, *, scale: float | None = None, impl: str = "auto"):
    """softmax(scale q k^T) v for each head, softmax in float32; scale defaults to 1 / sqrt(k).

    q [b l h k], k and v [b s h k], one floating dtype -> [b l h k] of that dtype. ValueError for
    other shapes, dtypes and names.
    impl: "auto" (cuDNN on CUDA for bfloat16 and float16 with a head width it takes, with the
    tangent of our kernel where it takes the arguments; else the reference), "reference", "cudnn"
    (with the tangent of the reference), "triton" (our kernels for all of forward, tangent and
    gradient), "cudnn+triton" (our kernel for the tangent, cuDNN for the rest), "interpret" (our
    kernels without a GPU, for tests).
    """
    check_attention(q, k, v)
    table = bound(IMPLEMENTATIONS["attention"], scale=scale)
    refusal = cudnn.refusal(q) if jax.default_backend() == "gpu" else "no cuDNN"
    derivative = "cudnn" if triton.refusal(q, scale) else "cudnn+triton"
    auto = automatic(table, refusal, kernel="cudnn", derivative=derivative)
    return choose("attention", impl, table, auto)(q, k, v)
