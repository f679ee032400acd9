"""Latents to frames and frames to latents, a chunk at a time: device memory does not depend on the
length of the clip.

One compiled body for the first latent frame and one for every later one, called from the host; what
the VAE remembers of the past is donated from call to call. The bits are those of `VAE.decode` and
`VAE.encode` (tested).
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator

import jax
import numpy as np

from tdjax.config import VideoSize
from tdjax.models.wan_vae import cache_shapes
from tdjax.pipeline import compilation
from tdjax.pipeline.components import Part
from tdjax.pipeline.vae_tiling import tiling

IN_FLIGHT = 2  # chunks that are computed while an earlier one travels to the host


class Coder:
    """The VAE of a pipeline as stages: programs by size, and the loops over them."""

    def __init__(self, compiled: compilation.Programs, part: Part, stages):
        self.compiled, self.part, self.stages = compiled, part, stages

    def pair(
        self, label: str, first: Callable, later: Callable, chunks: tuple, cache, **static
    ) -> tuple[Callable, Callable | None]:
        """Executables for the first chunk and for later ones; chunks: (shape of the first, of each
        later one or None)."""
        shape, vae = self.compiled.shape, self.part.abstract()
        get = lambda function, *args, donate=(): self.compiled.get(
            self.stages, label, function, vae, *args, donate=donate, **static
        )
        one = get(first, shape(chunks[0]))
        if chunks[1] is None:
            return one, None
        past = jax.tree.map(lambda x: shape(x.shape, x.dtype), cache)
        return one, get(later, past, shape(chunks[1]), donate=(1,))

    def decoder(self, grid: tuple[int, ...], output: str, tiled: bool = False):
        """grid: shape of the latents (1, t, h, w, z). In tiles, the programs of one tile, whose
        frames are floats."""
        _, t, h, w, z = grid
        if tiled and len(tiling(h, w).corners) > 1:
            (h, w), output = tiling(h, w).size, "float"
        cfg, one = self.part.config, (1, 1, h, w, z)
        cache = cache_shapes(cfg, h * cfg.spatial, w * cfg.spatial)
        return self.pair(
            "vae decode",
            compilation.decode_first,
            compilation.decode_later,
            (one, one if t > 1 else None),
            cache,
            output=output,
        )

    def encoder(self, size: VideoSize):
        cfg = self.part.config
        frames = lambda n: (1, n, size.height, size.width, 3)
        cache = cache_shapes(cfg, size.height, size.width, encode=True)
        chunks = frames(1), frames(cfg.temporal) if size.frames > 1 else None
        return self.pair(
            "vae encode", compilation.encode_first, compilation.encode_later, chunks, cache
        )

    def decode(
        self, vae, latents: np.ndarray, output: str, tiled: bool = False
    ) -> Iterator[tuple[np.ndarray, bool]]:
        """f32 [1 t h w z] on the host -> (frames [1 or 4, H W 3] on the host, whether they were
        finite), in order."""
        if tiled and len(tiling(*latents.shape[2:4]).corners) > 1:
            yield from self.decode_tiles(vae, latents, output)
            return
        first, later = self.decoder(latents.shape, output)
        chunks = (self.compiled.place(latents[:, i : i + 1]) for i in range(latents.shape[1]))
        for frames, finite in arriving(carried(first, later, vae, chunks)):
            yield frames[0], bool(finite)

    def decode_tiles(
        self, vae, latents: np.ndarray, output: str
    ) -> Iterator[tuple[np.ndarray, bool]]:
        """The same through overlapping tiles, one after another over the whole clip; the host adds
        them up, in float32."""
        cfg, tiles = self.part.config, tiling(*latents.shape[2:4])
        (h, w), scale, t = tiles.size, cfg.spatial, latents.shape[1]
        video = np.zeros(
            (1 + (t - 1) * cfg.temporal, latents.shape[2] * scale, latents.shape[3] * scale, 3),
            np.float32,
        )
        spans, finite = (
            [slice(0, 1)]
            + [slice(1 + i * cfg.temporal, 1 + (i + 1) * cfg.temporal) for i in range(t - 1)],
            [True] * t,
        )
        for (top, left), weight in zip(tiles.corners, tiles.weights(scale), strict=True):
            part = video[:, top * scale : (top + h) * scale, left * scale : (left + w) * scale]
            for i, (frames, ok) in enumerate(
                self.decode(vae, latents[:, :, top : top + h, left : left + w], "float")
            ):
                part[spans[i]] += weight * frames
                finite[i] &= ok
        for span, ok in zip(spans, finite, strict=True):
            yield (
                (
                    video[span]
                    if output == "float"
                    else np.round(np.nan_to_num(video[span]) * 255).astype(np.uint8)
                ),
                ok,
            )

    def encode(self, vae, image: np.ndarray, size: VideoSize) -> np.ndarray:
        """The image f32 [1 1 H W 3] followed by grey frames -> latents f32 [1 t h w z] on the
        host."""
        first, later = self.encoder(size)
        place, n = self.compiled.place, size.latent_grid[0] - 1
        grey = (
            place(np.zeros((1, self.part.config.temporal, *image.shape[2:]), np.float32))
            if n
            else None
        )
        chunks = itertools.chain([place(image)], itertools.repeat(grey, n))
        return np.concatenate(
            [latents for (latents,) in arriving(carried(first, later, vae, chunks))], axis=1
        )


def carried(
    first: Callable, later: Callable | None, vae, chunks: Iterable
) -> Iterator[tuple[jax.Array, ...]]:
    """What the bodies return for each chunk, without the cache that they hand on."""
    chunks = iter(chunks)
    *out, cache = first(vae, next(chunks))
    yield tuple(out)
    for chunk in chunks:
        *out, cache = later(vae, cache, chunk)
        yield tuple(out)


def arriving(chunks: Iterable[tuple[jax.Array, ...]]) -> Iterator[tuple[np.ndarray, ...]]:
    """The same on the host: a chunk is handed over while the next ones are computed, of which there
    are IN_FLIGHT at most."""
    waiting: deque = deque()
    for chunk in chunks:
        for array in chunk:
            array.copy_to_host_async()
        waiting.append(chunk)
        if len(waiting) > IN_FLIGHT:
            yield tuple(np.asarray(array) for array in waiting.popleft())
    while waiting:
        yield tuple(np.asarray(array) for array in waiting.popleft())
