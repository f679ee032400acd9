"""The two stages of the VAE, latents to frames and an image to latents, a chunk at a time: device
memory does not depend on the length of the clip.

One compiled body for the first latent frame and one for every later one, called from the host; what
the VAE remembers of the past is donated from call to call. The bits are those of `VAE.decode` and
`VAE.encode` (tested). On a mesh every device has some rows or columns of all frames, and later
latent frames come two at a time where their number is even.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tdjax.config import VAEConfig, VideoSize
from tdjax.errors import NotFinite
from tdjax.media.resolution import fit_image
from tdjax.models import tiny_vae
from tdjax.models.wan_vae import cache_shapes
from tdjax.parallel.space import latents_at_once, part, space_mesh
from tdjax.pipeline import compilation, memory
from tdjax.pipeline.compilation import Program, Programs
from tdjax.pipeline.components import Component
from tdjax.pipeline.conditioning import first_frame, image_condition, in_range
from tdjax.pipeline.memory import ExecutionPlan
from tdjax.pipeline.request import Request
from tdjax.pipeline.stage import Stage
from tdjax.pipeline.vae_tiling import tiling
from tdjax.progress import Stages

ENCODE, DECODE = "vae encode", "vae decode"
IN_FLIGHT = 2  # chunks that are computed while an earlier one travels to the host


class VAECoding(Stage):
    """The stage that makes frames of latents; and the loops over chunks, both ways."""

    def __init__(self, compiler: Programs, component: Component, stages: Stages):
        super().__init__(compiler, stages)
        self.component = component

    def programs(self, request: Request, plan: ExecutionPlan) -> list[Program]:
        if request.output_type == "latent":
            return []
        grid = (1, *request.size.latent_grid, self.component.config.latent_channels)
        return self.decoder(grid, request.output_type, plan.tiled_vae)

    def run(
        self, request: Request, plan: ExecutionPlan, latents: np.ndarray, index: int = 0
    ) -> np.ndarray:
        """Returns uint8 (or float32 in [0, 1]) [1 T H W 3] on the host, of latents f32[1 t h w c].

        Chunks go to `on_frames` as they come, with the number of the video. Raises NotFinite.
        """
        with memory.naming(DECODE, plan, DECODE):
            _, vae = self.ready(self.programs(request, plan), self.component, plan, DECODE)
            size, output = request.size, request.output_type
            dtype = np.uint8 if output == "uint8" else np.float32
            video = np.empty((1, size.frames, size.height, size.width, 3), dtype)
            start = 0
            with self.timed(DECODE, plan, DECODE):
                for frames, finite in self.decode(vae, latents, output, plan.tiled_vae):
                    if request.check == "finite" and not finite:
                        raise self._not_finite()
                    chunk = video[0, start : start + len(frames)]
                    chunk[...] = frames
                    start += len(frames)
                    self.stages.listener.check("between frames")
                    if request.on_frames is not None:
                        request.on_frames(index, chunk)
            return video

    def _not_finite(self) -> NotFinite:
        return NotFinite(
            "the VAE decoder gave NaN or infinity: no video was written",
            f"it ran in {self.component.config.policy.compute}, on finite latents",
            "try vae_dtype float32; check the file with python -m convert.validate --level values",
        )

    # -- programs by size --------------------------------------------------------------------------

    def decoder(self, grid: tuple[int, ...], output: str, tiled: bool = False) -> list[Program]:
        """Returns the programs for the first latent frame and, if there are more, for later ones.

        grid: shape of the latents (1, t, h, w, z). In tiles, they are the programs of one tile,
              whose frames are floats.
        """
        _, t, h, w, z = grid
        if tiled and len(tiling(h, w).corners) > 1:
            h, w = tiling(h, w).size
            output = "float"
        cfg, later = self.component.config, self._at_once(t, h, w)
        bodies = compilation.decode_first, compilation.decode_later
        shapes = cache_shapes if isinstance(cfg, VAEConfig) else tiny_vae.cache_shapes
        cache = shapes(cfg, h * cfg.spatial, w * cfg.spatial)
        # of (frames, whether they are finite, cache), which are divided over a mesh
        bodies, mesh = self._divided(bodies, h, w, (True, False, True))
        chunks = (1, 1, h, w, z), (1, later, h, w, z) if t > 1 else None
        return self._pair(DECODE, bodies, chunks, cache, mesh, output=output)

    def encoder(self, size: VideoSize) -> list[Program]:
        """Returns the programs for the first frame and, if there are more, for each four others or
        each eight."""
        cfg = self.component.config
        frames = lambda n: (1, n, size.height, size.width, 3)
        cache = cache_shapes(cfg, size.height, size.width, encode=True)
        bodies = compilation.encode_first, compilation.encode_later
        grid = size.height // cfg.spatial, size.width // cfg.spatial
        later = cfg.temporal * self._at_once(size.latent_frames, *grid)
        chunks = frames(1), frames(later) if size.frames > 1 else None
        bodies, mesh = self._divided(bodies, *grid, (True, True))
        return self._pair(ENCODE, bodies, chunks, cache, mesh)

    def _divided(
        self, bodies: tuple[Callable, Callable], h: int, w: int, outputs: tuple[bool, ...]
    ) -> tuple[tuple[Callable, Callable], Mesh | None]:
        """(the bodies with frames divided over the devices of a mesh, that mesh); as they are
        without one."""
        if self.compiler.mesh is None:
            return bodies, None
        mesh, (first, later) = space_mesh(self.compiler.mesh, h, w), bodies
        divided = compilation.OverSpace
        return (
            divided(first, mesh, (False, True), outputs),
            divided(later, mesh, (False, True, True), outputs),
        ), mesh

    def _at_once(self, t: int, h: int, w: int) -> int:
        """Latent frames in a chunk after the first, of t latent frames of h x w."""
        small = isinstance(self.component.config, tiny_vae.TinyVAEConfig)
        return 1 if small else latents_at_once(self.compiler.mesh, h, w, t - 1)

    def _pair(
        self,
        label: str,
        bodies: tuple[Callable, Callable],
        chunks: tuple,
        cache,
        mesh: Mesh | None,
        **static,
    ) -> list[Program]:
        """chunks: (shape of the first, of each later one or None). mesh: over which they are
        divided, or None."""
        whole = lies = None
        if mesh is not None:
            # All by this mesh: other meshes of the same devices then have the same programs.
            whole, lies = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, part(mesh))
        shapes = self.compiler.shapes_of
        vae = shapes(self.component.abstract(), whole)
        chunk = lambda shape: shapes(self.compiler.shape(shape), whole)
        request, (first, later) = self.compiler.request, bodies
        programs = [request(label, first, vae, chunk(chunks[0]), mesh=mesh, **static)]
        if chunks[1] is not None:
            inputs = vae, shapes(cache, lies), chunk(chunks[1])
            programs.append(request(label, later, *inputs, donate=(1,), mesh=mesh, **static))
        return programs

    # -- loops over chunks -------------------------------------------------------------------------

    def decode(
        self, vae, latents: np.ndarray, output: str, tiled: bool = False
    ) -> Iterator[tuple[np.ndarray, bool]]:
        """Yields (frames [1, 4 or 8, H W 3] on the host, whether they were finite), in order, of
        latents f32 [1 t h w z] on the host."""
        if tiled and len(tiling(*latents.shape[2:4]).corners) > 1:
            yield from self._decode_tiles(vae, latents, output)
            return
        bodies = self.compiler.wait(self.decoder(latents.shape, output))
        place, (t, h, w) = self.compiler.place, latents.shape[1:4]
        chunks = (place(latents[:, each]) for each in _chunks(t, self._at_once(t, h, w)))
        made = map(self.compiler.readable, _carried(bodies, vae, chunks))
        for frames, finite in arriving(made):
            yield frames[0], bool(finite)

    def _decode_tiles(
        self, vae, latents: np.ndarray, output: str
    ) -> Iterator[tuple[np.ndarray, bool]]:
        """The same through overlapping tiles, one after another over the whole clip; the host adds
        them up, in float32."""
        cfg, tiles = self.component.config, tiling(*latents.shape[2:4])
        (h, w), scale = tiles.size, cfg.spatial
        _, t, height, width, _ = latents.shape
        count = 1 + (t - 1) * cfg.temporal
        video = np.zeros((count, height * scale, width * scale, 3), np.float32)
        chunks = _chunks(count, cfg.temporal * self._at_once(t, h, w))
        finite = [True] * len(chunks)
        for (top, left), weight in zip(tiles.corners, tiles.weights(scale), strict=True):
            place = video[:, top * scale : (top + h) * scale, left * scale : (left + w) * scale]
            tile = latents[:, :, top : top + h, left : left + w]
            for i, (frames, ok) in enumerate(self.decode(vae, tile, "float")):
                place[chunks[i]] += weight * frames
                finite[i] &= ok
        for chunk, ok in zip(chunks, finite, strict=True):
            frames = video[chunk]
            if output != "float":
                frames = np.round(np.nan_to_num(frames) * 255).astype(np.uint8)
            yield frames, ok

    def encode(self, vae, image: np.ndarray, size: VideoSize) -> np.ndarray:
        """Returns latents f32 [1 t h w z] on the host, of the image f32 [1 1 H W 3] followed by
        grey frames."""
        place, (_, *later) = self.compiler.place, self._frames(size)
        chunks = iter([place(image)])
        if later:
            grey = np.zeros((1, later[0].stop - later[0].start, *image.shape[2:]), np.float32)
            chunks = itertools.chain(chunks, itertools.repeat(place(grey), len(later)))
        return self._encoded(vae, chunks, size)

    def encode_frames(self, vae, frames: np.ndarray, size: VideoSize) -> np.ndarray:
        """Returns latents f32 [1 t h w z] on the host, of a clip's frames uint8 [T H W 3]."""
        place = self.compiler.place
        chunks = (place(in_range(frames[each])[None]) for each in self._frames(size))
        return self._encoded(vae, chunks, size)

    def _frames(self, size: VideoSize) -> list[slice]:
        """The frames of each chunk that is encoded."""
        cfg, t = self.component.config, size.latent_frames
        grid = size.height // cfg.spatial, size.width // cfg.spatial
        return _chunks(size.frames, cfg.temporal * self._at_once(t, *grid))

    def _encoded(self, vae, chunks: Iterable[jax.Array], size: VideoSize) -> np.ndarray:
        bodies = self.compiler.wait(self.encoder(size))
        made = map(self.compiler.readable, _carried(bodies, vae, chunks))
        coded = [latents for (latents,) in arriving(made)]
        return np.concatenate(coded, axis=1)


class ImageEncoding(Stage):
    """The stage that makes the condition of image-to-video: latents of the image, by the VAE."""

    def __init__(self, coding: VAECoding):
        super().__init__(coding.compiler, coding.stages)
        self.coding = coding

    def programs(self, request: Request, plan: ExecutionPlan) -> list[Program]:
        return [] if request.image is None else self.coding.encoder(request.size)

    def run(self, request: Request, plan: ExecutionPlan) -> jax.Array | None:
        """Returns the condition f32[1 t h w 20] on the device: mask of the first latent frame, and
        latents of the image and grey frames. None for text-to-video."""
        if request.image is None:
            return None
        with memory.naming(ENCODE, plan, ENCODE):
            programs = self.programs(request, plan)
            _, vae = self.ready(programs, self.coding.component, plan, ENCODE)
            with self.timed(ENCODE, plan, ENCODE):
                fitted = fit_image(request.image, request.size, request.fit)
                image = first_frame(fitted, request.size)
                latents = self.coding.encode(vae, image, request.size)
                condition = image_condition(jnp.asarray(latents))
                return jax.block_until_ready(self.compiler.place(condition))


def _chunks(count: int, step: int) -> list[slice]:
    """The first of `count` frames, then `step` at a time."""
    return [slice(0, 1), *(slice(i, i + step) for i in range(1, count, step))]


def _carried(
    bodies: list[Callable], vae, chunks: Iterable[jax.Array]
) -> Iterator[tuple[jax.Array, ...]]:
    """What the bodies return for each chunk, without the cache that they hand on."""
    first, *later = bodies
    chunks = iter(chunks)
    *out, cache = first(vae, next(chunks))
    yield tuple(out)
    for chunk in chunks:
        *out, cache = later[0](vae, cache, chunk)
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
