"""What a run needs, before anything is loaded: memory of a device of its mesh, and room on disk."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tdjax.checkpoints import demo, orbax
from tdjax.config import DiTConfig
from tdjax.errors import UsageError
from tdjax.parallel.mesh import AXES, every_device, parse_mesh, refuse_axis
from tdjax.parallel.sharding import RULES, TOKENS
from tdjax.pipeline.components import open_component
from tdjax.pipeline.decoding import size_of
from tdjax.pipeline.load import plan_pipeline
from tdjax.pipeline.memory import GIB, dit_working, memory_limit
from tdjax.pipeline.request import Request
from tdjax.presets import PRESETS
from tdjax.train import cost, partial, placement, report
from tdjax.train.configs import RunConfig
from tdjax.train.loop import Schedule
from tdjax.train.methods import method
from tdjax.train.networks import frozen, trained
from tdjax.train.samples import OPTIONS, check_network, opened, samplers
from tdjax.train.sources import ShardSource
from tdjax.train.state import Teacher
from tdjax.train.step import check_parts
from tdjax.train.storage import find_shards
from tdjax.train.turns import TEACHER

_SIZE_480P = (60, 104)  # rows and columns of latents


def accumulate(batch: int, groups: int, per_device: int | None) -> int:
    """Returns in how many parts a batch is computed, so that each of `groups` of devices has at
    most `per_device` samples at a time; 1 where that is None. Raises UsageError where `groups` do
    not divide the batch."""
    check_batch(batch, groups)
    own = batch // groups
    if per_device is None:
        return 1
    return own // max(n for n in range(1, min(per_device, own) + 1) if own % n == 0)


def check_batch(batch: int, groups: int) -> None:
    """Raises UsageError unless each of `groups` of devices gets as many samples of a batch."""
    if batch % groups:
        raise UsageError(
            f"data.batch is {batch}",
            f"run.mesh divides it over dp x fsdp = {groups}",
            f"use a multiple of {groups}",
        )


def groups(sizes: Mapping[str, int]) -> int:
    """Returns over how many groups of devices the samples of a batch are divided, from the sizes of
    a mesh's axes."""
    return math.prod(sizes.get(axis, 1) for axis in RULES["batch"])


def axes_of(mesh: str) -> dict[str, int]:
    """Returns a mesh of training as `parse_mesh` does. Raises UsageError for one of generation."""
    axes = parse_mesh(mesh)
    why = "it divides guided steps of generation; a batch is divided by fsdp and dp"
    refuse_axis("cfg", axes, why)
    return axes


def lines(name: str, config: dict[str, Any]) -> list[str]:
    """Returns what `--dry_run` says of a run's needs. name: of the method."""
    run, data, model, loss = (config[part] for part in ("run", "data", "model", "loss"))
    mesh = every_device("fsdp") if run.mesh == "auto" else run.mesh
    sizes = {AXES[axis]: size for axis, size in axes_of(mesh).items()} if mesh else {}
    devices, apart = math.prod(sizes.values()), groups(sizes)
    stored = _stored(model)
    if stored is None:
        return [f"memory: known when {model.weights} is here"]
    student, teacher = trained(stored, model), frozen(stored, model)
    chosen = partial.select(student, config["optimizer"].train, model.lora)
    way = method(name, config)
    state = jax.eval_shape(way.create, partial.shapes(student, chosen))
    of_teacher = 0
    if name != "flow" or chosen is not None:
        of_teacher = _bytes(Teacher(model=orbax.abstract("dit", teacher)), sizes)
    parts = loss.accumulate
    check_batch(data.batch, apart)
    check_parts(data.batch, parts)
    if parts == 1:
        parts = accumulate(data.batch, apart, data.per_device)
    gradients = _bytes(state.model, sizes) * (1 if parts == 1 else 2)  # of a part, and their sum
    samples = math.ceil(data.batch / apart / parts)
    kept = samples * _kept(student, data) // sizes.get(TOKENS, 1) * (model.remat != "offload")
    held = _bytes(state, sizes)
    waiting = []  # bytes of state and of teacher that wait on the host, for each phase
    for names in way.unused.values():
        own = sum(_bytes(getattr(state, x), sizes) for x in names if x != TEACHER)
        waiting.append((own, of_teacher if TEACHER in names and chosen is None else 0))
    away, without = min(waiting, key=sum, default=(0, 0))
    # Of a checkpoint and of samples all is on the device, without what a step works with.
    most = max(held + of_teacher, held - away + of_teacher - without + gradients + kept)
    spared = held + of_teacher + gradients + kept - most
    rows = {
        "weights, average and moments": held,
        "teacher" if chosen is None else "frozen weights": of_teacher,
        "gradients": gradients,
        f"inputs of blocks, {samples} clip{'s' * (samples > 1)} at a time": kept,
        "of these on the host, in the turn with the most": -spared,
    }
    limit = memory_limit()
    usable = "" if limit is None else f"; usable here: {limit / GIB:.1f} GiB"
    whole = whole_bytes(state)
    floats = dataclasses.replace(frozen(stored, model), linear="float")
    exported = whole_bytes(orbax.abstract("dit", floats))
    run = bounded(run, whole)
    disk = room(run, whole, exported)
    return [
        f"each of {devices} devices ({mesh or 'no mesh'}), before what a block computes with:",
        *(f"  {n / GIB:8.2f} GiB  {what}" for what, n in rows.items() if n),
        f"  {sum(rows.values()) / GIB:8.2f} GiB  together{usable}",
        f"batch: {data.batch} clips, in {parts} part{'s' * (parts > 1)}",
        f"disk: {disk / GIB:.1f} GiB in run.folder (at most {_checkpoints(run)} checkpoints of"
        f" {whole / GIB:.1f}, and the weights twice)",
        f"host: {whole / GIB:.1f} GiB for the copy of the state that a checkpoint is written from",
        *_host(max(map(sum, waiting), default=0), sizes),
        *_samples(name, config, student, sizes),
        _hours(name, config, way.schedule, (student, teacher), chosen is None, devices),
    ]


def _hours(
    name: str,
    config: dict[str, Any],
    schedule: Schedule,
    networks: tuple[DiTConfig, DiTConfig],
    whole: bool,
    devices: int,
) -> str:
    """A line on how long a run of Wan's sizes takes, by its FLOPs and the rate of a measured step.
    networks: student and teacher."""
    run, data = config["run"], config["data"]
    if config["model"].weights.lower() not in PRESETS:
        return "hours: not known for a network of this size (docs/training.md has measured steps)"
    grid = _grid(networks[0], data)
    student, teacher = (cost.forward_flops(cfg, grid, cfg.text_len) for cfg in networks)
    each = cost.step_flops(name, config["loss"], student, teacher, whole)
    work = report.Work(flops=each, warmup=schedule.warmup)
    steps = range(run.steps)
    flops = sum(work.of_step(schedule.phase(i), i + 1) for i in steps) * data.batch
    hours = flops / (cost.MEASURED_TFLOPS * cost.TERA) / 3600
    over = f", {hours / devices:,.1f} on {devices}" if devices > 1 else ""
    return (
        f"hours: {hours:,.1f} on one H200{over}, of {run.steps} steps: {flops / 1e18:,.0f} EFLOP at"
        f" the {cost.MEASURED_TFLOPS:.0f} TFLOP/s of a step of sla-1.3b there, without what devices"
        " exchange"
    )


def _host(waiting: int, sizes: Mapping[str, int]) -> list[str]:
    """A line on what waits in the host's memory, page-locked, for all devices of the mesh."""
    if not waiting:
        return []
    devices = math.prod(sizes.values())
    text = f"{waiting / GIB:.1f} GiB page-locked beside that for each device"
    together = f", {devices * waiting / GIB:.1f} for all {devices}" if devices > 1 else ""
    return [f"host: {text}{together}, of what a turn does not use"]


def _samples(
    name: str, config: dict[str, Any], student: DiTConfig, sizes: Mapping[str, int]
) -> list[str]:
    """A line on what samples of the run itself take on a device, if it makes some."""
    cfg = config["sample"]
    if not cfg.prompts:
        return []
    check_network(config, student)
    model = (cfg.model or config["model"].weights).lower()
    pipe = plan_pipeline(model, OPTIONS) if model in PRESETS else opened(config)
    grid = (*_grid(student, config["data"]), student.out_channels)
    size = size_of((1, *grid), pipe.components["vae"].config)
    request = Request(prompts=("",), size=size, sampler=samplers(name, config, pipe)[0])
    stages = {row.stage: row.total / GIB for row in pipe.plan(request)}
    network = dit_working(student, size, 1, sizes) / GIB
    text = (
        "" if cfg.prompts.endswith(".safetensors") else f"; before all, text {stages['text']:.2f}"
    )
    return [
        f"samples every {cfg.every} steps, beside what is there: {network:.2f} GiB for the"
        f" network, then {stages['vae decode']:.2f} for the VAE{text}"
    ]


def whole_bytes(tree) -> int:
    """Returns the bytes of all leaves of a state or network, over all devices together."""
    return _bytes(tree, {})


def bounded(run: RunConfig, size: int) -> RunConfig:
    """Returns a run's config whose `keep` is as low as its `keep_gib` asks for. size: bytes of a
    checkpoint. Raises UsageError where not even two of them may be there."""
    if run.keep_gib is None:
        return run
    count = int(run.keep_gib * GIB // size) - 1
    if count < 1:
        raise UsageError(
            f"run.keep_gib is {run.keep_gib:g}",
            f"a checkpoint is {size / GIB:.3g} GiB, and one stays while the next is written",
            f"give at least {2.01 * size / GIB:.3g}",
        )
    return dataclasses.replace(run, keep=min(run.keep or count, count))


def _checkpoints(run: RunConfig) -> int:
    """How many checkpoints of a run there are at most: those that stay, and the one that is being
    written."""
    saved = math.ceil(run.steps / run.save_every)
    return min(run.keep + 1, saved) if run.keep else saved


def room(run: RunConfig, size: int, exported: int) -> int:
    """Returns the bytes of disk that a run takes at most. size: of a checkpoint. exported: of the
    weights, which are there twice while they are written anew."""
    return size * _checkpoints(run) + 2 * exported


def _stored(model) -> DiTConfig | None:
    """The config of the weights that a run begins with; None where they are not here."""
    if not model.weights:
        return model.dit
    if model.weights.lower() in PRESETS:
        return PRESETS[model.weights.lower()].config
    path = demo.folder() if model.weights == "demo" else Path(model.weights).expanduser()
    inside = path / "dit"
    path = inside if inside.is_dir() else path
    return open_component(path, "dit").stored if path.exists() else None


def _bytes(tree, sizes: Mapping[str, int]) -> int:
    """Bytes of all leaves on one device of a mesh with axes of these sizes."""

    def size(leaf, lies) -> int:
        over = [axes if isinstance(axes, tuple) else (axes,) for axes in lies if axes]
        parts = math.prod(sizes[axis] for axes in over for axis in axes)
        item = 8 if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf.dtype.itemsize
        return leaf.size * item // parts

    return sum(jax.tree.leaves(jax.tree.map(size, tree, placement.specs(tree, sizes))))


def _kept(cfg: DiTConfig, data) -> int:
    """Bytes of one clip's inputs of all blocks, which the gradient starts from again."""
    patches = (n // p for n, p in zip(_grid(cfg, data), cfg.patch, strict=True))
    item = np.dtype(cfg.policy.compute).itemsize
    return cfg.layers * math.prod(patches) * cfg.dim * item


def _grid(cfg: DiTConfig, data) -> tuple[int, int, int]:
    """(t, h, w) of the latents of a clip: the largest of the data's; without data it has 480p."""
    rows, columns = _SIZE_480P
    if cfg.out_channels != 16:
        rows = columns = 8
    if data.path and find_shards(Path(data.path)):
        source = ShardSource(
            data.path,
            frames=data.frames,
            channels=cfg.out_channels,
            text_dim=cfg.text_dim,
            blank=data.grid,
        )
        sides = (shape[2:] for shape in source.latent_shapes.values())
        rows, columns = max(sides, key=math.prod)
    return data.frames, rows, columns


def with_parts(loss, parts: int):
    """Returns a loss's config that computes a batch in this many parts; a number that was given
    stays."""
    return dataclasses.replace(loss, accumulate=parts) if loss.accumulate == 1 else loss
