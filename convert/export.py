"""Rows run backwards: leaves to one safetensors file under the names that they came from, or other
published names."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import einops
import numpy as np

from convert.leaves import Leaves
from tdjax.checkpoints.published import detect
from tdjax.checkpoints.published.checkpoint import arrange
from tdjax.checkpoints.published.rules import Row, invert
from tdjax.checkpoints.published.tensor import DTYPE_NAMES
from tdjax.config import DiTConfig, to_dict
from tdjax.files import written


@dataclasses.dataclass(frozen=True)
class _Piece:
    """One tensor of the file: which leaf and layer it is, how it is laid out, where it goes."""

    key: str
    leaf: str
    layer: int | None
    row: Row
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def pieces(leaves: Leaves, naming: str) -> list[_Piece]:
    """Every tensor of the exported file, those of one leaf together."""
    table = detect.rows(leaves.kind, naming, leaves.config)
    out = []
    for leaf, row, keys in invert(leaves.lazy, table):
        lazy = leaves.lazy[leaf]
        shape = lazy.shape[1:] if row.stacked else lazy.shape
        if row.layout:
            shape = einops.rearrange(
                np.broadcast_to(np.int8(0), shape), row.inverse_layout, **_sizes(row, leaves)
            ).shape
        out += [_Piece(key, leaf, layer, row, tuple(shape), lazy.dtype) for layer, key in keys]
    return out


def _sizes(row: Row, leaves: Leaves) -> dict[str, int]:
    """Lengths of axes that a layout joins: those of the patch."""
    if "(" not in row.layout or not isinstance(leaves.config, DiTConfig):
        return {}
    return dict(zip("thw", leaves.config.patch, strict=True))


def export(
    leaves: Leaves,
    path,
    naming: str | None = None,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Write a .safetensors file, complete or not at all; one leaf is in memory at a time.
    progress(n): n bytes were written."""
    every = pieces(leaves, naming or leaves.naming)
    order = sorted(
        every, key=lambda p: -p.dtype.itemsize
    )  # so that every tensor is aligned to its items
    offsets, at = {}, 0
    for p in order:
        offsets[p.key] = at
        at += p.nbytes
    header = _header_bytes(leaves, order, offsets)
    size = len(header) + at
    with written(Path(path), overwrite, size=size) as part, part.open("wb") as f:
        f.write(header)
        f.truncate(len(header) + at)
        for leaf in leaves.lazy:
            x = leaves.lazy[leaf].read()
            for p in every:
                if p.leaf == leaf:
                    f.seek(len(header) + offsets[p.key])
                    f.write(_restore(x, p, leaves).view(np.uint8).data)
            if progress:
                progress(x.nbytes)
    return Path(path)


def _restore(x: np.ndarray, piece: _Piece, leaves: Leaves) -> np.ndarray:
    """A leaf's layer in the orientation of the file, flat."""
    layer = x if piece.layer is None else x[piece.layer]
    return arrange(
        layer, piece.row.inverse_layout, piece.dtype, **_sizes(piece.row, leaves)
    ).reshape(-1)


def _header_bytes(leaves: Leaves, order: list[_Piece], offsets: dict[str, int]) -> bytes:
    """Length and JSON header, padded with spaces to a multiple of eight. The config travels as text
    metadata."""
    config = json.dumps({"kind": leaves.kind, "config": to_dict(leaves.config)})
    header = {"__metadata__": {"format": "pt", detect.METADATA: config}}
    for p in order:
        span = [offsets[p.key], offsets[p.key] + p.nbytes]
        header[p.key] = {
            "dtype": DTYPE_NAMES[p.dtype],
            "shape": list(p.shape),
            "data_offsets": span,
        }
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw
