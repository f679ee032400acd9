"""Queries and keys on their way from the projections to sparse attention: RMS norm, rotation, block
means.

Every `impl` is "auto", "reference", "triton" or "interpret"; "auto" is the kernels on CUDA, for
head widths that are powers of two, and the reference elsewhere. Differentiated, an op is its
reference.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.checks import not_a_power_of_two
from pallas_kernels.dispatch import automatic, bound, choose, implementations
from pallas_kernels.qk_prep import reference, triton

__all__ = ["IMPLEMENTATIONS", "rms_norm_rope", "rms_norm_rope_pool"]

IMPLEMENTATIONS = {
    "rms_norm_rope": implementations(reference.rms_norm_rope, triton.rms_norm_rope),
    "rms_norm_rope_pool": implementations(reference.rms_norm_rope_pool, triton.rms_norm_rope_pool),
}


def rms_norm_rope(x, weight, cos, sin, *, eps: float, groups: int = 1, impl: str = "auto"):
    """x / rms(x) * weight over all heads together, then channel pairs (2j, 2j+1) of each head
    rotated by their angles: x [b l d], weight [d], float32 cos and sin [l k/2] -> [b l h k], or in
    more than one group of neighbouring heads [groups b l h/groups k].

    The tables give the head width k. Float32 inside and one rounding to x.dtype at the end, where a
    norm followed by a rotation rounds twice (thu-ml/TurboDiffusion rcm/networks/wan2pt1.py).
    Differentiable in both modes. ValueError for shapes that do not fit each other.
    """
    _check(x, weight, cos, sin, groups)
    return _run("rms_norm_rope", impl, x, weight, cos, sin, eps=eps, groups=groups)


def rms_norm_rope_pool(
    x, weight, cos, sin, *, eps: float, block: int, groups: int = 1, impl: str = "auto"
):
    """`rms_norm_rope`, and the mean f32 [b h n k] of each block of `block` rounded tokens; the tail
    block is averaged over its own length.

    The means are what the block map of sparse attention is made of (arXiv 2509.24006).
    """
    _check(x, weight, cos, sin, groups)
    sizes = {"eps": eps, "block": block, "groups": groups}
    return _run("rms_norm_rope_pool", impl, x, weight, cos, sin, **sizes)


def _run(name: str, impl: str, x, weight, cos, sin, **sizes):
    """The implementation called `impl` on its arguments, with the derivatives of the reference."""
    table = bound(IMPLEMENTATIONS[name], **sizes)
    auto = automatic(table, not_a_power_of_two(2 * cos.shape[1]), derivative="reference")
    op = jax.custom_jvp(choose(name, impl, table, auto))
    op.defjvp(partial(jax.jvp, table["reference"]))
    return op(x, weight, cos, sin)


def _check(x, weight, cos, sin, groups):
    """Raise ValueError unless x [b l d], weight [d] and float32 tables [l k/2] fit together, d in
    whole heads of width k, and heads in whole groups."""
    fits = (
        x.ndim == 3
        and cos.ndim == 2
        and cos.shape == sin.shape
        and cos.shape[0] == x.shape[1]
        and weight.shape == x.shape[2:]
    )
    if not fits or x.shape[2] % (2 * cos.shape[1]) or not cos.dtype == sin.dtype == jnp.float32:
        raise ValueError(
            f"rms_norm_rope: x {x.shape}, weight {weight.shape}, cos {cos.dtype} {cos.shape}, sin"
            f" {sin.dtype} {sin.shape}; expected [b l d], [d] and float32 [l k/2] with d a multiple"
            " of the head width k"
        )
    heads = x.shape[2] // (2 * cos.shape[1])
    if groups < 1 or heads % groups:
        raise ValueError(f"rms_norm_rope: groups is {groups}; allowed: divisors of {heads} heads")
