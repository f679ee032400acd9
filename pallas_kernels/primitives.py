"""What all kernels share: the launch, and arithmetic that Triton does not find by itself.

Each arithmetic helper takes `interpret`: inline assembly has no interpreter, so there the same
function is plain jax.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

LOG2E = 1.4426950408889634
# float32 operands are multiplied as float32; narrower ones are not affected
EXACT = jax.lax.Precision.HIGHEST


def launch(
    kernel: Callable,
    out_shape,
    grid: tuple[int, ...],
    in_specs,
    out_specs,
    *,
    warps: int,
    stages: int,
    interpret: bool,
    **more,
):
    """pallas_call on the Triton backend, or on the interpreter; grid[0] runs fastest.

    The parameters are given explicitly: without them a GPU build of jax chooses another backend.
    """
    return pl.pallas_call(
        kernel,
        out_shape,
        grid=grid,
        in_specs=in_specs,
        out_specs=out_specs,
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=stages),
        interpret=interpret,
        **more,
    )


def blocks(length: int, size: int) -> int:
    """Blocks of `size` that cover `length`."""
    return -(-length // size)


def power_of_two(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def dot(a, b, dims, dtype=jnp.float32):
    """a and b multiplied over `dims` (one axis of each), summed in `dtype`; float32 operands are
    not cut to TF32."""
    precision = EXACT if a.dtype == jnp.float32 else None
    contracted = (((dims[0],), (dims[1],)), ((), ()))
    return jax.lax.dot_general(a, b, contracted, precision=precision, preferred_element_type=dtype)


def inline(
    instructions: str, constraints: str, args: list, dtype, interpret: bool, otherwise: Callable
):
    """One PTX expression for each element of arrays of one shape; `otherwise(*args)` under the
    interpreter."""
    if interpret:
        return otherwise(*args)
    shape = next(a.shape for a in args if a.ndim)
    args = [jnp.broadcast_to(a, shape) for a in args]
    out = jax.ShapeDtypeStruct(shape, dtype)
    return plgpu.elementwise_inline_asm(
        instructions, args=args, constraints=constraints, pack=1, result_shape_dtypes=[out]
    )[0]


def fma(x, a, b, interpret):  # float32
    """x a + b in one rounding: the backend does not contract a product and a sum."""
    return inline(
        "fma.rn.f32 $0, $1, $2, $3;",
        "=f,f,f,f",
        [x, a, b],
        jnp.float32,
        interpret,
        lambda x, a, b: x * a + b,
    )


def fma_exp2(x, a, b, interpret):  # float32
    """2^(x a + b) by two instructions; results below 2^-126 are zero."""
    code = "{ .reg .f32 t; fma.rn.f32 t, $1, $2, $3; ex2.approx.ftz.f32 $0, t; }"
    return inline(
        code, "=f,f,f,f", [x, a, b], jnp.float32, interpret, lambda x, a, b: jnp.exp2(x * a + b)
    )


def exp2(x, interpret):  # float32
    """2^x by one instruction; results below 2^-126 are zero."""
    return inline("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], jnp.float32, interpret, jnp.exp2)


def reciprocal(x, interpret):  # float32
    """1 / x by one instruction, a last bit off; that of infinity is zero."""
    return inline(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], jnp.float32, interpret, lambda x: 1 / x
    )


def load(ref, mask=None):
    """ref[...], with zeros where `mask` is false."""
    if mask is None:
        return plgpu.load(ref)
    return plgpu.load(ref, mask=mask, other=jnp.zeros((), ref.dtype))


def store(ref, value, mask=None):
    plgpu.store(ref, value, mask=mask)
