"""What each stage of the recipe does: sizes of batches, numbers of steps, rates. Plain numbers;
nothing here imports jax."""

from __future__ import annotations

import dataclasses
import math


@dataclasses.dataclass(frozen=True, kw_only=True)
class VAEStage:
    """The autoencoder, on clips rendered as they are needed."""

    steps: int = 6000
    batch: int = 8
    learning_rate: float = 1e-3
    warmup: int = 100
    kl: float = 3e-5  # weight of the mean divergence from a unit normal
    drawn: float = 10.0  # weight of a pixel of the object, beside one of the background
    width: float = 0.1  # of the quadratic part of the distance between pixels
    differences: float = (
        0.1  # weight of the errors of differences between neighbouring pixels and frames
    )
    jitter: float = 0.1  # noise on what the decoder sees, as a share of each channel's deviation
    jitter_from: float = 0.5  # share of the steps after which it begins
    compute: str = "bfloat16"  # between layers
    chunk: int = 50  # steps in one call of the device
    check_every: int = 1000
    check_clips: int = 64
    statistics: int = 2048  # clips that the latents' mean and deviation are measured on


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherStage:
    """The dense transformer and the text encoder, together, by flow matching."""

    clips: int = 32768
    steps: int = 8000
    batch: int = 128
    learning_rate: float = 1e-3
    text_rate: float = 5e-4
    warmup: int = 300
    final: float = 0.05  # factor of the rates at the end of the cosine
    dropout: float = 0.12  # share of captions replaced by the empty one
    shift: float = 3.0  # of the noise times
    ema: float = 0.999
    compute: str = "bfloat16"
    chunk: int = 100
    check_every: int = 1000
    check_clips: int = 256
    check_steps: int = 16
    guidance: float = 1.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class SLAStage:
    """Sparse-linear attention in place of dense, towards the teacher's velocity."""

    clips: int = 16384
    steps: int = 1200
    batch: int = 128
    learning_rate: float = 1e-4
    warmup: int = 50
    mean: float = 0.5 * math.log(9)  # of log sigma
    compute: str = "bfloat16"
    chunk: int = 50
    check_every: int = 400
    check_clips: int = 256
    check_steps: int = 16
    guidance: float = 1.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class RCMStage:
    """The few-step student, beside its critic."""

    name: str = "student"  # of the result; another one for ablations
    clips: int = 16384
    steps: int = 1000  # updates of the student; the critic has frequency - 1 for each
    batch: int = 64
    learning_rate: float = 3e-4
    critic_rate: float = 3e-4
    warmup: int = 50
    decay_from: float = 2 / 3  # share of the steps after which the rates fall to 0
    kappa: float = 0.3  # weight of the consistency term; 0 leaves distribution matching alone
    dmd_weight: float = 1.0  # 0 leaves consistency alone
    dmd_limit: float = 5.0
    guidance: float = 1.5  # of the teacher
    shift: float = 3.0  # of the times of the student's own samples
    mean: float = -0.8 + 0.5 * math.log(9)  # of log sigma, for the noise on data
    frequency: int = 5
    max_steps: int = 4
    compute: str = "bfloat16"
    tangent: str = "float32"  # what the derivative along the teacher is computed in
    # or semidiscrete, discrete, over `interval`: for a teacher with a noisy derivative in time
    derivative: str = "exact"
    interval: float = 1e-2
    chunk: int = 10
    check_every: int = 100
    check_prompts: int = 32
    check_seeds: int = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeStage:
    """Student plus what sparse attention changed, and a short repair towards the student."""

    clips: int = 16384
    heal: int = 200
    batch: int = 128
    learning_rate: float = 1e-4
    warmup: int = 20
    compute: str = "bfloat16"
    chunk: int = 50


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateStage:
    """The table: every row with the same prompts and noise."""

    clips: int = 1024  # of each seed
    seeds: int = 2
    batch: int = 256
    real: int = 8192  # clips that the Frechet distances are measured from
    prompts: int = 32  # of the diversity, with as many seeds each
    guidance: float = 1.5  # of the teacher
    shift: float = 3.0
    compute: str = "bfloat16"
    rows: str = "all"  # or names with commas between


STAGES = {
    "vae": VAEStage,
    "teacher": TeacherStage,
    "sla": SLAStage,
    "rcm": RCMStage,
    "merge": MergeStage,
    "evaluate": EvaluateStage,
}
_SCALED = ("steps", "heal", "warmup", "clips", "statistics", "check_clips", "check_every", "real")
_LEAST = {"warmup": 0, "heal": 0, "clips": 16, "statistics": 16, "check_clips": 4, "real": 80}


def scaled(stage, scale: float):
    """Returns a stage with less of everything that takes time, for a trial; steps are whole
    chunks."""
    if scale != 1:
        less = {
            name: max(_LEAST.get(name, 1), round(getattr(stage, name) * scale))
            for name in _SCALED
            if hasattr(stage, name)
        }
        stage = dataclasses.replace(stage, **less)
    if not hasattr(stage, "chunk"):
        return stage
    count = "heal" if hasattr(stage, "heal") else "steps"
    steps = getattr(stage, count)
    chunk = max(1, min(stage.chunk, steps))
    return dataclasses.replace(stage, chunk=chunk, **{count: math.ceil(steps / chunk) * chunk})
