"""Memory of each stage before anything is loaded: what `--dry_run` prints and what decides which
weights stay resident.

Weights are exact (shapes of the abstract module). Working memory is an estimate from the shapes
that are alive at the worst moment of a stage; docs/performance.md keeps the measured peaks beside
it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import Mesh

from tdjax.checkpoints import orbax
from tdjax.config import Config, DiTConfig, TextConfig, TinyVAEConfig, VAEConfig, VideoSize
from tdjax.errors import OutOfMemory
from tdjax.models import tiny_vae
from tdjax.models.wan_vae import cache_bytes
from tdjax.parallel.sharding import GUIDANCE, shardings
from tdjax.parallel.space import latents_at_once, space_mesh
from tdjax.pipeline.vae_tiling import tiling

if TYPE_CHECKING:
    from tdjax.pipeline.components import Component
    from tdjax.pipeline.options import PipelineOptions
    from tdjax.pipeline.request import Request

GIB = 2**30
USABLE = 0.9  # share of the device's memory that a plan may count on
# Activations of a chunk at full resolution that a VAE program holds at its worst moment.
KERNEL_STEPS = 5.5
REFERENCE_STEPS = 10
# Layers of the text encoder on the device: one that runs, one that waits, one that arrives.
STREAMED_LAYERS = 3
STREAMED_BLOCKS = 3  # of the transformer, likewise
HOST_USABLE = 0.7  # share of the host's memory in which blocks may wait between calls


@dataclasses.dataclass(frozen=True)
class StagePlan:
    """Memory of one stage of a request.

    stage:     "text", "vae encode", "dit", "dit_low" or "vae decode". name: as it is shown.
    component: the network whose weights it needs: "text", "vae", "dit" or "dit_low".
    weights:   bytes. working: bytes beside the weights.
    host:      bytes of page-locked memory of the host in which weights wait that are streamed.
    """

    stage: str
    name: str
    component: str
    weights: int
    working: int
    host: int = 0

    @property
    def total(self) -> int:
        """Weights and working memory together, bytes."""
        return self.weights + self.working


@dataclasses.dataclass(frozen=True)
class ExecutionPlan:
    """What a request will need and how it will run, decided once, before anything is loaded.

    stages:        in the order in which they run.
    limit:         bytes that JAX may use on the device, or None where the backend does not say.
    keep_resident: all weights stay on the device between stages and calls.
    stream_text:   the text encoder passes through the device layer by layer.
    stream_transformer: so do the blocks of the transformer, from the host's memory.
    tiled_vae:     frames are decoded in overlapping tiles.
    """

    stages: tuple[StagePlan, ...]
    limit: int | None
    keep_resident: bool
    stream_text: bool
    tiled_vae: bool
    stream_transformer: bool = False

    def __iter__(self) -> Iterator[StagePlan]:
        return iter(self.stages)

    def of(self, stage: str) -> StagePlan:
        """Returns the row of a stage; KeyError for one that the request does not have."""
        for row in self.stages:
            if row.stage == stage:
                return row
        raise KeyError(f"{stage!r}; this plan has {', '.join(row.stage for row in self.stages)}")

    def table(self) -> str:
        """Returns what `--dry_run` prints."""
        lines = [f"{'stage':22} {'weights':>10} {'working':>10} {'total':>10}"]
        for row in self.stages:
            sizes = (row.weights, row.working, row.total)
            lines.append(f"{row.name:22} " + " ".join(f"{n / GIB:6.2f} GiB" for n in sizes))
        usable = "the device does not report its memory"
        if self.limit is not None:
            usable = f"{self.limit / GIB:.1f} GiB usable"
        peak = max(self.stages, key=lambda row: row.total)
        lines.append(f"peak {peak.total / GIB:.2f} GiB in {peak.name} ({usable})")
        waiting = [row.host for row in self.stages if row.host]
        if waiting:  # of two experts each is read for its stage, where memory is short
            host = sum(waiting) if self.keep_resident else max(waiting)
            lines.append(f"host {host / GIB:.2f} GiB, page-locked, for blocks of the transformer")
        return "\n".join(lines)


def make_plan(
    configs: Mapping[str, Any],
    size: VideoSize,
    *,
    guided: bool,
    low_memory: bool = False,
    stream_text: bool | None = None,
    stream_transformer: bool | None = None,
    tiled_vae: bool | None = None,
    mesh: Mesh | None = None,
    previews: bool = False,
    factors: Mapping[str, int] | None = None,
    limit: int | None = None,
) -> ExecutionPlan:
    """Returns the plan of a request on the first device, or on each device of a mesh.

    configs:     of "text" (or not), "vae", "dit" and "dit_low" (or not).
    guided:      every step runs a doubled batch, or each half of a mesh for it one of its halves.
    low_memory:  no weights stay, even if all would fit.
    stream_text: True, False, or None: unless everything fits together.
    stream_transformer: True, False, or None: where a transformer does not fit.
    tiled_vae:   True, False, or None: where the whole frame does not fit.
    previews:    every step is shown.
    factors:     bytes of low-rank factors beside the weights of "dit" and "dit_low".
    limit:       bytes that JAX may use on each device; None: on the first, as the backend says.
    """
    limit = memory_limit() if limit is None else limit
    if tiled_vae is None:
        decode = _vae_stage(configs["vae"], size, encode=False, tiled=False, mesh=mesh)
        tiled_vae = limit is not None and decode.total > USABLE * limit
    how: dict[str, Any] = {
        "tiled": tiled_vae,
        "mesh": mesh,
        "previews": previews,
        "factors": factors,
    }
    if stream_transformer is None:
        whole = stage_plans(configs, size, guided=guided, **how)
        rows = [row for row in whole if row.component in ("dit", "dit_low")]
        fits = limit is None or all(row.total <= USABLE * limit for row in rows)
        stream_transformer = mesh is None and not fits
    how["stream_transformer"] = stream_transformer
    plans = lambda streamed: stage_plans(configs, size, guided=guided, stream_text=streamed, **how)
    resident = lambda stages: (
        not low_memory
        and fit_together(stages, limit)
        and sum(row.host for row in stages) <= HOST_USABLE * host_memory()
    )
    if stream_text is None:
        stream_text = not resident(plans(False))
    stages = plans(stream_text)
    keep = resident(stages)
    return ExecutionPlan(stages, limit, keep, stream_text, tiled_vae, stream_transformer)


def plan_of(
    request: Request,
    components: Mapping[str, Component],
    options: PipelineOptions,
    mesh: Mesh | None,
    limit: int | None = None,
) -> ExecutionPlan:
    """Returns the plan of a request to a pipeline that was opened with these options. limit: as of
    `make_plan`."""
    networks = {name: each for name, each in components.items() if each.kind == "dit"}
    return make_plan(
        {name: component.config for name, component in components.items()},
        request.size,
        guided=request.sampler.guided,
        low_memory=options.low_memory,
        stream_text=options.stream_text,
        stream_transformer=options.stream_transformer,
        tiled_vae=options.tiled_vae,
        mesh=mesh,
        previews=request.on_preview is not None,
        factors={name: each.adapters.factor_bytes(each.config) for name, each in networks.items()},
        limit=limit,
    )


def module_bytes(module) -> int:
    """Bytes of all leaves of an (abstract) module."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(module))


@functools.cache
def weight_bytes(kind: str, cfg: Config, mesh: Mesh | None = None) -> int:
    """Bytes of a network's weights on a device. Counting the leaves takes milliseconds, and every
    call has a plan."""
    module = orbax.abstract(kind, cfg)
    if mesh is None:
        return module_bytes(module)
    lies = jax.tree.leaves(shardings(module, mesh))
    return sum(
        math.prod(where.shard_shape(x.shape)) * x.dtype.itemsize
        for x, where in zip(jax.tree.leaves(module), lies, strict=True)
    )


@functools.cache
def block_bytes(cfg: DiTConfig) -> int:
    """Bytes of one block of the transformer."""
    return module_bytes(orbax.abstract("dit", cfg).blocks) // cfg.layers


@functools.cache
def layer_bytes(cfg: TextConfig) -> int:
    """Bytes of one layer of the text encoder."""
    return module_bytes(orbax.abstract("text", cfg).blocks) // cfg.layers


def text_working(cfg: TextConfig, batch: int) -> int:
    """The bias table and scores [b h s s] in float32, beside the widest activation."""
    s, size = cfg.text_len, np.dtype(cfg.policy.compute).itemsize
    return batch * (3 * cfg.heads * s * s * 4 + 3 * s * cfg.ffn_dim * size)


def dit_working(cfg: DiTConfig, size: VideoSize, batch: int, sizes: Mapping[str, int]) -> int:
    """Keys and values of the text, the residual stream with what is added to it, and the three of q
    k v and attention's output, or the two of the MLP if larger. References have float32 beside
    them. On a mesh with axes of these sizes, tokens are divided by "seq", what has heads or is as
    wide as the MLP by "tensor" too, and a batch of 2 by "guidance". batch: of one video; copies of
    the weights ("data") have one each."""
    batch //= min(batch, sizes.get(GUIDANCE, 1))
    by_tokens = sizes.get("seq", 1)
    by_heads = by_tokens * sizes.get("tensor", 1)
    tokens, item = batch * size.tokens(cfg.patch), np.dtype(cfg.policy.compute).itemsize
    sparse, eight = cfg.attention != "dense", cfg.linear != "float"
    if has_kernels(cfg):
        stream = tokens * cfg.dim * 2 * item
        attention = tokens * cfg.dim * (4 * item + 2 * sparse)  # and int8 queries and keys
        mlp = tokens * cfg.ffn_dim * (item + (1 if eight else item))
    else:
        stream = tokens * cfg.dim * (item + 4)
        attention = tokens * cfg.dim * (4 * item + 4)
        attention += sparse * (tokens * cfg.dim * 3 * item + GIB // 2)
        mlp = tokens * cfg.ffn_dim * (2 * item + 5 * eight)
    return text_kv_bytes(cfg, batch) + stream // by_tokens + max(attention, mlp) // by_heads


def has_kernels(cfg: DiTConfig | VAEConfig) -> bool:
    """Whether a network runs kernels here, and not their references."""
    return cfg.impl != "reference" and jax.default_backend() == "gpu"


def text_kv_bytes(cfg: DiTConfig, batch: int) -> int:
    """Keys and values of the text, of all blocks."""
    item = np.dtype(cfg.policy.compute).itemsize
    return 2 * cfg.layers * batch * cfg.text_len * cfg.dim * item


def vae_working(cfg: VAEConfig, height: int, width: int, *, encode: bool, latents: int = 1) -> int:
    """The cache and the activations of one chunk of `latents` latent frames at full resolution;
    frames come and go. XLA counts 5.0 of them with the kernel, and up to 9.0 where the reference
    makes the taps."""
    item, frame = np.dtype(cfg.policy.compute).itemsize, height * width
    steps = KERNEL_STEPS if has_kernels(cfg) else REFERENCE_STEPS
    activation = 4 * latents * cfg.multipliers[0] * cfg.dim * frame * item  # four frames of each
    return cache_bytes(cfg, height, width, encode=encode) + int(steps * activation)


def tiny_working(cfg: TinyVAEConfig, height: int, width: int) -> int:
    """The cache and, of the last stage's frames at full resolution, what goes in and comes out of a
    convolution, beside a third for the taps that are summed."""
    item, frames = np.dtype(cfg.policy.compute).itemsize, cfg.temporal
    widest = max(cfg.widths[-1], cfg.widths[-2])
    leaves = jax.tree.leaves(tiny_vae.cache_shapes(cfg, height, width))
    return sum(x.size * x.dtype.itemsize for x in leaves) + (
        3 * frames * widest * height * width * item
    )


def stage_plans(
    configs: Mapping[str, Any],
    size: VideoSize,
    *,
    guided: bool,
    stream_text: bool = False,
    stream_transformer: bool = False,
    tiled: bool = False,
    mesh: Mesh | None = None,
    previews: bool = False,
    factors: Mapping[str, int] | None = None,
) -> tuple[StagePlan, ...]:
    """Returns the stages in the order in which they run; arguments as those of `make_plan`."""
    plans = []
    decode = _vae_stage(configs["vae"], size, encode=False, tiled=tiled, mesh=mesh)
    if "text" in configs:
        plans.append(_text_stage(configs["text"], stream_text, mesh))
    if configs["dit"].task == "i2v":
        plans.append(_vae_stage(configs["vae"], size, encode=True, tiled=False, mesh=mesh))
    names = {"dit": "denoise"}
    if "dit_low" in configs:
        names = {"dit": "denoise (high noise)", "dit_low": "denoise (low noise)"}
    for stage, name in names.items():
        cfg, batch = configs[stage], 2 if guided else 1
        working = dit_working(cfg, size, batch, {} if mesh is None else mesh.shape)
        beside = (factors or {}).get(stage, 0)
        weights, host = weight_bytes("dit", cfg, mesh) + beside, 0
        if stream_transformer:  # each block has the text's keys and values when it runs
            block = block_bytes(cfg) + beside // cfg.layers
            host = cfg.layers * block
            weights += STREAMED_BLOCKS * block - host
            working -= text_kv_bytes(cfg, batch) * (cfg.layers - 1) // cfg.layers
        if previews and previews_decoded(configs["vae"]):  # its weights stay between the steps
            working = decode.weights + max(working, decode.working)
        plans.append(StagePlan(stage, name, stage, weights, working, host))
    return (*plans, decode)


def previews_decoded(cfg: VAEConfig | TinyVAEConfig) -> bool:
    """Whether previews of latents are made by their decoder: a small one, or that of a small model.
    Latents of Wan2.1 become colours without one."""
    return isinstance(cfg, TinyVAEConfig) or not cfg.wan_latents


def _text_stage(cfg: TextConfig, streamed: bool, mesh: Mesh | None) -> StagePlan:
    weights = STREAMED_LAYERS * layer_bytes(cfg) if streamed else weight_bytes("text", cfg, mesh)
    return StagePlan("text", "text", "text", weights, text_working(cfg, 1))


def _vae_stage(
    cfg: VAEConfig | TinyVAEConfig, size: VideoSize, *, encode: bool, tiled: bool, mesh: Mesh | None
) -> StagePlan:
    sides = (size.height // cfg.spatial, size.width // cfg.spatial)
    sides = tiling(*sides).size if tiled else sides
    stage = "vae encode" if encode else "vae decode"
    pixels = tuple(n * cfg.spatial for n in sides)
    if isinstance(cfg, TinyVAEConfig):
        kind, working = "tiny_vae", tiny_working(cfg, *pixels)
    else:
        latents = latents_at_once(mesh, *sides, size.latent_frames - 1)
        kind, working = "vae", vae_working(cfg, *pixels, encode=encode, latents=latents)
    if mesh is not None:
        working //= space_mesh(mesh, *sides).devices.shape[0]
    return StagePlan(stage, stage, "vae", weight_bytes(kind, cfg, mesh), working)


def memory_limit(device=None) -> int | None:
    """Bytes that JAX may use on the device; None where the backend does not say (CPU)."""
    stats = (device or jax.local_devices()[0]).memory_stats()
    return stats.get("bytes_limit") if stats else None


def fit_together(stages: tuple[StagePlan, ...], limit: int | None) -> bool:
    """Whether the device holds all weights and the largest stage beside them."""
    if limit is None:
        return True
    weights = {row.component: row.weights for row in stages}
    return sum(weights.values()) + max(row.working for row in stages) < USABLE * limit


def may_stage(
    working_stage: StagePlan, module, limit: int | None, *, streamed: bool = False
) -> bool:
    """Whether a module can be read into the host's memory while a stage runs: the host has room for
    it, and the device for what passes through it: the largest leaf twice (it is transposed there),
    or a block and what is not streamed. Not where the device does not report its memory: that is
    the host's own."""
    passing = 2 * max(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(module))
    if streamed:
        blocks = module_bytes(module.blocks)
        passing = module_bytes(module) - blocks + 3 * blocks // module.cfg.layers
    room = limit is not None and working_stage.total + passing < USABLE * limit
    return room and 1.2 * module_bytes(module) < host_available()


def host_available() -> int:
    """Bytes that the host could give to a process (Linux; 0 elsewhere)."""
    return _host("MemAvailable:")


def host_memory() -> int:
    """Bytes that the host has (Linux; 0 elsewhere)."""
    return _host("MemTotal:")


def _host(name: str) -> int:
    file = Path("/proc/meminfo")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), 0)


@contextlib.contextmanager
def naming(label: str, plan: ExecutionPlan, stage: str) -> Iterator[None]:
    """Within the block, running out of device memory becomes an OutOfMemory of that stage, which is
    told as `label`."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise out_of_memory(label, plan.of(stage), plan.limit) from error


def out_of_memory(label: str, row: StagePlan, limit: int | None) -> OutOfMemory:
    """Returns the error of a stage that ran out of device memory, with its estimate and the
    remedies in order."""
    usable = "unknown" if limit is None else f"{limit / GIB:.1f} GiB"
    return OutOfMemory(
        f"out of device memory in stage {label!r}",
        f"estimated need {row.total / GIB:.1f} GiB, of which weights {row.weights / GIB:.1f} GiB;"
        f" usable {usable}",
        "in this order: low_memory; a -quant file or `quant` int8; `transformer_device` stream;"
        " fewer frames or `resolution` 480p",
    )
