"""Frames of latents that are finished already: the pipeline's last stage by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tdjax.config import TinyVAEConfig, VAEConfig, VideoSize, check_fps
from tdjax.config.values import shown
from tdjax.errors import UsageError
from tdjax.pipeline.options import OutputType, check_choice
from tdjax.pipeline.request import Request
from tdjax.pipeline.result import Result, joined

if TYPE_CHECKING:
    from tdjax.pipeline.pipeline import Pipeline


def decode(
    pipe: Pipeline, latents: np.ndarray | Result, output_type: OutputType, fps: int | None
) -> Result:
    """Returns a result of the same latents with frames. Raises UsageError, OutOfMemory,
    NotFinite."""
    given = latents if isinstance(latents, Result) else _bare(latents, fps)
    fps = given.fps if fps is None else fps
    check_fps(fps)
    if output_type == "latent":
        raise UsageError("output_type is 'latent'", "latents are what is decoded", "use 'uint8'")
    check_choice("output_type", output_type, ("uint8", "float"))
    if not np.isfinite(given.latents).all():
        raise UsageError(
            "latents hold NaN or infinity", "they have no frames", "make the latents again"
        )
    size = size_of(given.latents.shape, pipe.components["vae"].config)
    request = Request(
        prompts=(),
        size=size,
        sampler=pipe.sampler,
        num_samples=len(given),
        output_type=output_type,
        fps=fps,
    )
    request, listener, plan = pipe.agreed(request)
    stages, each = pipe.stages, np.split(given.latents, len(given))
    with pipe.lock, stages.listening(listener, len(given), 0):
        first = len(stages.rows)
        try:
            if not plan.keep_resident:  # what an earlier call, of a smaller size, left there
                pipe.free()
            frames = [pipe.vae_coding.run(request, plan, one, i) for i, one in enumerate(each)]
        finally:
            if not plan.keep_resident:
                pipe.free("vae")
        timings = stages.seconds(first)
    return Result(
        frames=joined(frames),
        latents=given.latents,
        seed=given.seed,
        fps=fps,
        timings=timings,
        metadata=given.metadata or pipe.metadata(request),
    )


def _bare(latents: np.ndarray, fps: int | None) -> Result:
    """An array as a result. Raises UsageError for what is none."""
    array = np.asarray(latents)
    if array.ndim != 5 or array.dtype.kind not in "fV" or not len(array):
        raise UsageError(
            f"latents are {shown(latents) if array.ndim == 0 else array.shape}",
            "they are an array [b t h w c], or a Result that has them",
            'for example pipe.decode(tdjax.Result.load("x.safetensors"))',
        )
    array = array.astype(np.float32)
    return Result(frames=None, latents=array, seed=None, fps=fps or 16, timings={}, metadata={})


def size_of(shape: tuple[int, ...], vae: VAEConfig | TinyVAEConfig) -> VideoSize:
    """Returns the size of the video of latents [b t h w c]. Raises UsageError for those of another
    model."""
    _, t, h, w, channels = shape
    if channels != vae.latent_channels:
        raise UsageError(
            f"latents have {channels} channels",
            f"the decoder of this model takes {vae.latent_channels}",
            "decode them with the model that made them",
        )
    frames = (t - 1) * vae.temporal + 1
    return VideoSize(frames=frames, height=h * vae.spatial, width=w * vae.spatial)
