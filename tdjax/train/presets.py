"""What a run is made of, as data: settings of the machinery, the methods with their parts, and the
presets. Imports no jax."""

from __future__ import annotations

import dataclasses
from typing import Any

from tdjax.config import DiTConfig, SLAConfig, positive

COMPUTE = ("bfloat16", "float16", "float32")
STUDENT = ("dense", "sla")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Length of a run, what it leaves behind, and where it runs."""

    folder: str = ""  # checkpoints, metrics and the trained weights go here
    steps: int = 2000  # one step is one update of one network
    seed: int = 0  # of noise, times and random weights
    log_every: int = 10  # steps between reports; nothing is fetched from the device in between
    save_every: int = 250  # steps between checkpoints
    keep: int = 3  # checkpoints that stay; 0 for all
    patience: int = 10  # losses in a row that may fail to be finite before the run stops
    mesh: str = "auto"  # several devices: fsdp=4, or fsdp=2,tp=2

    def __post_init__(self):
        positive(self, "steps", "log_every", "save_every", "patience")
        if self.keep < 0 or self.seed < 0:
            raise ValueError(
                f"RunConfig: keep is {self.keep}, seed {self.seed}; they must be at least 0"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Shards of latents and prompt embeddings, and how they become batches."""

    path: str = ""  # folder of shard_000000.tar, ...
    negative: str = (
        ""  # embedding of the negative prompt: umT5_wan_negative_emb.pt, .npy or .safetensors
    )
    frames: int = 21  # latent frames; longer samples are cut
    batch: int = 8  # samples of all devices together
    seed: int = 0  # of the order
    mix: int = 4  # shards whose samples are shuffled together

    def __post_init__(self):
        positive(self, "frames", "batch", "mix")
        if self.seed < 0:
            raise ValueError(f"DataConfig.seed is {self.seed}; it must be at least 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which weights the networks begin with. `dit` gives the sizes where there are no weights; else
    the file does."""

    weights: str = (
        ""  # preset name, hub id, file or folder: the teacher, and where the student begins
    )
    student: str = ""  # where the student begins, if not at the teacher
    offline: bool = False  # never ask the hub
    attention: str = "dense"  # of the student: dense or sla
    sla: SLAConfig = SLAConfig(block_q=64, block_k=64)
    compute: str = "bfloat16"  # what flows between layers; trained weights are float32
    dit: DiTConfig = DiTConfig()

    def __post_init__(self):
        for name, allowed in (("attention", STUDENT), ("compute", COMPUTE)):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"ModelConfig.{name} is {getattr(self, name)!r}; allowed: {', '.join(allowed)}"
                )
        if self.student and not self.weights:
            raise ValueError("ModelConfig.student is given without weights, which are the teacher")


COMMON = {
    "run": "RunConfig",
    "data": "DataConfig",
    "model": "ModelConfig",
    "optimizer": "OptimizerConfig",
}

# Method -> the parts of its configuration: {first word of a key: class}.
METHODS: dict[str, dict[str, str]] = {
    "flow": COMMON | {"loss": "FlowMatchingConfig"},
    "sla": COMMON | {"loss": "SLATrainingConfig"},
    "rcm": COMMON | {"loss": "RCMConfig", "critic": "OptimizerConfig"},
}


@dataclasses.dataclass(frozen=True)
class Preset:
    """values: {dotted key: value}; everything else has its class's default."""

    method: str
    about: str
    values: dict[str, Any]


# Published settings: thu-ml/TurboDiffusion turbodiffusion/rcm/configs/experiments/sla, NVlabs/rcm
# rcm/configs/experiments, arXiv 2510.08431 tables 4 and 5 (batch sizes, number of steps). No length
# was published for SLA: 2,000 steps is that of arXiv 2509.24006.
SLA = {
    "model.attention": "sla",
    "data.batch": 32,
    "optimizer.learning_rate": 1e-5,
    "optimizer.b1": 0.9,
}
RCM_1_3B = {"data.frames": 20, "data.batch": 256, "run.steps": 10000, "critic.learning_rate": 4e-7}
RCM_14B = {
    "data.batch": 64, "run.steps": 4000, "optimizer.learning_rate": 1e-6, "critic.learning_rate": 1e-7,
    "loss.consistency.time.mean": 1.5, "loss.frequency": 10, "loss.warmup": 0,
}  # fmt: skip
# A transformer of 6 million parameters for 9 latent frames of 8 x 8 x 8, from random weights.
FM_TINY = {
    "model.compute": "float32", "model.dit.dim": 256, "model.dit.heads": 4, "model.dit.layers": 6, "model.dit.ffn_dim": 768,
    "model.dit.in_channels": 8, "model.dit.out_channels": 8, "model.dit.coordinates": True,
    "model.dit.patch": (1, 1, 1), "model.dit.text_dim": 128, "model.dit.text_len": 32, "model.dit.round_time": False, "data.frames": 9,
    "data.batch": 128, "run.steps": 11000, "run.save_every": 1000, "loss.time.shift": 3.0, "loss.dropout": 0.12, "loss.ema.decay": 0.999,
    "optimizer.learning_rate": 1e-3, "optimizer.b1": 0.9, "optimizer.b2": 0.99, "optimizer.warmup": 300,
    "optimizer.decay": "cosine", "optimizer.steps": 11000, "optimizer.final": 0.05, "optimizer.clip": 1.0,
}  # fmt: skip

PRESETS: dict[str, Preset] = {
    "sla-1.3b": Preset(
        "sla",
        "sparse-linear attention for Wan2.1 T2V 1.3B, towards its dense self",
        SLA | {"model.weights": "wan2.1-t2v-1.3b"},
    ),
    "sla-14b": Preset(
        "sla", "the same for Wan2.1 T2V 14B", SLA | {"model.weights": "wan2.1-t2v-14b"}
    ),
    "rcm-1.3b": Preset(
        "rcm",
        "few-step distillation of Wan2.1 T2V 1.3B",
        RCM_1_3B | {"model.weights": "wan2.1-t2v-1.3b"},
    ),
    "rcm-14b": Preset(
        "rcm", "the same for Wan2.1 T2V 14B", RCM_14B | {"model.weights": "wan2.1-t2v-14b"}
    ),
    "fm-tiny": Preset("flow", "flow matching of a small transformer from random weights", FM_TINY),
}
