"""What a user should know before waiting: the prompt's length, an unusual size, steps that do not
suit the weights, kernels that are not used."""

from __future__ import annotations

import jax

from tdjax.config import DiTConfig, SamplerConfig
from tdjax.media.resolution import size_notes
from tdjax.pipeline.request import ModelInfo, Request
from tdjax.sampling import schedules
from tdjax.text.tokenizer import Tokenizer, language_warnings, prompt_warnings


def request_notes(
    request: Request, transformer: DiTConfig, info: ModelInfo, tokenizer: Tokenizer | None
) -> list[str]:
    """Returns lines about a request of a model: the prompt's length, an unusual size, weights that
    need many steps."""
    lines = [] if info.resolution is None else size_notes(request.size, request.resolution)
    lines += reference_notes(transformer)
    lines += sampler_notes(request.sampler, info)
    if request.prompt_embeds is None:
        for text in request.prompts:
            if info.language:
                lines += language_warnings(info.language, text)
            else:
                lines += prompt_warnings(tokenizer, text)
    return lines


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
