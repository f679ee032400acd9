"""The methods with the parts of their configuration, and the presets, as data. Imports no jax."""

from __future__ import annotations

import dataclasses
from typing import Any

from tdjax.train.configs import (
    DataConfig,
    FlowMatchingConfig,
    ModelConfig,
    OptimizerConfig,
    RCMConfig,
    RunConfig,
    SampleConfig,
    SLATrainingConfig,
)

_COMMON: dict[str, type] = {
    "run": RunConfig,
    "sample": SampleConfig,
    "data": DataConfig,
    "model": ModelConfig,
    "optimizer": OptimizerConfig,
}

# Method -> the parts of its configuration: {first word of a key: class}.
METHODS: dict[str, dict[str, type]] = {
    "flow": _COMMON | {"loss": FlowMatchingConfig},
    "sla": _COMMON | {"loss": SLATrainingConfig},
    "rcm": _COMMON | {"loss": RCMConfig, "critic": OptimizerConfig},
}


@dataclasses.dataclass(frozen=True)
class Preset:
    """Where the settings of a run begin. values: {dotted key: value}; everything else has its
    class's default."""

    method: str
    about: str
    values: dict[str, Any]


# Published settings: thu-ml/TurboDiffusion turbodiffusion/rcm/configs/experiments/sla, NVlabs/rcm
# rcm/configs/experiments, arXiv 2510.08431 tables 4 and 5 (batch sizes, number of steps). No length
# was published for SLA: 2,000 steps is that of arXiv 2509.24006.
_SLA = {
    "model.attention": "sla",
    "data.batch": 32,
    "data.per_device": 1,
    "optimizer.learning_rate": 1e-5,
    "optimizer.b1": 0.9,
}
_RCM_1_3B = {
    "data.frames": 20,
    "data.batch": 256,
    "data.per_device": 1,
    "run.steps": 10000,
    "critic.learning_rate": 4e-7,
    "loss.consistency.kappa": None,
}
_RCM_14B = {
    "data.batch": 64,
    "data.per_device": 1,
    "run.steps": 4000,
    "optimizer.learning_rate": 1e-6,
    "critic.learning_rate": 1e-7,
    "loss.consistency.kappa": None,
    "loss.consistency.time.mean": 1.5,
    "loss.frequency": 10,
    "loss.warmup": 0,
}
# A usual beginning for some dozens of clips; nobody has published one that is right for all.
_LORA = {
    "model.lora": "LoRA",
    "data.batch": 1,
    "optimizer.learning_rate": 1e-4,
    "optimizer.b1": 0.9,
}
# For the embedded model: what some dozens of clips show is learnt in a minute or two on two cores.
# Its sampler has no times below 0.3 but the last one, which is 0.
_LORA_DEMO = _LORA | {
    "model.weights": "demo",
    "model.compute": "float32",
    "model.attention": "sla",
    "model.sla.topk": 0.34,
    "model.lora.rank": 16,
    "data.frames": 9,
    "data.batch": 2,
    "run.steps": 90,
    "loss.time.shift": 3.0,
    "loss.time_from": 0.3,
    "loss.ema.decay": 0.9,
    "optimizer.learning_rate": 4e-3,
    "optimizer.b2": 0.99,
    "optimizer.weight_decay": 0.0,
    "optimizer.warmup": 10,
    "optimizer.decay": "cosine",
    "optimizer.steps": 90,
    "optimizer.clip": 1.0,
}
# A transformer of 6 million parameters for 9 latent frames of 8 x 8 x 8, from random weights.
_FM_TINY = {
    "model.compute": "float32",
    "model.dit.dim": 256,
    "model.dit.heads": 4,
    "model.dit.layers": 6,
    "model.dit.ffn_dim": 768,
    "model.dit.in_channels": 8,
    "model.dit.out_channels": 8,
    "model.dit.coordinates": True,
    "model.dit.patch": (1, 1, 1),
    "model.dit.text_dim": 128,
    "model.dit.text_len": 32,
    "model.dit.round_time": False,
    "data.frames": 9,
    "data.batch": 128,
    "run.steps": 11000,
    "run.save_every": 1000,
    "loss.time.shift": 3.0,
    "loss.dropout": 0.12,
    "loss.ema.decay": 0.999,
    "optimizer.learning_rate": 1e-3,
    "optimizer.b1": 0.9,
    "optimizer.b2": 0.99,
    "optimizer.warmup": 300,
    "optimizer.decay": "cosine",
    "optimizer.steps": 11000,
    "optimizer.final": 0.05,
    "optimizer.clip": 1.0,
}
_WEIGHTS_1_3B = {"model.weights": "wan2.1-t2v-1.3b"}
_WEIGHTS_14B = {"model.weights": "wan2.1-t2v-14b"}


def _sla_a14b(task: str, expert: str, boundary: float) -> Preset:
    """One expert of Wan2.2 A14B, on its own times: above the boundary, or below."""
    times = {"loss.time_from": boundary} if expert == "high" else {"loss.time_to": boundary}
    weights = {"model.weights": f"wan2.2-{task}-a14b", "model.expert": expert}
    name = {"t2v": "T2V", "i2v": "I2V"}[task]
    return Preset(
        "sla",
        f"the same for the {expert}-noise expert of Wan2.2 {name} A14B",
        _SLA | weights | times,
    )


PRESETS: dict[str, Preset] = {
    "sla-1.3b": Preset(
        "sla",
        "sparse-linear attention for Wan2.1 T2V 1.3B, towards its dense self",
        _SLA | _WEIGHTS_1_3B,
    ),
    "sla-14b": Preset("sla", "the same for Wan2.1 T2V 14B", _SLA | _WEIGHTS_14B),
    "sla-a14b-t2v-high": _sla_a14b("t2v", "high", 0.875),
    "sla-a14b-t2v-low": _sla_a14b("t2v", "low", 0.875),
    "sla-a14b-i2v-high": _sla_a14b("i2v", "high", 0.9),
    "sla-a14b-i2v-low": _sla_a14b("i2v", "low", 0.9),
    "rcm-1.3b": Preset(
        "rcm", "few-step distillation of Wan2.1 T2V 1.3B", _RCM_1_3B | _WEIGHTS_1_3B
    ),
    # NVlabs/rcm as it was in December 2025: c + 5 (c - n), which is 6 in the usual count. As it is
    # since: efc0ccb (2026-01-08, warm-up), 9dbd285 (2026-02-20, guidance).
    "rcm-1.3b-2025": Preset(
        "rcm",
        "the same as the official code of December 2025 had it",
        _RCM_1_3B | _WEIGHTS_1_3B | {"loss.guidance": 6.0},
    ),
    "rcm-1.3b-2026": Preset(
        "rcm",
        "the same as the official code has it since February 2026",
        _RCM_1_3B | _WEIGHTS_1_3B | {"loss.consistency.warmup_form": "code2026"},
    ),
    "rcm-14b": Preset("rcm", "the same for Wan2.1 T2V 14B", _RCM_14B | _WEIGHTS_14B),
    "lora-1.3b": Preset(
        "flow", "adapters on Wan2.1 T2V 1.3B, towards clips of your own", _LORA | _WEIGHTS_1_3B
    ),
    "lora-14b": Preset("flow", "the same for Wan2.1 T2V 14B", _LORA | _WEIGHTS_14B),
    "lora-demo": Preset("flow", "adapters on the embedded model, on a CPU", _LORA_DEMO),
    "fm-tiny": Preset("flow", "flow matching of a small transformer from random weights", _FM_TINY),
}
