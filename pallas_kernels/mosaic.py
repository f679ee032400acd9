"""What the Mosaic GPU kernels share: which devices take them, and how tiles lie in shared memory.

Mosaic GPU addresses the chip without a compiler of tiles between: tensor instructions of a whole
warpgroup (wgmma), copies by the copy engine (TMA), barriers in shared memory. The kernels here are
for Hopper alone. This module does not import the backend, which takes a second; each `mosaic.py`
does, and is imported where its kernel is called.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from pallas_kernels import tuning
from pallas_kernels.primitives import blocks
from pallas_kernels.quantized import FP8

FAMILY = "sm90"
OLDEST = (0, 11)  # jax
MULTIPROCESSORS = 132  # of an H100 or H200; where no GPU is: lowering on a CPU
INTERPRETED = 2  # programs of the interpreter, which runs each as a thread of its own
FLOATS = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))
EIGHT_BITS = (jnp.dtype(jnp.int8), jnp.dtype(FP8))
BLOCK_Q, BLOCK_K, WIDTH = 128, 64, 128  # of attention: queries, keys, head width
COPIED = 8  # rows of a copy
# 1.5 * 2**23 and its bits: a small float added to it leaves the nearest integer in the bits, and an
# integer below 2**22 added to the bits is added to the float
ROUND = 12582912.0
ROUND_BITS = 0x4B400000
SLICE = 128  # columns of a product's operands that are copied at once: bytes of a row


def unavailable() -> str | None:
    """Returns why no Mosaic GPU kernel is compiled here; None if they are. Where no GPU is at hand
    or described they are: for Hopper."""
    if jax.__version_info__ < OLDEST:
        return f"the Mosaic GPU kernels need jax 0.11 or newer; this is jax {jax.__version__}"
    if tuning.family() != FAMILY:
        device = tuning.described_device() or jax.devices()[0]
        return (
            "the Mosaic GPU kernels need a Hopper GPU (compute capability 9.0);"
            f" this is {device.device_kind}"
        )
    return None


def at_hand() -> bool:
    """Returns whether the GPU at hand, or the one that the mesh in use describes, runs them."""
    return tuning.known_family() is not None and unavailable() is None


def filled(x, axis: int):
    """Returns x with zeros after its last row along an axis: the copy engine takes rows by eights.
    x itself where they come out even."""
    missing = -x.shape[axis] % COPIED
    pads = [(0, missing if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, pads) if missing else x


def chosen(table: Mapping[str, Callable], refusal: str | None, otherwise: str) -> str:
    """Returns the kernel of `table` that "auto" is on CUDA: "mosaic" if there is one, it takes the
    arguments (`refusal` is None) and runs on the GPU at hand, else `otherwise`."""
    return "mosaic" if "mosaic" in table and refusal is None and at_hand() else otherwise


def imported(op: str, name: str) -> Callable:
    """Returns the function `name` of `<op>/mosaic.py`, which is imported when it is called."""

    def run(*args, **options):
        module = importlib.import_module(f"pallas_kernels.{op}.mosaic")
        return getattr(module, name)(*args, **options)

    return run


def attention_refusal(width: int, block_q: int, block_k: int, dtype) -> str | None:
    """Returns why the attention kernel does not take heads of this width in these blocks, with
    values of `dtype`; None if it does. Where it runs is another question: `unavailable`."""
    sizes = {
        "head width": (width, WIDTH),
        "block_q": (block_q, BLOCK_Q),
        "block_k": (block_k, BLOCK_K),
    }
    for name, (size, allowed) in sizes.items():
        if size != allowed:
            return f"{name} is {size}; allowed: {allowed}"
    if jnp.dtype(dtype) not in FLOATS:
        return f"values are {jnp.dtype(dtype)}; allowed: {', '.join(map(str, FLOATS))}"
    return None


def product_refusal(x, weight, out_dtype) -> str | None:
    """Returns why the kernel of products does not take values x [m k] and weight [n k]; None if it
    does. Where it runs is another question: `unavailable`."""
    if x.dtype not in EIGHT_BITS or weight.dtype != x.dtype:
        return (
            f"values are {x.dtype} and {weight.dtype}; allowed: both"
            f" {' or both '.join(map(str, EIGHT_BITS))}"
        )
    if jnp.dtype(out_dtype) not in FLOATS:
        return f"the output is {jnp.dtype(out_dtype)}; allowed: {', '.join(map(str, FLOATS))}"
    for name, size, step in (("k", x.shape[1], SLICE), ("n", weight.shape[0], 8)):
        if size % step:
            nearest = step * blocks(size, step)
            return f"{name} is {size}; allowed: multiples of {step}; nearest: {nearest}"
    return None


def refuse(op: str, reason: str | None) -> None:
    """Raises ValueError if there is a reason why the kernel does not take what it is given."""
    if reason:
        raise ValueError(f'{op}: {reason}\nimpl="auto" and impl="reference" take it')


def programs(interpret: bool) -> int:
    """Returns how many programs a kernel is that stays on its multiprocessor until all is done."""
    if interpret:
        return INTERPRETED
    described = tuning.described_device()
    cores = described.num_cores if described else getattr(jax.devices()[0], "core_count", None)
    return cores or MULTIPROCESSORS


def swizzled(columns: int, dtype):
    """Returns the layout in shared memory of rows of so many columns, as tensor instructions and
    wide stores want it."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    size = jnp.dtype(dtype).itemsize
    swizzle = min(128, columns * size)
    return plgpu.TilingTransform((8, swizzle // size)), plgpu.SwizzleTransform(swizzle)
