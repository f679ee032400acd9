"""A leaf on an accelerator, filled piece by piece: the host holds a few pieces, never the stacked
leaf."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import einops
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tdjax.checkpoints.published.rules import Row
from tdjax.checkpoints.published.tensor import Tensor, is_float

# Dtypes that are cast on the device; others are cast before.
TRAVELS = ("float32", "bfloat16", "float16", "int8")
# A single tensor without a layout is cut into pieces of this size; layers are pieces by themselves.
PIECE_BYTES = 2**27
READERS = 4  # threads that read the next pieces from the file, and compare their checksums
IN_FLIGHT = 3  # pieces on their way while the next one is read


def upload(tensors: list, row: Row, target: jax.ShapeDtypeStruct, device: jax.Device) -> jax.Array:
    """The tensors of one leaf -> the array that the module holds, transposed and cast on the
    device.

    Host memory: IN_FLIGHT + READERS + 1 pieces and the runtime's copies of them. Device memory: the
    leaf and as many pieces.
    """
    out = jnp.zeros(target.shape, target.dtype, device=device)
    waiting: deque[jax.Array] = deque()
    places, parts = zip(*_pieces(tensors, row), strict=True)
    for start, values in zip(places, ahead(part.read for part in parts), strict=True):
        piece = jax.device_put(_travelling(values, target.dtype), device)
        out = _insert(out, piece, np.int32(start), layout=row.layout, stacked=row.stacked)
        waiting.append(piece)
        if len(waiting) > IN_FLIGHT:
            waiting.popleft().block_until_ready()
    return out


def settle(values: np.ndarray, layout: str, dtype: np.dtype, device: jax.Device) -> jax.Array:
    """One tensor in file orientation -> transposed and cast on the device."""
    return _turned(
        jax.device_put(_travelling(values, dtype), device), layout=layout, dtype=np.dtype(dtype)
    )


@functools.partial(jax.jit, static_argnames=("layout", "dtype"))
def _turned(piece, *, layout: str, dtype: np.dtype):
    return (einops.rearrange(piece, layout) if layout else piece).astype(dtype)


def ahead(reads: Iterable[Callable[[], Any]], readers: int = READERS) -> Iterator[Any]:
    """What the functions return, in their order, while threads run the next ones: `readers` results
    wait at most."""
    pool, waiting = ThreadPoolExecutor(readers), deque()
    try:
        for read in reads:
            waiting.append(pool.submit(read))
            if len(waiting) > readers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@functools.partial(jax.jit, static_argnames=("layout", "stacked"), donate_argnums=0)
def _insert(out, piece, start, *, layout: str | None, stacked: bool):
    piece = (einops.rearrange(piece, layout) if layout else piece).astype(out.dtype)
    return lax.dynamic_update_slice_in_dim(out, piece[None] if stacked else piece, start, 0)


def _pieces(tensors: list, row: Row) -> Iterator[tuple[int, Any]]:
    """(place along the leaf's first axis, something whose read() gives the values in file
    orientation)."""
    whole = tensors[0]
    if row.stacked:
        yield from enumerate(tensors)
    elif (
        row.layout
        or not isinstance(whole, Tensor)
        or not whole.contiguous
        or whole.nbytes <= PIECE_BYTES
    ):
        yield 0, whole
    else:
        step = max(1, PIECE_BYTES * whole.shape[0] // whole.nbytes)
        for start in range(0, whole.shape[0], step):
            yield start, whole.rows(start, min(start + step, whole.shape[0]))


def _travelling(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Values in a dtype that the device takes."""
    if x.dtype.name in TRAVELS:
        return x
    return x.astype(np.float32 if is_float(x.dtype) else dtype)
