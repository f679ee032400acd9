"""A frame as overlapping tiles, and their seams: geometry in numpy, nothing of models."""

from __future__ import annotations

import dataclasses

import numpy as np

TILE, OVERLAP = 40, 8  # latents: 320 pixels, of which neighbours share 64


def tiling(height: int, width: int) -> Tiling:
    """Returns the tiles of a decode of latents of these sides."""
    return Tiling(height, width, TILE, OVERLAP)


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Tiles of one size (height, width) over a frame, at least `overlap` apart from their
    neighbours' other edge.

    Where the frame is smaller than a tile there is one tile, of the frame's own size.
    """

    height: int
    width: int
    tile: int
    overlap: int

    def __post_init__(self):
        if not 0 < self.overlap < self.tile:
            raise ValueError(f"tiles of {self.tile} cannot overlap by {self.overlap}")

    @property
    def size(self) -> tuple[int, int]:
        return min(self.tile, self.height), min(self.tile, self.width)

    @property
    def corners(self) -> list[tuple[int, int]]:
        """(top, left) of each tile, row by row."""
        rows, columns = (starts(n, self.tile, self.overlap) for n in (self.height, self.width))
        return [(top, left) for top in rows for left in columns]

    def weights(self, scale: int) -> list[np.ndarray]:
        """For each tile f32 [h w 1] of `scale` times its size: how much it counts for each pixel.
        All tiles add up to one."""
        rows, columns = (
            _shares(n * scale, self.tile * scale, self.overlap * scale, scale)
            for n in (self.height, self.width)
        )
        return [(row[:, None] * column[None, :])[..., None] for row in rows for column in columns]


def starts(length: int, tile: int, overlap: int) -> list[int]:
    """The fewest tiles that overlap enough, spread evenly."""
    if length <= tile:
        return [0]
    count = -(-(length - overlap) // (tile - overlap))
    return [round(i * (length - tile) / (count - 1)) for i in range(count)]


def _shares(length: int, tile: int, overlap: int, step: int) -> list[np.ndarray]:
    """One-dimensional weights of each tile: 1 inside, a ramp over the overlap, none of it at the
    frame's own edges."""
    places = [start * step for start in starts(length // step, tile // step, overlap // step)]
    tile = min(tile, length)
    total, ramps = np.zeros(length), []
    for place in places:
        ramp, rising = np.ones(tile), (np.arange(overlap) + 0.5) / overlap
        if place > 0:
            ramp[:overlap] *= rising
        if place + tile < length:
            ramp[tile - overlap :] *= rising[::-1]
        ramps.append(ramp)
        total[place : place + tile] += ramp
    return [
        (ramp / total[place : place + tile]).astype(np.float32)
        for place, ramp in zip(places, ramps, strict=True)
    ]
