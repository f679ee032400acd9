"""Rows of the bench for single stages, with random weights: text encoder, VAE over whole clips,
denoising loop."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tdjax.checkpoints import orbax
from tdjax.config import (
    DiTConfig,
    SamplerConfig,
    TextConfig,
    TinyVAEConfig,
    VAEConfig,
    VideoSize,
)
from tdjax.models.linear import LINEAR
from tdjax.models.wan_dit import with_linear, with_low_rank, without_blocks
from tdjax.parallel.mesh import AXES
from tdjax.parallel.sharding import leaf_name, shardings
from tdjax.pipeline import compilation, memory, streaming
from tdjax.pipeline.adapters import filled_rank
from tdjax.pipeline.compilation import Program
from tdjax.pipeline.components import Component, PlannedComponent
from tdjax.pipeline.vae_coding import VAECoding
from tdjax.pipeline.vae_tiling import tiling
from tdjax.precision import FLOAT32
from tdjax.presets import TEACHER_SAMPLER
from tdjax.progress import Stages
from tdjax.sampling import few_step, schedules, unipc


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One measurement.

    ms, p10, p90: milliseconds of one call: median, 10th and 90th percentile.
    weights, working: bytes by XLA's count.
    error: relative L2 of the latents; psnr: dB of the frames that one VAE makes of them.
    ratio: how many times as long the original's 50 guided steps take as all steps of this row.
    device_peak, host_peak: of the process, so far.
    mesh: the devices that share the work, as `sp=4`; None for one. one: how many times as long one
          device takes for the same.
    """

    stage: str
    what: str
    mesh: str | None = None
    ms: float
    p10: float
    p90: float
    compile_s: float | None = None
    weights: int
    working: int
    error: float | None = None
    psnr: float | None = None
    ratio: float | None = None
    one: float | None = None
    device_peak: int | None = None
    host_peak: int | None = None


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def normal(key, scale, shape: tuple[int, ...], dtype):
    """The limits are for 8-bit dtypes."""
    return jnp.clip(scale * jax.random.normal(key, shape), -127, 127).astype(dtype)


def random_weights(module, seed: int = 0):
    """Values that keep variance, drawn on the device leaf by leaf: kernels by their fan-in, unit
    scales, zero biases."""
    scale_of = {kind.leaves[1]: kind.leaves[0] for kind in LINEAR.values() if len(kind.leaves) > 1}
    shapes = {name: leaf.shape for name, leaf in orbax.named_leaves(module).items()}

    def draw(path, leaf):
        name = leaf_name(path)
        key = jax.random.fold_in(jax.random.key(seed), math.prod(leaf.shape) % 2**31)
        stem, _, last = name.rpartition(".")
        values = f"{stem}.{scale_of.get(last)}"
        if leaf.dtype.itemsize == 1:  # deviation 32: of int8 and of float8 alike
            return normal(key, jnp.float32(32), leaf.shape, leaf.dtype)
        if values in shapes:  # of 8-bit weights [n o i]
            return jnp.full(leaf.shape, shapes[values][-1] ** -0.5 / 32, leaf.dtype)
        if last.endswith("scale"):
            return jnp.ones(leaf.shape, leaf.dtype)
        if name.endswith("bias") and not name.endswith("relative_bias"):
            return jnp.zeros(leaf.shape, leaf.dtype)
        return normal(key, jnp.float32(fan_in(leaf.shape, name) ** -0.5), leaf.shape, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, module)


def fan_in(shape: tuple[int, ...], name: str) -> int:
    return max(math.prod(shape[1 if name.startswith("blocks.") else 0 : -1]), 1)


def timed(call: Callable[[], object], repeats: int) -> list[float]:
    """Milliseconds of each of `repeats` calls, which return once all their work is done."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return times


def row_of(stage: str, what: str, times: list[float], **facts) -> Row:
    low, middle, high = np.percentile(times, (10, 50, 90)).tolist()
    return Row(stage=stage, what=what, ms=middle, p10=low, p90=high, **facts)


def measure(
    stage: str,
    what: str,
    function,
    module,
    *args,
    repeats: int,
    per: int = 1,
    mesh: Mesh | None = None,
) -> tuple[Row, Any]:
    """Compiles, warms up and times `repeats` calls of function(module, *args); times are divided by
    `per`. On a mesh the module lies as `placed` has it. Returns (row, last output)."""
    compiler = compilation.Programs(Stages(show=False), mesh)
    args = compiler.place(args)
    start = time.perf_counter()
    run = compiler.request(stage, function, module, *args).wait()
    compile_s = time.perf_counter() - start
    call = lambda: jax.block_until_ready(run(module, *args))
    out = call()
    times = [ms / per for ms in timed(call, repeats)]
    weights = device_share(module)
    working = max(compiler.memory().values()) - weights
    row = row_of(stage, what, times, compile_s=compile_s, weights=weights, working=working)
    return dataclasses.replace(row, mesh=mesh_label(mesh)), out


def placed(module, mesh: Mesh | None):
    """The module on one device as a pipeline has it on a mesh."""
    if mesh is None:
        return module
    return jax.block_until_ready(jax.device_put(module, shardings(module, mesh)))


def device_share(module) -> int:
    """Bytes of a module on each device."""
    shards = (leaf.sharding.shard_shape(leaf.shape) for leaf in jax.tree.leaves(module))
    sizes = (leaf.dtype.itemsize for leaf in jax.tree.leaves(module))
    return sum(math.prod(shape) * size for shape, size in zip(shards, sizes, strict=True))


def mesh_label(mesh: Mesh | None) -> str | None:
    """Returns a mesh as users write it."""
    if mesh is None:
        return None
    names = {axis: name for name, axis in AXES.items()}
    return ",".join(f"{names[axis]}={size}" for axis, size in mesh.shape.items())


def text_rows(cfg: TextConfig, repeats: int) -> Iterator[Row]:
    ids = jnp.ones((1, cfg.text_len), jnp.int32)
    encoder = random_weights(orbax.abstract("text", cfg))
    what = f"{cfg.text_len} tokens"
    yield measure("text", what, compilation.encode_text, encoder, ids, ids, repeats=repeats)[0]
    block = jax.tree.map(lambda leaf: leaf[0], encoder.blocks)
    del encoder
    x = jnp.zeros((1, cfg.text_len, cfg.dim), cfg.policy.compute_dtype)
    what = f"one layer of {cfg.layers}, streamed"
    yield measure("text", what, compilation.text_layer, block, x, ids, repeats=repeats)[0]


# -- VAE -------------------------------------------------------------------------------------------


def vae_rows(
    cfg: VAEConfig | TinyVAEConfig, size: VideoSize, repeats: int, mesh: Mesh | None = None
) -> Iterator[Row]:
    """Whole clips chunk by chunk, their latents and frames arriving on the host, as the pipeline
    runs them."""
    tiny = isinstance(cfg, TinyVAEConfig)
    component = PlannedComponent("vae", "tiny_vae" if tiny else "vae", cfg)
    component.mesh = mesh
    vae = placed(random_weights(orbax.abstract(component.kind, cfg)), mesh)
    clip = f"{size.frames} frame" + "s" * (size.frames > 1) + ", small decoder" * tiny
    image = np.zeros((1, 1, size.height, size.width, 3), np.float32)
    latents = np.random.default_rng(0).standard_normal(
        (1, *size.latent_grid, cfg.latent_channels), np.float32
    )

    def encode(coding: VAECoding) -> None:
        coding.encode(vae, image, size)

    def decode(coding: VAECoding, tiled: bool = False) -> None:
        for _ in coding.decode(vae, latents, "uint8", tiled):
            pass

    row = functools.partial(clip_row, component=component, repeats=repeats)
    if not tiny:
        yield row("vae encode", clip, programs=lambda coding: coding.encoder(size), run=encode)
    decoder = lambda coding: coding.decoder(latents.shape, "uint8")
    yield row("vae decode", clip, programs=decoder, run=decode)
    tiles = tiling(*latents.shape[2:4])
    if len(tiles.corners) > 1 and mesh is None and not tiny:
        height, width = (n * cfg.spatial for n in tiles.size)
        what = f"{clip}, tiles of {width}x{height}"
        decoder = lambda coding: coding.decoder(latents.shape, "uint8", tiled=True)
        in_tiles = lambda coding: decode(coding, True)
        yield row("vae decode", what, programs=decoder, run=in_tiles)


def clip_row(
    stage: str,
    what: str,
    *,
    component: Component,
    programs: Callable[[VAECoding], list[Program]],
    run: Callable[[VAECoding], None],
    repeats: int,
) -> Row:
    """programs(coding) are those that run(coding) takes a clip through."""
    stages = Stages(show=False)
    coding = VAECoding(compilation.Programs(stages, component.mesh), component, stages)
    start = time.perf_counter()
    for program in programs(coding):
        program.wait()
    compile_s = time.perf_counter() - start
    run(coding)
    weights = memory.module_bytes(component.abstract())
    working = max(coding.compiler.memory().values()) - weights
    times = timed(lambda: run(coding), repeats)
    return row_of(
        stage,
        what,
        times,
        compile_s=compile_s,
        weights=weights,
        working=working,
        host_peak=host_peak(stages),
        mesh=mesh_label(component.mesh),
    )


def host_peak(stages: Stages) -> int | None:
    """The highest of its stages: each of them begins the system's counter anew."""
    return max((row.host_peak for row in stages.rows if row.host_peak), default=None)


# -- transformer -----------------------------------------------------------------------------------


def variants(cfg: DiTConfig, args) -> list[DiTConfig]:
    """One config for each kind of attention and of linear layer."""
    kinds = [
        {"attention": attention, "linear": linear}
        for attention in args.attention
        for linear in args.linear
    ]
    return [dataclasses.replace(cfg, impl=args.impl, **kind) for kind in kinds]


def dit_rows(
    cfg: DiTConfig, vae: VAEConfig, size: VideoSize, args, mesh: Mesh | None = None
) -> Iterator[Row]:
    """One row for each of `variants`: a whole loop of steps in one program, given per step. The
    original comes first: others are compared with it."""
    original = None
    decode = decoder(vae) if args.error else None
    if args.teacher:
        dense = dataclasses.replace(cfg, attention="dense", linear="float", impl=args.impl)
        one = dataclasses.replace(TEACHER_SAMPLER, num_steps=1)
        original = denoise_row(dense, size, one, args, mesh=mesh)
        yield original
    for changed in variants(cfg, args):
        sampler = SamplerConfig(num_steps=args.num_steps)
        if args.stream:
            yield streamed_row(changed, size, sampler, args.repeats)
            continue
        row = denoise_row(changed, size, sampler, args, decode, mesh)
        if original is not None:
            whole = TEACHER_SAMPLER.num_steps * original.ms
            row = dataclasses.replace(row, ratio=whole / (args.num_steps * row.ms))
        yield row
        if args.lora and changed.linear != "float":
            yield denoise_row(changed, size, sampler, args, mesh=mesh, lora=args.lora)


def streamed_row(cfg: DiTConfig, size: VideoSize, sampler: SamplerConfig, repeats: int) -> Row:
    """A step whose blocks pass through the device from page-locked memory of the host. weights are
    those on the device at a time."""
    compiler = compilation.Programs(Stages(show=False))
    key, dtype = jax.random.key(2), cfg.policy.compute_dtype
    shape = (1, *size.latent_grid, cfg.out_channels)
    noise = compilation.start_noise(jax.random.key(1), sampler.num_steps, shape)
    times = jnp.asarray(schedules.times(sampler))
    text = jax.random.normal(key, (1, cfg.text_len, cfg.text_dim)).astype(dtype)
    image = jnp.zeros((*shape[:-1], cfg.condition_channels)) if cfg.condition_channels else None
    schedule = (few_step.injected(noise)[:1], times[:2])
    model = random_streamed(cfg)
    inputs = few_step.start(noise[0], times), text, image, schedule
    start = time.perf_counter()
    runs = compiler.wait(streaming.programs(compiler, model, sampler, *inputs))
    compile_s = time.perf_counter() - start
    state, *others = inputs
    call = lambda: jax.block_until_ready(streaming.step(runs, model, jnp.copy(state), *others))
    call()
    counted, block = compiler.memory(), memory.module_bytes(model.blocks[0])
    outer = memory.module_bytes(model.outer)
    beside = {"step_begin": outer, "step_block": block, "step_end": outer}
    return row_of(
        "step",
        f"{label(cfg)}, blocks streamed",
        timed(call, repeats),
        compile_s=compile_s,
        weights=outer + memory.STREAMED_BLOCKS * block,
        working=max(counted[name] - weights for name, weights in beside.items()),
    )


def random_streamed(cfg: DiTConfig) -> streaming.Streamed:
    """A transformer of random weights, drawn a block at a time, whose blocks wait in the host's
    memory."""
    one = random_weights(orbax.abstract("dit", dataclasses.replace(cfg, layers=1)))
    block = jax.tree.map(lambda leaf: leaf[0], one.blocks)
    blocks = [jax.device_put(block, streaming.waiting()) for _ in range(cfg.layers)]
    structure = jax.tree.structure(without_blocks(orbax.abstract("dit", cfg)))
    outer = jax.tree.unflatten(structure, jax.tree.leaves(without_blocks(one)))
    return streaming.Streamed(outer, tuple(blocks))


def denoise_row(
    cfg: DiTConfig,
    size: VideoSize,
    sampler: SamplerConfig,
    args,
    decode: Callable | None = None,
    mesh: Mesh | None = None,
    lora: int = 0,
) -> Row:
    """decode: if the error is asked for, see `decoder`. lora: rank of the factors beside all
    layers of 8 bits; 0 for none."""
    shape = (1, *size.latent_grid, cfg.out_channels)
    noise = compilation.start_noise(jax.random.key(1), sampler.num_steps, shape)
    text = jax.random.normal(jax.random.key(2), (1, cfg.text_len, cfg.text_dim)).astype(
        cfg.policy.compute_dtype
    )
    image = jnp.zeros((*shape[:-1], cfg.condition_channels)) if cfg.condition_channels else None
    model = random_weights(orbax.abstract("dit", cfg))
    model = placed(with_random_lora(model, lora) if lora else model, mesh)
    if sampler.few_step:
        times = jnp.asarray(schedules.times(sampler))
        state, rows = few_step.start(noise[0], times), (few_step.injected(noise), times)
        run = lambda model, *a: compilation.denoise(model, *a, sampler=sampler.sampler)
        what = label(cfg) + (f", LoRA of rank {lora}" if lora else "")
    else:
        state = few_step.teacher_start(noise[0])
        rows = jax.tree.map(jnp.asarray, unipc.step_coefficients(sampler))
        text = jnp.concatenate([text, text])
        run = lambda model, *a: compilation.denoise_guided(
            model, *a, guidance_scale=sampler.guidance_scale
        )
        what = "original step: dense, float, guided"
    row, (out, _) = measure(
        "step",
        what,
        run,
        model,
        state,
        text,
        image,
        rows,
        repeats=args.repeats,
        per=sampler.num_steps,
        mesh=mesh,
    )
    if decode is None:
        return row
    here = jax.devices()[0]
    model = jax.device_put(in_float32(model, cfg), here)  # the measured weights go before these run
    truth, _ = jax.jit(run)(model, state, text.astype(jnp.float32), image, rows)
    del model
    out, truth = np.asarray(out, np.float32), np.asarray(truth, np.float32)
    error = float(np.linalg.norm(out - truth) / np.linalg.norm(truth))
    return dataclasses.replace(row, error=error, psnr=psnr(decode(out), decode(truth)))


def with_random_lora(model, rank: int):
    """A model of 8-bit layers with small random factors beside each of them, their rank filled up
    as that of a file."""
    rank = filled_rank(rank)
    values, key = LINEAR[model.cfg.linear].leaves[0], jax.random.key(3)
    dtype, factors = model.cfg.policy.param_dtype, {}
    for name, leaf in orbax.named_leaves(model).items():
        layer, _, last = name.rpartition(".")
        if last == values and layer.startswith("blocks."):
            n, o, i = leaf.shape
            down = normal(key, jnp.float32(i**-0.5), (n, rank, i), dtype)
            factors[layer] = down, normal(key, jnp.float32(0.01), (n, o, rank), dtype)
    return with_low_rank(model, factors)


def decoder(cfg: VAEConfig) -> Callable[[np.ndarray], Iterator[np.ndarray]]:
    """Latents f32 [1 t h w c] -> chunks of frames f32 [t H W 3] in [0, 1], by a VAE with random
    weights: what it makes of differences ranks variants, and says little of a real video."""
    component, stages = PlannedComponent("vae", "vae", cfg), Stages(show=False)
    vae = random_weights(component.abstract())
    coding = VAECoding(compilation.Programs(stages), component, stages)
    return lambda latents: (frames for frames, _ in coding.decode(vae, latents, "float"))


def psnr(chunks: Iterator[np.ndarray], others: Iterator[np.ndarray]) -> float:
    """dB between two clips; infinity for the same frames."""
    errors = [
        np.square(x - y, dtype=np.float64).mean((1, 2, 3))
        for x, y in zip(chunks, others, strict=True)
    ]
    mean = float(np.concatenate(errors).mean())
    return -10 * math.log10(mean) if mean else math.inf


def label(cfg: DiTConfig) -> str:
    return f"{cfg.attention}, {cfg.linear}"


def in_float32(model, cfg: DiTConfig):
    """The same weights in a model of references, all float32, with dense or sparse-linear
    attention."""
    attention = "dense" if cfg.attention == "dense" else "sla"
    exact = dataclasses.replace(
        cfg, attention=attention, linear="float", impl="reference", policy=FLOAT32
    )
    leaves = orbax.named_leaves(with_linear(model, "float"))
    return orbax.assemble(
        orbax.abstract("dit", exact),
        {name: leaf.astype(jnp.float32) for name, leaf in leaves.items()},
    )
