"""Tensors of a file that are read when asked for, by seek and read: nothing stays mapped."""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from tdjax.errors import CheckpointError

EXPANDED_BYTES = 2**26  # a view may be larger than its storage (torch's expand) up to this size

# Names as safetensors writes them; the torch reader uses the same table.
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def is_float(dtype) -> bool:
    """Whether values are floating point, bfloat16 and the 8-bit kinds included."""
    name = DTYPE_NAMES.get(np.dtype(dtype), "")
    return name.startswith(("F", "BF"))


def damaged_entry(path: Path, name: str) -> CheckpointError:
    """The error of an entry whose bytes are not those that were written."""
    return CheckpointError(
        f"{path} is damaged: the checksum of its entry {name!r} does not match",
        "bytes have changed since it was written",
        "download it again",
    )


@dataclasses.dataclass(eq=False)
class Entry:
    """An entry of an archive: `size` bytes from `start` with the CRC-32 that the archive has. Many
    tensors, or rows of a table, may lie in one: then it is verified when the first is read."""

    file: Path
    name: str
    start: int
    size: int
    crc: int
    verified: bool = False

    def verify(self, start: int, data) -> None:
        """Raises CheckpointError where the entry's bytes are not those that were written; `data`
        are those from `start`."""
        if self.verified:
            return
        whole = (start, len(data)) == (self.start, self.size)
        if (zlib.crc32(data) if whole else self._crc_of_file()) != self.crc:
            raise damaged_entry(self.file, self.name)
        self.verified = not whole  # a tensor alone in its entry is compared whenever it is read

    def _crc_of_file(self) -> int:
        crc, left, buffer = 0, self.size, memoryview(bytearray(min(self.size, 2**24)))
        with self.file.open("rb", buffering=0) as f:
            f.seek(self.start)
            while left:
                part = buffer[: min(left, len(buffer))]
                _fill(f, part, self.file)
                crc, left = zlib.crc32(part, crc), left - len(part)
        return crc


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A view of bytes in a file: element (i, j, ...) lies at start + itemsize * (i, j, ...) .
    strides."""

    file: Path
    start: int
    dtype: np.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None = None  # in elements; None: rows follow each other
    entry: Entry | None = None  # what it lies in, where that has a checksum

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    @property
    def contiguous(self) -> bool:
        return self.strides is None or self.strides == row_strides(self.shape) or self.size <= 1

    def read(self) -> np.ndarray:
        """The values as a fresh C-contiguous array."""
        if self.contiguous:
            return self.elements(self.size).reshape(self.shape)
        flat = self.elements(span(self.shape, self.strides))
        step = tuple(s * self.dtype.itemsize for s in self.strides)
        return np.ascontiguousarray(np.lib.stride_tricks.as_strided(flat, self.shape, step))

    def rows(self, start: int, stop: int) -> Tensor:
        """The part [start:stop] along the first axis, no further than the tensor goes."""
        start, stop, _ = slice(start, stop).indices(self.shape[0])
        row = (self.strides or row_strides(self.shape))[0] * self.dtype.itemsize
        return dataclasses.replace(
            self, start=self.start + start * row, shape=(max(stop - start, 0), *self.shape[1:])
        )

    def elements(self, count: int) -> np.ndarray:
        """`count` elements from `start`, flat."""
        data = np.empty(count * self.dtype.itemsize, np.uint8)
        with self.file.open("rb", buffering=0) as f:
            f.seek(self.start)
            _fill(f, memoryview(data), self.file)
        if self.entry is not None:
            self.entry.verify(self.start, data)
        return data.view(self.dtype)


@dataclasses.dataclass(frozen=True)
class Changed:
    """A tensor computed when it is read: `base` in float32, changed by each step in turn, in the
    base's dtype again, or in float32 where that has 8 bits, which would round most of a small
    change away."""

    base: Any
    steps: tuple[Callable[[np.ndarray], np.ndarray], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def dtype(self) -> np.dtype:
        return self.base.dtype if self.base.dtype.itemsize > 1 else np.dtype(np.float32)

    @property
    def nbytes(self) -> int:
        return self.base.nbytes

    def read(self) -> np.ndarray:
        x = self.base.read().astype(np.float32)
        for step in self.steps:
            x = step(x)
        return x.astype(self.dtype)


def changed(tensor, step) -> Changed:
    """Two changes of one tensor are made in float32 with a single rounding."""
    if isinstance(tensor, Changed):
        return Changed(tensor.base, (*tensor.steps, step))
    return Changed(tensor, (step,))


def _fill(f, view: memoryview, path: Path) -> None:
    """Read until `view` is full; a file that ends before is an error."""
    while view:
        n = f.readinto(view)
        if not n:
            raise CheckpointError(
                f"{path} ends in the middle of a tensor",
                "it is truncated, or changed while it was read",
                "download it again",
            )
        view = view[n:]


def row_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides in elements of a C-contiguous array."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def span(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Elements from the first to the last that a view touches."""
    return 0 if 0 in shape else 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
