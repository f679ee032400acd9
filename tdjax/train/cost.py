"""Arithmetic of the work in a training step: FLOPs of the model, and what a device can do.

Counted are the products that the method needs: two FLOPs for a multiply-add, and twice a forward
pass for a backward pass (once where weights are frozen: only the derivative by activations is
needed). Blocks that are computed again to save memory do not count. Norms, embeddings and adapters
(at 14B, of rank 64, 2 % of the products) are left out.
"""

from __future__ import annotations

import math
from typing import Any

import jax

from tdjax.config import CLIP_TOKENS, DiTConfig
from tdjax.train.configs import SCM, RCMConfig

TERA = 1e12
MEASURED_TFLOPS = 386.0  # of a step of sla-1.3b on one H200 (docs/training.md)
# Dense bfloat16 products of a device, TFLOP/s, by a part of its name; the first that fits. NVIDIA's
# data sheets, without sparsity.
PEAKS = (
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.0),
    ("H200", 989.0),
    ("B200", 2250.0),
    ("A100", 312.0),
    ("L40S", 362.0),
    ("4090", 165.0),
)


def peak_tflops() -> float | None:
    """Returns what all devices could do together, TFLOP/s in bfloat16; None where it is not
    known."""
    name = jax.devices()[0].device_kind
    one = next((peak for part, peak in PEAKS if part in name), None)
    return None if one is None else one * jax.device_count()


def forward_flops(cfg: DiTConfig, latents: tuple[int, int, int], text: int) -> float:
    """Returns the FLOPs of one forward pass of a sample. latents: frames, rows, columns; text:
    rows of the prompt's embedding."""
    tokens = math.prod(latents) // math.prod(cfg.patch)
    d = cfg.dim
    text += CLIP_TOKENS if cfg.image_dim else 0  # the image has keys and values of its own
    products = 2 * tokens * (6 * d * d + 2 * d * cfg.ffn_dim) + 2 * text * 2 * d * d
    share = 1.0 if cfg.attention == "dense" else cfg.sla.topk
    own = 4 * tokens * tokens * d * share
    if cfg.attention != "dense":  # the linear branch: keys by values, queries by that, projection
        own += 6 * tokens * d * cfg.head_dim
    return float(cfg.layers * (products + own + 4 * tokens * text * d))


def step_flops(
    method: str, loss: Any, student: float, teacher: float, whole: bool
) -> dict[str, float]:
    """Returns {phase: FLOPs of a step for one sample}, of rCM after its warm-up and on average over
    the lengths of simulation; "student, warm-up" too, where it has one.

    student, teacher: of a forward pass. whole: all weights are trained.
    """
    trained = (3 if whole else 2) * student
    if method == "flow":
        return {"flow": trained}
    if method == "sla":
        return {"sla": trained + teacher * (loss.target == "teacher")}
    return _distillation(loss, student, teacher, trained)


def _distillation(loss: RCMConfig, student: float, teacher: float, trained: float):
    guided = (2 if loss.guidance > 1 else 1) * teacher
    own, consistency = loss.consistency, 0.0
    if isinstance(own, SCM):
        consistency = guided + 2 * student + trained  # the derivative costs as much as its value
    elif own is not None:
        consistency = own.skip * guided + student + trained
    simulated = (loss.max_steps - 1) / 2 * student
    if not loss.dmd_weight:
        return {"student": consistency}
    phases = {
        "student": consistency + simulated + trained + guided + student,
        "critic": simulated + student + trained,
    }
    return phases | ({"student, warm-up": consistency} if loss.warmup else {})
