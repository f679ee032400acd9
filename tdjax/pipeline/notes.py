"""What a user should know before waiting: the prompt's length, an unusual size, steps that do not
suit the weights, kernels that are not used."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from tdjax.config import DiTConfig, SamplerConfig, VideoSize
from tdjax.media.resolution import size_notes
from tdjax.media.scenes import detector
from tdjax.media.scenes.factors import FRAMES, NAMES, SIDE, UNSAID
from tdjax.parallel.sharding import COPIES, GUIDANCE
from tdjax.pipeline.memory import GIB, ExecutionPlan
from tdjax.pipeline.options import PipelineOptions
from tdjax.pipeline.request import ModelInfo, Request
from tdjax.sampling import schedules
from tdjax.text.language import asked, language_notes
from tdjax.text.tokenizer import Tokenizer, prompt_warnings

TRAINED_FRAMES = VideoSize.frames
_VALUES = {factor: len(values) for factor, values in NAMES.items()}


def request_notes(
    request: Request, transformer: DiTConfig, info: ModelInfo, tokenizer: Tokenizer | None
) -> list[str]:
    """Returns lines about a request of a model: the prompt's length, an unusual size, weights that
    need many steps."""
    lines = trained_notes(request, info)
    lines += reference_notes(transformer)
    lines += sampler_notes(request.sampler, info)
    lines += idle_notes(request, info)
    if request.prompt_embeds is None:
        for text in request.prompts:
            if info.language:
                lines += language_notes(info.language, text)
            else:
                lines += prompt_warnings(tokenizer, text)
    return lines


def video_notes(request: Request, info: ModelInfo, video: np.ndarray, number: int) -> list[str]:
    """Returns lines about video `number` (from 1) of a request, [1 T H W 3], that is not what its
    prompt asks for."""
    if request.prompt_embeds is not None:
        return []
    prompt = request.prompts[(number - 1) // request.num_samples]
    which = f"video {number} of {request.videos}: " if request.videos > 1 else ""
    return [which + line for line in clip_notes(info.language, prompt, video)]


def clip_notes(language: dict[str, Any] | None, prompt: str, video: np.ndarray) -> list[str]:
    """Returns a line about a clip [1 T H W 3] (uint8, or float in [0, 1]) that does not show what
    its prompt asks for, by the detector; none for other sizes, and for models of no such language.
    """
    if language is None or video.shape != (1, FRAMES, SIDE, SIDE, 3):
        return []
    knows = language["knows"]
    if {factor: len(values) for factor, values in knows.items()} != _VALUES:
        return []
    found = detector.measure(video if video.dtype == np.uint8 else 2 * video - 1)
    if not found.present[0]:
        return ["the clip shows no single shape: another seed may do better"]
    wrong = []
    for factor, place in asked(language, prompt).items():
        seen = int(getattr(found.seen, factor)[0])
        if seen != place:
            instead = "none that it knows" if seen == UNSAID else knows[factor][seen]
            wrong.append(f"the {factor} is {instead}, not {knows[factor][place]}")
    if not wrong:
        return []
    return [f"the clip does not show what was asked for: {', '.join(wrong)}; another seed may"]


def plan_notes(plan: ExecutionPlan, options: PipelineOptions) -> list[str]:
    """Returns lines about what a plan does by itself that costs time."""
    if not plan.stream_transformer or options.transformer_device == "stream":
        return []
    host = max(row.host for row in plan) / GIB
    return [
        f"the transformer does not fit on the device: its blocks wait in {host:.1f} GiB of the"
        " host's memory and are copied while others run"
    ]


def trained_notes(request: Request, info: ModelInfo) -> list[str]:
    """Returns lines about a size, a length or a frame rate that the model was not trained at."""
    size, own = request.size, info.size
    if info.resolution is not None:
        lines = size_notes(size, request.resolution)
        if size.frames != TRAINED_FRAMES:
            lines.append(
                f"{size.frames} frames: the published models were trained at {TRAINED_FRAMES}, and"
                " other lengths can look worse"
            )
    else:
        lines = []
        if size != own:
            lines.append(
                f"{size}: {info.name} was trained at {own} only, and other sizes and lengths can"
                " look wrong"
            )
    if request.fps != Request.fps:
        speed = request.fps / Request.fps
        lines.append(
            f"fps is {request.fps}: the models were trained at {Request.fps}, so everything moves"
            f" at {speed:.2g} times its speed"
        )
    return lines


def idle_notes(request: Request, info: ModelInfo) -> list[str]:
    """Returns lines about arguments that were given and change nothing."""
    cfg, lines = request.sampler, []
    if request.negative_prompt and not cfg.guided:
        lines.append(f"negative_prompt has no effect: {_unguided(cfg)}")
    if cfg.few_step and cfg.shift != SamplerConfig.shift:
        lines.append(f"`shift` has no effect: it is of unipc and euler, and this is {cfg.sampler}")
    if not cfg.few_step and cfg.mid_t not in (SamplerConfig.mid_t, info.sampler.mid_t):
        lines.append(f"mid_t has no effect: it is of sde and ode, and this is {cfg.sampler}")
    if not info.experts and cfg.boundary != SamplerConfig.boundary:
        lines.append("`boundary` has no effect: it is between two experts, and this model is one")
    if request.fit != Request.fit and request.image is None:
        lines.append("`fit` has no effect: there is no image")
    return lines


def mesh_notes(request: Request, mesh: Mesh | None) -> list[str]:
    """Returns lines about devices of a mesh that have nothing of their own to denoise."""
    sizes = {} if mesh is None else mesh.shape
    cfg, copies, lines = request.sampler, sizes.get(COPIES, 1), []
    if sizes.get(GUIDANCE, 1) > 1 and not cfg.guided:
        lines.append(
            f"cfg={sizes[GUIDANCE]} of `mesh` has no effect: {_unguided(cfg)}, and both halves of"
            " the devices denoise the same"
        )
    if copies > 1 and request.videos == 1:
        lines.append(
            f"dp={copies} of `mesh` has no effect: one video is made, and every copy denoises the"
            " same"
        )
    return lines


def _unguided(cfg: SamplerConfig) -> str:
    """Why there is no guidance."""
    return "distilled weights have guidance built in" if cfg.few_step else "guidance_scale is 1"


def sampler_notes(cfg: SamplerConfig, info: ModelInfo) -> list[str]:
    """Returns lines about steps that do not suit the weights."""
    lines = []
    if not info.distilled and cfg.few_step:
        lines.append(
            f"{info.name} looks like undistilled Wan weights (by its name): {cfg.num_steps} steps"
            " give poor video; use `sampler` unipc, num_steps 50 and guidance_scale 5, or a"
            " TurboWan file"
        )
    if info.experts and schedules.split_times(schedules.times(cfg), cfg.boundary) == cfg.num_steps:
        lines.append(
            f"all {cfg.num_steps} steps lie above the boundary {cfg.boundary:g}: the low-noise"
            " expert is not used"
        )
    return lines


def reference_notes(cfg: DiTConfig) -> list[str]:
    """Returns a line where a GPU user would expect the kernels of sparse attention and gets the
    reference."""
    if jax.default_backend() != "gpu" or cfg.attention == "dense" or cfg.impl == "triton":
        return []
    if cfg.impl != "reference" and cfg.policy.compute in ("bfloat16", "float16"):
        return []
    why = "as asked for" if cfg.impl == "reference" else "the kernels take bfloat16 and float16"
    return [
        f"{cfg.attention} attention runs as its XLA reference ({why}): several times slower than"
        " the kernels"
    ]
