"""Dense attention by the Triton kernels of forward.py, tangent.py and backward.py: differentiable
in both modes."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax.numpy as jnp

from pallas_kernels import tuning
from pallas_kernels.derivatives import with_derivatives
from pallas_kernels.flash_attention import backward
from pallas_kernels.flash_attention.forward import forward
from pallas_kernels.flash_attention.tangent import tangent

WIDTHS = (32, 64, 128)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile(tuning.Tile):
    """A block of q queries and k keys, and how it is worked on."""

    q: int
    k: int


FLOAT32 = Tile(q=32, k=32, warps=4, stages=2)  # interpreter only


def tile(kernel: str, dtype, arch: str | None = None) -> Tile:
    """The tile of one of the four kernels: forward, tangent, query_gradient, key_gradient; arch as
    in tuning.tile."""
    if dtype == jnp.float32:
        return FLOAT32
    return Tile(**tuning.tiles("flash_attention")[kernel][arch or tuning.family()])


def refusal(q, scale, interpret: bool = False) -> str | None:
    """Why the kernels do not take these heads or this scale; None if they do. The interpreter takes
    float32 too."""
    if q.dtype != jnp.bfloat16 and not (interpret and q.dtype == jnp.float32):
        return f"the Triton kernels take bfloat16, not {q.dtype}"
    if q.shape[-1] not in WIDTHS:
        widths = ", ".join(map(str, WIDTHS))
        return f"the Triton kernels take head widths {widths}, not {q.shape[-1]}"
    if scale is not None and scale <= 0:
        return f"the Triton kernels take a positive scale, not {scale}"
    return None


def attention(q, k, v, *, scale=None, interpret=False):  # q [b l h k], k v [b s h k]
    """The same function as the reference; raises ValueError with the reason where the kernels do
    not take the arguments."""
    reason = refusal(q, scale, interpret)
    if reason:
        raise ValueError(f'attention: {reason}; use impl="reference"')
    run = bind(q, scale, interpret)

    def primal(*args):
        o, lse = run(forward, "forward")(*args)
        return o, (o, lse)

    def push(args, saved, tangents):
        return run(tangent, "tangent")(*args, *saved, *tangents)

    def pull(args, saved, g):
        o, lse = saved
        given = (*args, g, lse, backward.rowsum(g, o))
        dq = run(backward.query_gradient, "query_gradient")(*given)
        return dq, *run(backward.key_gradient, "key_gradient")(*given)

    return with_derivatives(primal, tangent=push, grad=pull)(q, k, v)


def bind(q, scale, interpret):
    """kernel, its name -> the kernel for heads like those of q, with its scale and its tile."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return lambda kernel, name: partial(
        kernel, scale=scale, tile=tile(name, q.dtype), interpret=interpret
    )
