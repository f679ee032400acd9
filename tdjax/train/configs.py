"""What a training run can be told: frozen dataclasses, one for each first word of a key, and what
they hold. Imports no jax, so that the command answers at once.

What `PRESET --help` says of a field is its metadata.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from typing import Any

from tdjax.config import LINEAR, REMAT, DiTConfig, SLAConfig, positive
from tdjax.precision import FLOATS

DECAY = ("constant", "linear", "cosine")
EXPERTS = ("high", "low")
STUDENT = ("dense", "sla")
TANGENTS = ("exact", "semidiscrete", "discrete")
TARGETS = ("teacher", "data")
WARMUP_FORMS = ("paper", "code2026")


def _field(default: Any, note: str) -> Any:
    """A field of a config with what `PRESET --help` says of it."""
    return dataclasses.field(default=default, metadata={"help": note})


def _check_times(config) -> None:
    low, high = config.time_from, config.time_to
    if not 0 <= low < high <= 1:
        raise ValueError(
            f"{type(config).__name__}: time_from {low} and time_to {high} must rise, from 0 (data)"
            " to 1 (noise)"
        )


def _check_accumulate(config) -> None:
    if config.accumulate < 1:
        raise ValueError(
            f"{type(config).__name__}.accumulate is {config.accumulate}; it must be at least 1"
        )


# -- the machinery ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Length of a run, what it leaves behind, and where it runs."""

    folder: str = _field("", "checkpoints, metrics and the trained weights go here")
    steps: int = _field(2000, "one step is one update of one network")
    seed: int = _field(0, "of noise, times and random weights")
    log_every: int = _field(
        10, "steps between reports; nothing is fetched from the device in between"
    )
    save_every: int = _field(250, "steps between checkpoints")
    keep: int = _field(3, "checkpoints that stay; 0 for all")
    keep_gib: float | None = _field(
        None, "most GiB of checkpoints, with the one that is being written; none: no bound"
    )
    patience: int = _field(10, "losses in a row that may fail to be finite before the run stops")
    wandb: str = _field("", "project of Weights & Biases that gets the numbers too")
    mesh: str = _field(
        "auto",
        "several devices: fsdp=4, fsdp=2,sp=4, dp=2,fsdp=8; auto is fsdp over those of all hosts",
    )

    def __post_init__(self):
        positive(self, "steps", "log_every", "save_every", "patience", most=10**9)
        if self.keep < 0 or self.seed < 0:
            raise ValueError(
                f"RunConfig: keep is {self.keep}, seed {self.seed}; they must be at least 0"
            )
        if self.keep_gib is not None and not 0 < self.keep_gib < math.inf:
            raise ValueError(f"RunConfig.keep_gib is {self.keep_gib}; it must be positive, or none")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Shards of latents and prompt embeddings, and how they become batches."""

    path: str = _field("", "folder of shard_000000.tar, ..., or an address: s3://, gs://, hf://")
    negative: str = _field(
        "", "embedding of the negative prompt: umT5_wan_negative_emb.pt, .npy or .safetensors"
    )
    frames: int = _field(21, "latent frames; longer samples are cut")
    size: str = _field("", "WIDTHxHEIGHT in pixels, where shards hold prompts alone")
    batch: int = _field(8, "samples of all devices together")
    per_device: int | None = _field(
        None,
        "samples at a time on each device of dp and fsdp: loss.accumulate follows, where it is 1;"
        " none for all",
    )
    seed: int = _field(0, "of the order")
    mix: int = _field(4, "shards whose samples are shuffled together")
    max_skipped: int = _field(
        16, "damaged samples before the run stops; another one stands in the place of each"
    )

    def __post_init__(self):
        positive(self, "frames", "batch", "mix")
        if self.size and self.grid is None:
            raise ValueError(
                f"DataConfig.size is {self.size[:80]!r}; allowed: WIDTHxHEIGHT, multiples of 16"
            )
        if self.per_device is not None:
            positive(self, "per_device")
        for name in ("seed", "max_skipped"):
            if getattr(self, name) < 0:
                raise ValueError(f"DataConfig.{name} is {getattr(self, name)}; allowed: 0 and more")

    @property
    def grid(self) -> tuple[int, int] | None:
        """(h, w) of the latents of `size`; None where there is none."""
        match = re.fullmatch(r"([0-9]{1,4})x([0-9]{1,4})", self.size)
        sides = tuple(map(int, match.groups())) if match else (0, 0)
        if not all(sides) or any(side % 16 for side in sides):
            return None
        return sides[1] // 8, sides[0] // 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRA:
    """Low-rank adapters (arXiv 2106.09685) on linear layers of the blocks, over frozen weights."""

    rank: int = _field(32, "width of an adapter")
    alpha: float | None = _field(None, "the change counts alpha / rank; none: once")
    layers: str = _field(
        ".*", "pattern of whole names of linear layers, such as blocks.self_attn.(q|k|v|o)"
    )

    def __post_init__(self):
        positive(self, "rank", most=4096)
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise ValueError(f"LoRA.alpha is {self.alpha}; it must be positive and finite, or None")

    @property
    def scale(self) -> float:
        """The factor of an adapter's product."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which weights the networks begin with. `dit` gives the sizes where there are no weights; else
    the file does."""

    weights: str = _field(
        "", "preset name, hub id, file or folder: the teacher, and where the student begins"
    )
    student: str = _field("", "where the student begins, if not at the teacher")
    expert: str = _field("", "of weights that are two networks: high (noise) or low")
    offline: bool = _field(False, "never ask the hub")
    attention: str = _field("dense", "of the student: dense or sla")
    sla: SLAConfig = SLAConfig(block_q=64, block_k=64)
    compute: str = _field("bfloat16", "what flows between layers; trained weights are float32")
    remat: str = _field(
        "block",
        "what the backward pass has of a block: none (all is kept), block (what it reads), products"
        " (those of linear layers too), offload (what it reads, in the host's memory)",
    )
    lora: LoRA | None = _field(None, "adapters in place of the weights; LoRA, or one of its keys")
    frozen: str = _field(
        "float",
        "weights that are not trained, the teacher's too: float (of compute), or 8 bits: int8,"
        " int8_channel, fp8",
    )
    dit: DiTConfig = DiTConfig()

    def __post_init__(self):
        for name, allowed in (
            ("attention", STUDENT),
            ("compute", FLOATS),
            ("expert", ("", *EXPERTS)),
            ("frozen", LINEAR),
            ("remat", REMAT),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"ModelConfig.{name} is {getattr(self, name)!r}; allowed:"
                    f" {', '.join(filter(None, allowed))}"
                )
        if self.student and not self.weights:
            raise ValueError("ModelConfig.student is given without weights, which are the teacher")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW. The defaults are those of the student of rCM at 1.3B (NVlabs/rcm rcm/configs)."""

    learning_rate: float = 2e-6
    b1: float = 0.0
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = _field(0.01, "on every trained weight")
    warmup: int = _field(100, "updates over which the learning rate rises")
    start: float = _field(1e-6, "its factor at the first update")
    decay: str = _field("constant", "or linear, cosine")
    steps: int | None = _field(None, "updates until the decay ends")
    decay_from: float = _field(
        2 / 3,
        "share of the steps after which the linear decay begins; the cosine follows the warm-up"
        " at once",
    )
    final: float = _field(0.0, "factor of the learning rate at the end of the decay")
    clip: float | None = _field(None, "greatest norm of the gradient")
    train: str | None = _field(
        None,
        "pattern of whole weight names; the others are frozen: no gradient, no moments, no average."
        " none: all, or with model.lora no others but sparse attention's projections",
    )

    def __post_init__(self):
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(
                f"OptimizerConfig.learning_rate is {self.learning_rate}; it must be positive and"
                " finite"
            )
        if not (0 <= self.b1 < 1 and 0 <= self.b2 < 1):
            raise ValueError(
                f"OptimizerConfig: b1 {self.b1} and b2 {self.b2} must be at least 0 and less than 1"
            )
        for name in ("eps", "weight_decay", "warmup", "start", "final"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(
                    f"OptimizerConfig.{name} is {getattr(self, name)}; it must not be negative"
                )
        if self.decay not in DECAY:
            raise ValueError(
                f"OptimizerConfig.decay is {self.decay!r}; allowed: {', '.join(DECAY)}"
            )
        if (self.decay == "constant") != (self.steps is None):
            raise ValueError(
                f"OptimizerConfig: decay {self.decay!r} with steps {self.steps}; only a decay has"
                " steps"
            )
        if self.steps is not None and self.warmup >= self.steps:
            raise ValueError(
                f"OptimizerConfig: warmup {self.warmup} must be less than steps {self.steps}"
            )
        if not 0 <= self.decay_from < 1:
            raise ValueError(
                f"OptimizerConfig.decay_from is {self.decay_from}; it is a share of the steps, at"
                " least 0 and less than 1"
            )
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"OptimizerConfig.clip is {self.clip}; it must be positive, or None")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Videos of fixed prompts that a run makes of its networks as it goes on."""

    prompts: str = _field(
        "", "file of prompts, one a line, or of their embeddings (.safetensors); none: no videos"
    )
    every: int = _field(500, "steps between videos; the first are made before the first step")
    model: str = _field(
        "", "whose VAE and text encoder are used, where model.weights has none: the shards' own"
    )
    num_steps: int | None = _field(None, "of the sampler; none: 1, 2 and 4 of rcm, else its own")
    guidance_scale: float | None = _field(
        None, "of an undistilled network; none: its own, 1 for none"
    )
    teacher: bool = _field(
        True, "the teacher's videos too, by the undistilled model's sampler, before the first step"
    )
    seed: int = _field(0, "of the noise, which is the same for all prompts and at all times")

    def __post_init__(self):
        positive(self, "every", most=10**9)
        if self.num_steps is not None:
            positive(self, "num_steps", most=1000)
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"SampleConfig.seed is {self.seed}; allowed: 0 to 4294967295")
        scale = self.guidance_scale
        if scale is not None and not 1 <= scale < math.inf:
            raise ValueError(
                f"SampleConfig.guidance_scale is {scale}; allowed: 1 (none) and more, or none"
            )


# -- what losses share -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class UniformShift:
    """Times with u = shift(U[0, 1)): log sigma is logistic, moved by log shift."""

    shift: float = _field(5.0, "factor of sigma; 1 leaves u uniform")

    def __post_init__(self):
        if not 0 < self.shift < math.inf:
            raise ValueError(
                f"UniformShift.shift is {self.shift}; it must be positive and finite (1 leaves u"
                " uniform)"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogNormal:
    """Times with log sigma = mean + deviation N(0, 1).

    A mean given for single images moves by 0.5 ln(latent frames) for video: -0.8 for 20 frames is
    0.7.
    """

    mean: float = _field(0.7, "of log sigma")
    deviation: float = 1.6

    def __post_init__(self):
        if not math.isfinite(self.mean) or not 0 < self.deviation < math.inf:
            raise ValueError(
                f"LogNormal(mean={self.mean}, deviation={self.deviation}): finite numbers are"
                " needed, the deviation positive"
            )


TimeDistribution = UniformShift | LogNormal


@dataclasses.dataclass(frozen=True, kw_only=True)
class EMAConfig:
    """Moving average of weights: by powers of the number of updates (arXiv 2312.02696), or with a
    constant decay."""

    width: float = _field(0.1, "relative length of the average by powers")
    decay: float | None = _field(None, "a constant decay instead")

    def __post_init__(self):
        if not 0 < self.width < 0.28:  # from 1/sqrt(12) on, no positive exponent has this width
            raise ValueError(
                f"EMAConfig.width is {self.width}; allowed: greater than 0, less than 0.28"
                " (published: 0.1)"
            )
        if self.decay is not None and not 0 <= self.decay < 1:
            raise ValueError(
                f"EMAConfig.decay is {self.decay}; allowed: 0 up to, but not including, 1"
            )


# -- losses ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowMatchingConfig:
    """Flow matching with no weight over time."""

    time: TimeDistribution = UniformShift()
    time_from: float = _field(0.0, "least flow time that is drawn; 0: data")
    time_to: float = _field(
        1.0, "greatest; 1: noise. One of two experts is trained on its own times"
    )
    dropout: float = _field(
        0.0,
        "share of captions replaced by the negative embedding; 0.1 to 0.15 for a model that will be"
        " guided",
    )
    ema: EMAConfig = EMAConfig()
    accumulate: int = _field(1, "microbatches in a batch")

    def __post_init__(self):
        _check_accumulate(self)
        _check_times(self)
        if not 0 <= self.dropout < 1:
            raise ValueError(
                f"FlowMatchingConfig.dropout is {self.dropout}; it is a probability, at least 0 and"
                " less than 1"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SLATrainingConfig:
    """Fine-tuning with sparse-linear attention. The defaults are those of the published runs."""

    target: str = _field("teacher", "white box; data: black box, the teacher is not used")
    time: TimeDistribution = LogNormal(mean=1.5)
    time_from: float = _field(0.0, "least flow time that is drawn; 0: data")
    time_to: float = _field(
        1.0, "greatest; 1: noise. One of two experts is trained on its own times"
    )
    ema: EMAConfig = EMAConfig()
    accumulate: int = _field(1, "microbatches in a batch")

    def __post_init__(self):
        _check_accumulate(self)
        _check_times(self)
        if self.target not in TARGETS:
            raise ValueError(
                f"SLATrainingConfig.target is {self.target!r}; allowed: {', '.join(TARGETS)}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SCM:
    """Continuous-time consistency. kappa and floor are in units that do not depend on the size of a
    sample: the defaults are the published 100 : 1 and 0.1 for 20 latent frames at 480p."""

    kappa: float | None = _field(
        0.07,
        "weight beside distribution matching; none: the published 100 : 1 at the size of a sample,"
        " 100 / sqrt(values)",
    )
    floor: float = _field(
        7e-5, "directions of a smaller root mean square are not brought to full length"
    )
    time: TimeDistribution = _field(LogNormal(), "of the noise on data")
    tangent: str = _field(
        "exact",
        "or differences in time: semidiscrete (fd_type 1), discrete (fd_type 2); not with rounded"
        " timesteps",
    )
    interval: float = _field(
        1e-2,
        "of the differences; the official 1e-4 is below the rounding of a float32 network",
    )
    compute: str = _field(
        "own", "dtype in which the network of the tangent runs; own: the student's"
    )
    warmup_form: str = _field(
        "paper",
        "of the direction; code2026: as the official code has it since January 2026",
    )

    def __post_init__(self):
        fine = self.kappa is None or 0 < self.kappa < math.inf
        if not fine or not 0 <= self.floor < math.inf:
            raise ValueError(
                f"SCM: kappa {self.kappa} must be positive, floor {self.floor} not negative"
            )
        for name, allowed in (
            ("tangent", TANGENTS),
            ("warmup_form", WARMUP_FORMS),
            ("compute", ("own", *FLOATS)),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"SCM.{name} is {getattr(self, name)!r}; allowed: {', '.join(allowed)}"
                )
        if not 0 < self.interval < 0.5:
            raise ValueError(
                f"SCM.interval is {self.interval}; allowed: greater than 0, less than 0.5 of the"
                " pi/2 of TrigFlow time"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DCM:
    """Discrete-time consistency: `skip` Euler steps of the teacher on a shifted grid of `steps`
    intervals; no normalising."""

    weight: float = _field(100.0, "beside distribution matching; of a sum over the sample")
    steps: int = _field(48, "intervals of the grid")
    shift: float = _field(5.0, "of the grid towards noise")
    skip: int = _field(1, "intervals between the student's two predictions")

    def __post_init__(self):
        if not 0 < self.weight < math.inf or not 0 < self.shift < math.inf:
            raise ValueError(f"DCM: weight {self.weight} and shift {self.shift} must be positive")
        if not 1 <= self.skip < self.steps:
            raise ValueError(
                f"DCM: skip {self.skip} must be at least 1 and less than steps {self.steps}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RCMConfig:
    """rCM distillation. The defaults are those of the 1.3B text-to-video run (NVlabs/rcm
    rcm/configs/experiments)."""

    guidance: float = _field(5.0, "of the teacher; 1 for none")
    consistency: SCM | DCM | None = _field(SCM(), "None: distribution matching alone")
    dmd_weight: float = _field(
        1.0,
        "of distribution matching; 0: consistency alone, without a critic and its turns",
    )
    dmd_limit: float | None = _field(
        None,
        "greatest root mean square of the distribution-matching direction in a sample",
    )
    sample_time: TimeDistribution = _field(
        UniformShift(), "of the student's simulated steps, and of the noise on its samples"
    )
    rollout: tuple[float, ...] | None = _field(
        None,
        "times of the second and later simulated steps in place of drawn ones: 1.5,1.4,1.0, of"
        " TrigFlow, in radians",
    )
    max_steps: int = _field(4, "samples are made in 1, 2, ... this many steps in turn")
    frequency: int = _field(
        5,
        "after the warm-up, the student has one turn in this many and the critic the others",
    )
    warmup: int = _field(
        1000,
        "student turns at the start, without distribution matching, over which the tangent grows to"
        " full length",
    )
    ema: EMAConfig = EMAConfig()
    accumulate: int = _field(1, "microbatches in a batch")
    offload: bool = _field(
        False,
        "the teacher, moments and averages wait in the host's memory while a turn does not use"
        " them",
    )

    def __post_init__(self):
        _check_accumulate(self)
        if not 1 <= self.guidance < math.inf:
            raise ValueError(
                f"RCMConfig.guidance is {self.guidance}; allowed: 1 (none) and more (published: 5)"
            )
        limited = self.dmd_limit is None or self.dmd_limit > 0
        if not 0 <= self.dmd_weight < math.inf or not limited:
            raise ValueError(
                f"RCMConfig: dmd_weight {self.dmd_weight} must not be negative, dmd_limit"
                f" {self.dmd_limit} positive or None"
            )
        if self.max_steps < 1 or self.frequency < 1 or self.warmup < 0:
            raise ValueError(
                f"RCMConfig: max_steps {self.max_steps} and frequency {self.frequency} must be at"
                f" least 1, warmup {self.warmup} at least 0"
            )
        times = self.rollout
        if times is not None:
            falling = all(a > b for a, b in itertools.pairwise((math.pi / 2, *times, 0.0)))
            if not falling or len(times) < self.max_steps - 1:
                raise ValueError(
                    f"RCMConfig.rollout is {','.join(map(str, times))}; {self.max_steps - 1} times"
                    " or more, falling from pi/2 to 0 and neither of the two"
                )
        if self.offload and not self.dmd_weight:
            raise ValueError(
                "RCMConfig: offload keeps what student and critic do not use in turn on the host;"
                " with dmd_weight 0 there are no turns"
            )
        if self.frequency == 1 and self.dmd_weight:
            raise ValueError(
                "RCMConfig: frequency 1 gives the critic no turn; distribution matching needs at"
                " least 2"
            )
        if self.consistency is None and (self.warmup or not self.dmd_weight):
            raise ValueError(
                "RCMConfig: without a consistency term, warmup must be 0 and dmd_weight positive"
            )
