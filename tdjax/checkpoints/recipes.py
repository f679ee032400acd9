"""Which weights walk which times: one table, by names, keys and LoRA files. The keys of networks
distilled in different ways are the same, and the wrong times give noise."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable

from tdjax.config import DiTConfig, SamplerConfig
from tdjax.presets import (
    EULER_SAMPLER,
    I2V_SAMPLER,
    PURE_NOISE,
    RCM_720P_SAMPLER,
    T2V_SAMPLER,
    TEACHER_SAMPLER,
)


def _ladder(times: tuple[float, ...], boundary: float = 0.9) -> SamplerConfig:
    """Fresh noise at flow times after the first, which is pure noise."""
    return SamplerConfig(
        num_steps=len(times) + 1,
        sigma_max=PURE_NOISE,
        mid_t=tuple(math.atan2(u, 1.0 - u) for u in times),
        boundary=boundary,
    )


def _shifted(steps: tuple[float, ...], shift: float) -> tuple[float, ...]:
    return tuple(shift * t / (1.0 + (shift - 1.0) * t) for t in steps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How weights of one kind are sampled.

    kind:    what they are called. names: pattern of names that mean it, in lower case.
    sampler: of text-to-video. i2v: of image-to-video, where it is another.
    note:    what a user should know beside it.
    """

    kind: str
    names: re.Pattern
    sampler: SamplerConfig
    i2v: SamplerConfig | None = None
    note: str = ""


def _names(pattern: str) -> re.Pattern:
    return re.compile(rf"(?<![a-z0-9])({pattern})")


# The first that fits. Sources: thu-ml/TurboDiffusion inference, NVlabs/rcm README, ModelTC/LightX2V
# configs/distill, hao-ai-lab/FastVideo fastvideo/configs/pipelines/wan.py.
RECIPES = (
    Recipe(
        kind="rCM at 14B 720p",
        names=_names(r"rcm[_.\-]?wan2[._]?1[_.\-]t2v[_.\-]14b[_.\-]720p"),
        sampler=RCM_720P_SAMPLER,
    ),
    Recipe(
        kind="TurboDiffusion or rCM",
        names=_names(r"turbowan|turbodiffusion|turbo[_.\-]?[ti]2v|rcm(?![a-z])"),
        sampler=T2V_SAMPLER,
        i2v=I2V_SAMPLER,
    ),
    Recipe(
        kind="causal weights of FastVideo",
        names=_names(r"sfwan|causalwan|causal[_-]wan"),
        sampler=_ladder(_shifted((0.85, 0.7, 0.55, 0.35, 0.275, 0.2, 0.125), 12.0), 0.875),
        note="they were trained to make a clip piece by piece, and run here on all frames at once",
    ),
    Recipe(
        kind="FastWan",
        names=_names(r"fastwan"),
        sampler=_ladder((0.757, 0.522)),
    ),
    Recipe(
        kind="LightX2V or Lightning",
        names=re.compile(r"lightx2v|lightwan|wan.*lightning|lightning.*(wan|steps?)"),
        sampler=EULER_SAMPLER,
    ),
    Recipe(
        kind="few-step weights",
        names=re.compile(
            r"(?<!\d)[1-8][_-]?steps?(?![a-z])|(?<!un)distill|causvid|accvid|(?<![a-z])dmd"
        ),
        sampler=EULER_SAMPLER,
        note="their own times are not known here",
    ),
)
UNDISTILLED = "undistilled"
# What marks a network by its keys alone.
BY_SLA = RECIPES[1]
BY_GATES = RECIPES[3]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recognised:
    """kind: of the weights, a key of the table or UNDISTILLED. reason: what told it."""

    kind: str
    sampler: SamplerConfig
    reason: str
    note: str = ""

    @property
    def distilled(self) -> bool:
        return self.kind != UNDISTILLED

    def line(self) -> str:
        """Returns the line for a user."""
        s = self.sampler
        steps = f"{s.sampler}, {s.num_steps} steps"
        if not self.distilled:
            steps += f", shift {s.shift:g}, guidance {s.guidance_scale:g}"
        return f"{self.kind} ({self.reason}): {steps}" + (f"; {self.note}" if self.note else "")


def of_names(names: Iterable[str], task: str) -> Recognised | None:
    """Returns the recipe that the first recognised name means: names of files and folders, those
    that say most first."""
    for name in names:
        for recipe in RECIPES:
            if recipe.names.search(name.lower()):
                return _as(recipe, f"by the name {name}", task)
    return None


def recognise(
    names: Iterable[str], cfg: DiTConfig, *, gates: bool = False, lora: Iterable[str] = ()
) -> Recognised:
    """Returns how weights are sampled.

    names: of their files and folders, those that say most first. cfg: their network.
    gates: the file has gates of FastVideo's sparse attention. lora: names of LoRA files on them.
    """
    found = of_names(lora, cfg.task) or of_names(names, cfg.task)
    if found is not None:
        return found
    if cfg.attention != "dense" or cfg.linear == "int8":
        return _as(BY_SLA, "by its keys", cfg.task)
    if gates:
        return _as(BY_GATES, "by its keys", cfg.task)
    return Recognised(
        kind=UNDISTILLED,
        sampler=TEACHER_SAMPLER,
        reason="nothing in names, keys or LoRA files says otherwise",
    )


def _as(recipe: Recipe, reason: str, task: str) -> Recognised:
    sampler = recipe.i2v if task == "i2v" and recipe.i2v else recipe.sampler
    return Recognised(kind=recipe.kind, sampler=sampler, reason=reason, note=recipe.note)
