"""What the row and quantising kernels share: sums and largest magnitudes, true quotients, and
rounding."""

from __future__ import annotations

from functools import reduce

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import tuning
from pallas_kernels.primitives import inline
from pallas_kernels.quantized import FLOOR, TOP

FLOOR_BITS = int(np.float32(FLOOR).view(np.int32))
PACK = """{
.reg .b32 a, b, c, d;
cvt.rni.s32.f32 a, $1;
cvt.rni.s32.f32 b, $2;
cvt.rni.s32.f32 c, $3;
cvt.rni.s32.f32 d, $4;
cvt.pack.sat.s8.s32.b32 c, d, c, 0;
cvt.pack.sat.s8.s32.b32 $0, b, a, c;
}"""


def total(xs):  # float32 arrays [...] -> []
    """The sum of all elements; arrays of one shape are added before the sum over their elements."""
    return reduce(jnp.add, [x.sum() for x in _by_shape(jnp.add, xs)])


def largest(xs):  # float32 arrays [...] -> []
    """max(|x|, FLOOR) of all elements. The maximum of the bits as integers: that of floats would
    pass over a NaN on a GPU."""
    bits = [lax.bitcast_convert_type(jnp.abs(x), jnp.int32) for x in xs]
    top = reduce(jnp.maximum, [x.max() for x in _by_shape(jnp.maximum, bits)])
    return lax.bitcast_convert_type(jnp.maximum(top, FLOOR_BITS), jnp.float32)


def _by_shape(combine, xs) -> list:
    """One array for each shape: its arrays combined."""
    return [
        reduce(combine, [x for x in xs if x.shape == shape])
        for shape in dict.fromkeys(x.shape for x in xs)
    ]


def divide(x, y, interpret):  # float32 arrays of one shape
    """x / y rounded as in float32 arithmetic; the backend's own quotient is approximate."""
    quotient = "div.rn.f32 $0, $1, $2;"
    return inline(quotient, "=f,f,f", [x, y], jnp.float32, interpret, lambda x, y: x / y)


def row_scale(amax, dtype, interpret):  # float32 [] -> factor [1], scale []
    """The factor that takes a row to the range of `dtype`, and the scale that takes it back: those
    of `quantize_rows`."""
    top = TOP[jnp.dtype(dtype)]
    return divide(jnp.full(1, top, jnp.float32), amax, interpret), amax * np.float32(1 / top)


def refusal(dtype) -> str | None:
    """Why the kernels do not round to `dtype` (int8, float8 or None) on the GPU at hand or
    described; None if they do."""
    if dtype is None or dtype == jnp.int8 or tuning.known_family() != "sm80":
        return None
    return f"{jnp.dtype(dtype).name} needs compute capability 8.9 (Ada) or newer"


def narrow(x, dtype, interpret):  # float32 -> dtype
    """x rounded to nearest even and saturated: int8 or float8_e4m3fn. ValueError where the GPU has
    no instruction for it."""
    why = None if interpret else refusal(dtype)
    if why:
        raise ValueError(f'{why}; impl="reference" runs here')
    if dtype != jnp.int8:
        top = TOP[jnp.dtype(dtype)]
        return jnp.clip(x, -top, top).astype(dtype)
    if interpret:
        return jnp.clip(jnp.round(x), -128, 127).astype(jnp.int8)
    out = [jax.ShapeDtypeStruct(x.shape, jnp.int8)]
    return plgpu.elementwise_inline_asm(
        PACK, args=[x], constraints="=r,f,f,f,f", pack=4, result_shape_dtypes=out
    )[0]


def rounded(x, dtype, interpret):  # float32
    """x on the grid of `dtype`, of 16 or 32 bits, still float32: under the interpreter and in plain
    JAX, a cast there and back may be fused away."""
    if interpret:
        info = jnp.finfo(dtype)
        return lax.reduce_precision(x, info.nexp, info.nmant)
    return x.astype(dtype).astype(jnp.float32)
