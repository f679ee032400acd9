"""The arguments of a pipeline's call, spelled out once for readers, editors and type checkers.
Imports no jax."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ParamSpec, TypedDict, TypeVar, Unpack, cast

from tdjax.pipeline.options import Check, Fit, OutputType, Sampler

if TYPE_CHECKING:
    import threading
    from pathlib import Path

    import jax
    import numpy as np
    from PIL.Image import Image as PILImage

    from tdjax.pipeline.result import Result

    Image = str | Path | PILImage | np.ndarray


class CallAliases(TypedDict, total=False):
    """Names that diffusers and TurboDiffusion have for arguments of a call."""

    num_inference_steps: int | None
    image_path: Image | None
    num_videos_per_prompt: int
    generator: jax.Array | None
    callback_on_step_end: Callable[[int, int], Any] | None
    flow_shift: float | None


class Call:
    """What can be called: the arguments of a pipeline's call, spelled out once; `request` and
    `warmup` take them from here."""

    def __call__(
        self,
        prompt: str | list[str] | None = None,
        *,
        image: Image | None = None,
        fit: Fit = "crop",
        resolution: str | None = None,
        aspect_ratio: str | None = None,
        width: int | None = None,
        height: int | None = None,
        num_frames: int | None = None,
        num_steps: int | None = None,
        sampler: Sampler | None = None,
        sigma_max: float | None = None,
        mid_t: tuple[float, ...] | list[float] | None = None,
        boundary: float | None = None,
        shift: float | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | None = "",
        seed: int | Sequence[int] | None = 0,
        key: jax.Array | None = None,
        num_samples: int = 1,
        latents: np.ndarray | jax.Array | None = None,
        prompt_embeds: np.ndarray | jax.Array | None = None,
        output_type: OutputType = "uint8",
        fps: int = 16,
        check: Check = "finite",
        on_frames: Callable[[int, np.ndarray], None] | None = None,
        on_step: Callable[[int, int], Any] | None = None,
        on_stage: Callable[[str], Any] | None = None,
        on_preview: Callable[[int, np.ndarray], Any] | None = None,
        cancel: threading.Event | None = None,
        **aliases: Unpack[CallAliases],
    ) -> Result:
        """Makes videos. Arguments that are None are the model's own.

        prompt:      text, or a list of texts (one video each, in order).
        image:       path, PIL image or uint8 [H W 3], for image-to-video. fit: how it is brought to
                     the frame: "crop", "pad", "stretch", or "adaptive" (the size follows it).
        resolution:  "480p", "720p", with aspect_ratio such as "16:9"; or width and height, in
                     pixels. num_frames: 4k+1.
        num_steps:   of the sampler: "sde", "ode" (distilled weights), "unipc", "euler".
        sigma_max, mid_t: where sampling begins, and TrigFlow times between the first and the last.
        boundary:    time below which the second of two experts takes over.
        shift, guidance_scale, negative_prompt: of undistilled weights.
        seed:        0 to 2**32 - 1, or a list of one for each prompt; or key, a jax.random key.
                     num_samples: videos of each prompt.
        latents:     start noise [1 t h w c]. prompt_embeds: [b s d], in place of a prompt.
        output_type: "uint8", "float" (0 to 1) or "latent". fps: written into files.
        check:       "finite" (raises NotFinite) or "none".
        on_frames:   called with (number of the video, chunk [t H W 3]) as chunks are decoded, one
                     video after another.
        on_step:     called with (step that is done, steps) of each video. on_stage: called with the
                     name of each stage as it begins. Either ends the call by returning False.
        on_preview:  called after each step with (step, what the network predicts: frames uint8
                     [T H W 3]); also ends the call by returning False. Frames are whole where
                     vae_path is a small decoder, and for small models with latents of their own;
                     else they have a pixel for each latent.
        mesh dp=N:   N videos are denoised together, in the order of the result; the last ones may
                     be fewer. on_step is called once for a step of all of them, on_preview with the
                     first of them. NotFinite of one ends the call, `timings` are those of all.
        cancel:      a threading.Event: the call ends once it is set, between steps and chunks.
                     Where several processes make a video together, what one of them asks for ends
                     the call in all, after the next step; a function may be given in one alone.
        aliases:     names that diffusers and TurboDiffusion have for the same things.

        Same seed, shapes, version, mesh and device kind: same bits. Sample i of a prompt uses
        fold_in(key, i), on every mesh. Threads may share a pipeline: their calls run one after
        another, and each result has its own timings and warnings. Of a mesh over several processes,
        all make the same calls in the same order, and have the same results. Raises UsageError,
        OutOfMemory, NotFinite, CheckpointError, KernelError, and Cancelled where the caller ended
        it.
        """
        given = {**locals(), **aliases}
        for name in ("self", "prompt", "aliases"):
            del given[name]
        return self._made(prompt, given)

    def _made(self, prompt: str | list[str] | None, arguments: dict[str, Any]) -> Result:
        """The result of a call whose arguments are not checked yet, by whatever name."""
        raise NotImplementedError


P = ParamSpec("P")
R = TypeVar("R")


def arguments_of(source: Callable[P, Any]) -> Callable[[Callable[..., R]], Callable[P, R]]:
    """Gives a method the argument list of another one, and its documentation where the method has
    none: for readers, editors and type checkers."""

    def with_signature(method: Callable[..., R]) -> Callable[P, R]:
        method.__doc__ = method.__doc__ or source.__doc__
        returns = inspect.signature(method).return_annotation
        signature = inspect.signature(source).replace(return_annotation=returns)
        cast(Any, method).__signature__ = signature
        return method

    return with_signature
