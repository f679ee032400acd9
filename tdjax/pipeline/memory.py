"""Memory of each stage before anything is loaded: what `--dry_run` prints and what decides which
weights stay resident.

Weights are exact (shapes of the abstract module). Working memory is an estimate from the shapes
that are alive at the worst moment of a stage; docs/performance.md keeps the measured peaks beside
it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path

import jax
import numpy as np

from tdjax.checkpoints import orbax
from tdjax.config import Config, DiTConfig, TextConfig, VAEConfig, VideoSize
from tdjax.errors import NotFinite, OutOfMemory
from tdjax.models.wan_vae import cache_bytes
from tdjax.pipeline.vae_tiling import tiling

GIB = 2**30
KERNEL_STEPS, REFERENCE_STEPS = (
    5.5,
    10,
)  # activations of a chunk at full resolution that a VAE program holds at its worst moment
STREAMED_LAYERS = (
    3  # of the text encoder on the device: one that runs, one that waits, one that arrives
)


@dataclasses.dataclass(frozen=True)
class StagePlan:
    name: str
    weights: int  # bytes
    working: int  # bytes beside the weights

    @property
    def total(self) -> int:
        return self.weights + self.working


def module_bytes(module) -> int:
    """Bytes of all leaves of an (abstract) module."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(module))


@functools.cache
def weight_bytes(kind: str, cfg: Config) -> int:
    """Bytes of a network's weights. Counting the leaves takes milliseconds, and a call plans many
    times."""
    return module_bytes(orbax.abstract(kind, cfg))


@functools.cache
def layer_bytes(cfg: TextConfig) -> int:
    """Bytes of one layer of the text encoder."""
    return module_bytes(orbax.abstract("text", cfg).blocks) // cfg.layers


def text_working(cfg: TextConfig, batch: int) -> int:
    """The bias table and scores [b h s s] in float32, beside the widest activation."""
    s, size = cfg.text_len, np.dtype(cfg.policy.compute).itemsize
    return batch * (3 * cfg.heads * s * s * 4 + 3 * s * cfg.ffn_dim * size)


def dit_working(cfg: DiTConfig, size: VideoSize, batch: int) -> int:
    """Keys and values of the text, residual stream, its float32 island, the three of q k v and
    attention's output, or the two of the MLP if larger."""
    tokens, item = batch * size.tokens(cfg.patch), np.dtype(cfg.policy.compute).itemsize
    text = 2 * cfg.layers * batch * cfg.text_len * cfg.dim * item
    stream = tokens * cfg.dim * (item + 4)
    attention = tokens * cfg.dim * (4 * item + 4)
    mlp = tokens * cfg.ffn_dim * (2 * item + (0 if cfg.linear == "float" else 5))
    sparse = 0 if cfg.attention == "dense" else tokens * cfg.dim * 3 * item + GIB // 2
    return text + stream + max(attention + sparse, mlp)


def vae_working(cfg: VAEConfig, height: int, width: int, *, encode: bool) -> int:
    """The cache and the activations of one chunk at full resolution; frames come and go. XLA counts
    5.0 of them with the kernel, and up to 9.0 where the reference makes the taps."""
    item, frame = np.dtype(cfg.policy.compute).itemsize, height * width
    steps = (
        KERNEL_STEPS
        if cfg.impl != "reference" and jax.default_backend() == "gpu"
        else REFERENCE_STEPS
    )
    step = (
        4 * cfg.multipliers[0] * cfg.dim * frame * item
    )  # one activation of four frames at full resolution
    return cache_bytes(cfg, height, width, encode=encode) + int(steps * step)


def stage_plans(
    configs: dict[str, Config],
    size: VideoSize,
    *,
    image: bool,
    guided: bool,
    stream_text: bool = False,
    tiled: bool = False,
) -> list[StagePlan]:
    """configs of "text" (or not), "vae", "dit", "dit_low" (or not) -> the stages in the order they
    run."""
    plans = []
    if "text" in configs:
        cfg = configs["text"]
        weights = STREAMED_LAYERS * layer_bytes(cfg) if stream_text else weight_bytes("text", cfg)
        plans.append(StagePlan("text", weights, text_working(cfg, 1)))
    vae = configs["vae"]
    if image:
        plans.append(
            StagePlan(
                "vae encode",
                weight_bytes("vae", vae),
                vae_working(vae, size.height, size.width, encode=True),
            )
        )
    for name in ("dit", "dit_low"):
        if name in configs:
            cfg = configs[name]
            label = (
                "denoise"
                if "dit_low" not in configs
                else ("denoise (high noise)" if name == "dit" else "denoise (low noise)")
            )
            plans.append(
                StagePlan(
                    label, weight_bytes("dit", cfg), dit_working(cfg, size, 2 if guided else 1)
                )
            )
    sides = (size.height // vae.spatial, size.width // vae.spatial)
    height, width = (n * vae.spatial for n in (tiling(*sides).size if tiled else sides))
    plans.append(
        StagePlan(
            "vae decode", weight_bytes("vae", vae), vae_working(vae, height, width, encode=False)
        )
    )
    return plans


def memory_limit(device=None) -> int | None:
    """Bytes that JAX may use on the device; None where the backend does not say (CPU)."""
    stats = (device or jax.local_devices()[0]).memory_stats()
    return stats.get("bytes_limit") if stats else None


def keep_resident(plans: list[StagePlan], limit: int | None, low_memory: bool) -> bool:
    """Whether all weights may stay on the device between stages and calls."""
    if low_memory:
        return False
    if limit is None:
        return True
    weights = sum(
        p.weights for p in plans if p.name != "vae encode"
    )  # the VAE stands in two stages
    return weights + max(p.working for p in plans) < 0.9 * limit


def may_stage(working_stage: StagePlan, module, limit: int | None) -> bool:
    """Whether a module can be read into the host's memory while a stage runs: the host has room for
    it, and the device for its largest leaf twice (it is transposed there). Not where the device
    does not report its memory: that is the host's own."""
    largest = max(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(module))
    room = limit is not None and working_stage.total + 2 * largest < 0.9 * limit
    return room and 1.2 * module_bytes(module) < host_available()


def host_available() -> int:
    """Bytes that the host could give to a process (Linux; 0 elsewhere)."""
    file = Path("/proc/meminfo")
    lines = file.read_text().splitlines() if file.exists() else []
    return next(
        (int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), 0
    )


def table(plans: list[StagePlan], limit: int | None) -> str:
    lines = [f"{'stage':22} {'weights':>10} {'working':>10} {'total':>10}"]
    for p in plans:
        lines.append(
            f"{p.name:22} {p.weights / GIB:6.2f} GiB {p.working / GIB:6.2f} GiB"
            f" {p.total / GIB:6.2f} GiB"
        )
    peak = max(plans, key=lambda p: p.total)
    limit_text = (
        "the device does not report its memory"
        if limit is None
        else f"{limit / GIB:.1f} GiB usable"
    )
    lines.append(f"peak {peak.total / GIB:.2f} GiB in {peak.name} ({limit_text})")
    return "\n".join(lines)


def out_of_memory(stage: str, plans: list[StagePlan], limit: int | None) -> OutOfMemory:
    """The error of a stage that ran out of device memory, with its estimate and the remedies in
    order."""
    row = max(plans, key=lambda p: (p.name.split()[0] in stage, p.total))
    usable = "unknown" if limit is None else f"{limit / GIB:.1f} GiB"
    return OutOfMemory(
        f"out of device memory in stage {stage!r}",
        f"estimated need {row.total / GIB:.1f} GiB, of which weights {row.weights / GIB:.1f} GiB;"
        f" usable {usable}",
        "in this order: --low_memory; a -quant file or --quant int8; fewer frames or --resolution"
        " 480p",
    )


def not_finite(step: int, steps: int, cfg: DiTConfig) -> NotFinite:
    """The error of a denoising step that was not finite."""
    return NotFinite(
        f"step {step} of {steps} gave NaN or infinity: no video was written",
        f"the transformer ran with attention {cfg.attention}, linears {cfg.linear},"
        f" {cfg.policy.compute}",
        "try --attention_type original, then --quant none, then --dtype float32; please report"
        " which one helps",
    )
