"""One call of the pipeline as checked values. Everything wrong with the arguments is found here,
before any long work."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tdjax.config import SamplerConfig, VideoSize
from tdjax.errors import UsageError
from tdjax.media.resolution import choose_size
from tdjax.sampling import flow

# Names of diffusers and TurboDiffusion that mean the same.
ALIASES = {
    "num_inference_steps": "num_steps",
    "image_path": "image",
    "num_videos_per_prompt": "num_samples",
    "generator": "key",
}
SAMPLER_FIELDS = {"num_steps": "steps", "sigma_max": "sigma_max", "mid_t": "mid", "sampler": "mode", "boundary": "boundary",
                  "shift": "shift", "guidance_scale": "guidance"}  # fmt: skip
OUTPUTS = ("uint8", "float", "latent")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """A validated call. `latents` is start noise [1 t h w c]; `prompt_embeds` replaces the text
    encoder."""

    prompts: tuple[str, ...]
    size: VideoSize
    sampler: SamplerConfig
    negative_prompt: str = ""
    image: Any = None  # uint8 [H W 3]
    fit: str = "crop"
    num_samples: int = 1
    seed: int | None = 0
    key: Any = None
    latents: np.ndarray | None = None
    prompt_embeds: np.ndarray | None = None
    output_type: str = "uint8"
    fps: int = 16
    resolution: str | None = None  # the name that the size came from, where there was one
    check: str = "finite"
    on_frames: Callable[[int, np.ndarray], None] | None = (
        None  # (number of the video, chunk of its frames [t H W 3])
    )

    def check_arrays(self, *, latents: tuple[int, ...], embeds: tuple[int, int]) -> None:
        """Raises UsageError unless given arrays have the shapes of this model at this size."""
        if self.latents is not None and tuple(self.latents.shape) != latents:
            raise UsageError(
                f"latents have shape {tuple(self.latents.shape)}",
                f"{self.size} needs {latents}, [1 t h w c]",
                "match the size",
            )
        if self.prompt_embeds is not None and (
            tuple(self.prompt_embeds.shape[1:]) != embeds or not len(self.prompt_embeds)
        ):
            raise UsageError(
                f"prompt_embeds have shape {tuple(self.prompt_embeds.shape)}",
                f"this model needs [b {embeds[0]} {embeds[1]}]",
                "make them with pipe.embed(prompts) or --save_prompt_embeds",
            )

    def digests(self) -> dict[str, str]:
        """sha256 of the arrays that the caller gave, so that a sidecar tells whether they were the
        same."""
        given = {name: getattr(self, name) for name in ("image", "latents", "prompt_embeds")}
        return {
            k: hashlib.sha256(np.ascontiguousarray(v).tobytes()).hexdigest()
            for k, v in given.items()
            if v is not None
        }


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        near = difflib.get_close_matches(str(value), allowed, 1, 0.0)[0]
        raise UsageError(
            f"{name} is {value!r}", f"allowed: {', '.join(allowed)}", f"nearest: {near}"
        )


def accepted() -> list[str]:
    own = [
        f.name
        for f in dataclasses.fields(Request)
        if f.name not in ("prompts", "size", "sampler", "resolution")
    ]
    return sorted(
        [
            *own,
            *SAMPLER_FIELDS,
            *ALIASES,
            "resolution",
            "aspect_ratio",
            "width",
            "height",
            "num_frames",
        ]
    )


def canonical(arguments: dict[str, Any]) -> dict[str, Any]:
    """Aliases resolved, None dropped; an unknown name raises with the nearest known one."""
    known = accepted()
    out = {}
    for name, value in arguments.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise UsageError(
                f"unknown argument {name!r}",
                f"allowed: {', '.join(known)}",
                f"did you mean {near[0]!r}?" if near else "see help(tdjax.Pipeline)",
            )
        if value is not None:
            out[ALIASES.get(name, name)] = value
    return out


def make_request(
    prompts: tuple[str, ...],
    arguments: dict[str, Any],
    *,
    task: str,
    size: VideoSize,
    resolution: str | None,
    sampler: SamplerConfig,
) -> Request:
    """Arguments over the model's own defaults (its size, resolution and sampler)."""
    given = canonical(arguments)
    image = given.pop("image", None)
    if image is not None:
        image = as_image(image)
    check_task(task, image)
    size_names = ("resolution", "aspect_ratio", "width", "height", "num_frames")
    size_given = {name: given.pop(name) for name in size_names if name in given}
    fit = given.pop("fit", "crop")
    if size_given or resolution is not None or fit == "adaptive":
        if resolution is None and not {"width", "height", "resolution", "aspect_ratio"} & set(
            size_given
        ):
            size_given |= {"width": size.width, "height": size.height}
        size_given = {"resolution": resolution, "num_frames": size.frames} | size_given
        size = choose_size(
            **size_given,
            image_size=None if image is None else (image.shape[1], image.shape[0]),
            fit=fit,
        )
    changes = {field: given.pop(name) for name, field in SAMPLER_FIELDS.items() if name in given}
    if "mid" in changes:
        changes["mid"] = tuple(float(t) for t in changes["mid"])
        changes.setdefault("steps", len(changes["mid"]) + 1)
    if changes.get("mode") and (changes["mode"] in ("sde", "ode")) != sampler.few_step:
        other = SamplerConfig if changes["mode"] in ("sde", "ode") else teacher_defaults
        sampler = other(mode=changes["mode"])
    request = Request(
        prompts=prompts,
        size=size,
        sampler=dataclasses.replace(sampler, **changes),
        image=image,
        fit=fit,
        resolution=size_given.get("resolution"),
        **given,
    )
    return checked(request)


def teacher_defaults(mode: str) -> SamplerConfig:
    from tdjax.config import TEACHER_SAMPLER

    return dataclasses.replace(TEACHER_SAMPLER, mode=mode)


def checked(request: Request) -> Request:
    if request.num_samples < 1:
        raise UsageError(
            f"num_samples is {request.num_samples}", "at least one video is made", "use 1"
        )
    if request.seed is not None and (
        not isinstance(request.seed, int | np.integer) or not 0 <= request.seed < 2**32
    ):
        raise UsageError(
            f"seed is {request.seed!r}",
            "a whole number from 0 to 4294967295",
            "use 0, or give a jax.random key as key",
        )
    for name in ("latents", "prompt_embeds"):
        value = getattr(request, name)
        if value is not None and not np.isfinite(np.asarray(value, np.float32)).all():
            raise UsageError(
                f"{name} hold NaN or infinity", "they are where sampling begins", "make them again"
            )
    check_choice("output_type", request.output_type, OUTPUTS)
    check_choice("check", request.check, ("finite", "none"))
    if not request.fps >= 1:
        raise UsageError(
            f"fps is {request.fps}",
            "it is the frame rate written into the file",
            "the models were trained at 16",
        )
    if request.on_frames is not None and (
        not callable(request.on_frames) or request.output_type == "latent"
    ):
        raise UsageError(
            "on_frames",
            "it is a function of (number of the video, frames), and latents have no frames",
            "see help",
        )
    if request.key is not None and not hasattr(request.key, "dtype"):
        raise UsageError(
            f"key is {request.key!r}",
            "a jax.random key is needed",
            "for example jax.random.key(3), or give a number as seed",
        )
    if request.key is not None and request.seed is not None:
        request = dataclasses.replace(request, seed=None)
    if not request.prompts and request.prompt_embeds is None:
        raise UsageError(
            "no prompt",
            "a prompt or prompt_embeds is needed",
            'give a sentence, for example pipe("a fox in the snow")',
        )
    return request


def check_task(task: str, image) -> None:
    if task == "t2v" and image is not None:
        raise UsageError(
            "an image was given to text-to-video weights",
            "their patch embedding takes 16 channels; image-to-video weights take 36 (16 noise, 4"
            " mask, 16 image latents)",
            "use turbowan2.2-i2v-a14b-720p, or leave the image away",
        )
    if task == "i2v" and image is None:
        raise UsageError(
            "image-to-video weights need an image",
            "their patch embedding takes 36 channels (16 noise, 4 mask, 16 image latents);"
            " text-to-video weights take 16",
            "give --image_path, or use a text-to-video model such as turbowan2.1-t2v-1.3b-480p",
        )


def as_image(image) -> np.ndarray:
    """Path, PIL image or array -> uint8 [H W 3]."""
    from tdjax.media.image import read_image

    if isinstance(image, str | Path):
        return read_image(image)
    array = np.asarray(image.convert("RGB") if hasattr(image, "convert") else image)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] != 3:
        raise UsageError(
            f"the image is an array of {array.dtype} {array.shape}",
            "allowed: a path, a PIL image, or uint8 [H W 3]",
            "convert it to 8-bit RGB",
        )
    return array


def sampler_notes(cfg: SamplerConfig, name: str, distilled: bool, experts: bool) -> list[str]:
    """Steps that do not suit the weights."""
    lines = []
    if not distilled and cfg.few_step:
        lines.append(
            f"{name} looks like undistilled Wan weights (by its name): {cfg.steps} steps give poor"
            " video; use --sampler unipc --num_steps 50 --guidance_scale 5, or a TurboWan file"
        )
    if experts and flow.split_times(flow.times(cfg), cfg.boundary) == cfg.steps:
        lines.append(
            f"all {cfg.steps} steps lie above the boundary {cfg.boundary:g}: the low-noise expert"
            " is not used"
        )
    return lines
