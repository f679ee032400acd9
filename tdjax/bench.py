"""`python -m tdjax.bench`: every stage of generation at real size with random weights, in one process, as one table.

Speed does not depend on the values, so no checkpoint is needed. With --error each denoising row also gives the relative L2 of its
latents to those of the same weights and noise in float32, with dense or sparse-linear attention in reference form.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import platform
import sys
import time
from pathlib import Path

from tdjax.config import ATTENTION, LINEAR, PRESETS, TEACHER_SAMPLER, DiTConfig, SamplerConfig, TextConfig, VAEConfig, VideoSize
from tdjax.errors import TdjaxError, UsageError
from tdjax.precision import FLOAT32, FLOATS, Policy
from tdjax.resolution import choose_size

STAGES = ("text", "vae", "dit")
GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One measurement. Milliseconds of one call: median, 10th and 90th percentile; bytes by XLA's count; error: relative L2."""

    stage: str
    what: str
    ms: float
    p10: float
    p90: float
    compile_s: float
    weights: int
    working: int
    error: float | None = None


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tdjax.bench", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="turbowan2.1-t2v-1.3b-480p", choices=("demo", *PRESETS), metavar="PRESET", help="or demo")
    parser.add_argument("--size", help="480p, 720p or WIDTHxHEIGHT; default: the preset's")
    parser.add_argument("--num_frames", "--num-frames", type=int, help="default 81 (demo: 33)")
    parser.add_argument("--num_steps", "--num-steps", type=int, default=4)
    parser.add_argument("--stage", choices=("all", *STAGES), default="all")
    parser.add_argument("--attention", default="dense,sla,sagesla", help="comma list of " + ", ".join(ATTENTION))
    parser.add_argument("--linear", default="float,int8", help="comma list of " + ", ".join(LINEAR))
    parser.add_argument("--impl", default="auto", help="implementation of every op: auto, reference, triton; or of attention alone: cudnn")
    parser.add_argument("--dtype", choices=FLOATS, help="of weights and computation; default: the model's own (demo: float32)")
    parser.add_argument("--teacher", action="store_true", help="also the original: 50 guided steps, dense, one step timed")
    parser.add_argument("--error", action="store_true", help="also the error of each denoising row (a float32 run: slow at real size)")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", metavar="FILE", help="append one JSON line for each row")
    return parser.parse_args(argv)


def chosen(text: str, allowed: tuple[str, ...], flag: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    for name in names:
        if name not in allowed:
            raise UsageError(f"--{flag} has {name!r}", f"allowed: {', '.join(allowed)}", f"use --{flag} {','.join(allowed)}")
    return names


def configs(args) -> tuple[DiTConfig, VAEConfig, TextConfig, VideoSize]:
    """What the model of that name is made of, and the size of its video."""
    if args.model == "demo":
        from tdjax.train.tiny import configs as demo

        dit, vae, text, size = demo.DIT_SLA, demo.VAE, demo.TEXT, demo.SIZE
    else:
        preset = PRESETS[args.model]
        dit, vae, text, size = preset.config, VAEConfig(), TextConfig(), choose_size(resolution=args.size or preset.resolution)
    if args.model == "demo" and args.size:
        raise UsageError("--size with --model demo", "the demo model makes 64x64", "leave --size away")
    if args.dtype:
        policy = Policy(param=args.dtype, compute=args.dtype)
        dit, vae, text = (dataclasses.replace(cfg, policy=policy) for cfg in (dit, vae, text))
    return dit, vae, text, dataclasses.replace(size, frames=args.num_frames) if args.num_frames else size


def random_weights(module, seed: int = 0):
    """Values that keep variance, drawn on the device leaf by leaf: kernels by their fan-in, unit scales, zero biases."""
    import jax
    import jax.numpy as jnp

    from tdjax.linear import LINEAR
    from tdjax.sharding import leaf_name

    scale_of = {kind.leaves[1]: kind.leaves[0] for kind in LINEAR.values() if len(kind.leaves) > 1}
    shapes = {leaf_name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(module)}
    normal = lambda key, leaf: jax.random.normal(key, leaf.shape)

    def draw(path, leaf):
        name, key = leaf_name(path), jax.random.fold_in(jax.random.key(seed), math.prod(leaf.shape) % 2**31)
        stem, _, last = name.rpartition(".")
        values = f"{stem}.{scale_of.get(last)}"
        if leaf.dtype.itemsize == 1:  # deviation 32: of int8 and of float8 alike
            return jax.jit(lambda key: jnp.clip(32 * normal(key, leaf), -127, 127).astype(leaf.dtype))(key)
        if values in shapes:  # of 8-bit weights [n o i]
            return jnp.full(leaf.shape, shapes[values][-1] ** -0.5 / 32, leaf.dtype)
        if last.endswith("scale"):
            return jnp.ones(leaf.shape, leaf.dtype)
        if name.endswith("bias") and not name.endswith("relative_bias"):
            return jnp.zeros(leaf.shape, leaf.dtype)
        return jax.jit(lambda key: (normal(key, leaf) * fan_in(leaf.shape, name) ** -0.5).astype(leaf.dtype))(key)

    return jax.tree_util.tree_map_with_path(draw, module)


def fan_in(shape: tuple[int, ...], name: str) -> int:
    return max(math.prod(shape[1 if name.startswith("blocks.") else 0 : -1]), 1)


def measure(stage: str, what: str, function, module, *args, repeats: int, per: int = 1) -> tuple[Row, object]:
    """Compile, warm up, time `repeats` calls of function(module, *args); times are divided by `per`. -> (row, last output)"""
    import jax
    import numpy as np

    start = time.perf_counter()
    run = jax.jit(function).lower(module, *args).compile()
    compile_s = time.perf_counter() - start
    out = jax.block_until_ready(run(module, *args))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        out = jax.block_until_ready(run(module, *args))
        times.append(1e3 * (time.perf_counter() - start) / per)
    memory, weights = run.memory_analysis(), sum(leaf.nbytes for leaf in jax.tree.leaves(module))
    total = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    low, middle, high = np.percentile(times, (10, 50, 90))
    row = Row(stage=stage, what=what, ms=middle, p10=low, p90=high, compile_s=compile_s, weights=weights, working=total - weights)
    return row, out


def text_rows(cfg: TextConfig, repeats: int):
    import jax
    import jax.numpy as jnp

    from tdjax import checkpoint, programs

    ids = jnp.ones((1, cfg.text_len), jnp.int32)
    encoder = random_weights(checkpoint.abstract("text", cfg))
    yield measure("text", f"{cfg.text_len} tokens", programs.encode_text, encoder, ids, ids, repeats=repeats)[0]
    block = jax.tree.map(lambda leaf: leaf[0], encoder.blocks)
    del encoder
    x = jnp.zeros((1, cfg.text_len, cfg.dim), cfg.policy.compute_dtype)
    yield measure("text", f"one layer of {cfg.layers}, streamed", programs.text_layer, block, x, ids, repeats=repeats)[0]


def vae_rows(cfg: VAEConfig, size: VideoSize, dit: DiTConfig, repeats: int):
    import jax
    import jax.numpy as jnp

    from tdjax import checkpoint, programs

    vae = random_weights(checkpoint.abstract("vae", cfg))
    video = jnp.zeros((1, 1 + cfg.temporal, size.height, size.width, 3))
    latents = jax.random.normal(jax.random.key(0), (1, 2, *size.latent_grid[1:], dit.out_channels))
    rest = size.latent_grid[0] - 1
    first, later = "first frame", f"chunk of {cfg.temporal} frames (one of {rest})"
    decode_first = functools.partial(programs.decode_first, output="uint8")
    decode_later = functools.partial(programs.decode_later, output="uint8")
    row, (_, cache) = measure("vae encode", first, programs.encode_first, vae, video[:, :1], repeats=repeats)
    yield row
    yield measure("vae encode", later, programs.encode_later, vae, cache, video[:, 1:], repeats=repeats)[0]
    row, (_, _, cache) = measure("vae decode", first, decode_first, vae, latents[:, :1], repeats=repeats)
    yield row
    yield measure("vae decode", later, decode_later, vae, cache, latents[:, 1:], repeats=repeats)[0]


def dit_rows(cfg: DiTConfig, size: VideoSize, args):
    """One row for each kind of attention and of linear layer: a whole loop of steps in one program, given per step."""
    kinds, linears = chosen(args.attention, ATTENTION, "attention"), chosen(args.linear, LINEAR, "linear")
    for attention in kinds:
        for linear in linears:
            changed = dataclasses.replace(cfg, attention=attention, linear=linear, impl=args.impl)
            yield denoise_row(changed, size, SamplerConfig(steps=args.num_steps), args)
    if args.teacher:
        dense = dataclasses.replace(cfg, attention="dense", linear="float", impl=args.impl)
        yield denoise_row(dense, size, dataclasses.replace(TEACHER_SAMPLER, steps=1), args)


def denoise_row(cfg: DiTConfig, size: VideoSize, schedule: SamplerConfig, args) -> Row:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from tdjax import checkpoint, flow, programs, sampler, teacher

    shape = (1, *size.latent_grid, cfg.out_channels)
    noise = programs.start_noise(jax.random.key(1), schedule.steps, shape)
    text = jax.random.normal(jax.random.key(2), (1, cfg.text_len, cfg.text_dim)).astype(cfg.policy.compute_dtype)
    image = jnp.zeros((*shape[:-1], cfg.condition_channels)) if cfg.condition_channels else None
    model = random_weights(checkpoint.abstract("dit", cfg))
    if schedule.few_step:
        times = jnp.asarray(flow.times(schedule))
        state, rows = sampler.start(noise[0], times), (sampler.injected(noise), times)
        run = lambda model, *a: programs.denoise(model, *a, mode=schedule.mode)
        what = f"{cfg.attention}, {cfg.linear}"
    else:
        state, rows = sampler.teacher_start(noise[0]), jax.tree.map(jnp.asarray, teacher.rows(schedule))
        text = jnp.concatenate([text, text])
        run = lambda model, *a: programs.denoise_guided(model, *a, guidance=schedule.guidance)
        what = "original step: dense, float, guided"
    row, (out, _) = measure("step", what, run, model, state, text, image, rows, repeats=args.repeats, per=schedule.steps)
    if not (args.error and schedule.few_step):
        return row
    exact = dataclasses.replace(
        cfg, attention="dense" if cfg.attention == "dense" else "sla", linear="float", impl="reference", policy=FLOAT32
    )
    leaves = checkpoint.names(as_float(model, cfg))
    model = checkpoint.assemble(checkpoint.abstract("dit", exact), {name: leaf.astype(jnp.float32) for name, leaf in leaves.items()})
    truth, _ = jax.jit(run)(model, state, text.astype(jnp.float32), image, rows)
    out, truth = np.asarray(out, np.float64), np.asarray(truth, np.float64)
    return dataclasses.replace(row, error=float(np.linalg.norm(out - truth) / np.linalg.norm(truth)))


def as_float(model, cfg: DiTConfig):
    from tdjax.models.wan_dit import with_linear

    return with_linear(model, "float") if cfg.linear != "float" else model


def machine() -> dict[str, str]:
    import jax

    device = jax.devices()[0]
    return {"device": device.device_kind, "jax": jax.__version__, "python": platform.python_version(), "date": time.strftime("%Y-%m-%d")}


def table(rows: list[Row]) -> str:
    lines = [f"{'stage':11} {'what':36} {'ms':>9} {'p10':>9} {'p90':>9} {'compile s':>10} {'weights':>10} {'working':>10} {'error':>9}"]
    for r in rows:
        error = "" if r.error is None else f"{r.error:.2e}"
        memory = f"{r.weights / GIB:6.2f} GiB {r.working / GIB:6.2f} GiB"
        lines.append(f"{r.stage:11} {r.what:36} {r.ms:9.2f} {r.p10:9.2f} {r.p90:9.2f} {r.compile_s:10.1f} {memory} {error:>9}")
    return "\n".join(lines)


def run(args) -> int:
    dit, vae, text, size = configs(args)
    if args.repeats < 1 or args.num_steps < 1:
        raise UsageError("--repeats and --num_steps", "both must be at least 1", "use --repeats 20 --num_steps 4")
    chosen(args.attention, ATTENTION, "attention"), chosen(args.linear, LINEAR, "linear")
    facts = machine()
    print(
        f"{args.model}, {size.frames} frames of {size.width}x{size.height}, " + ", ".join(f"{k} {v}" for k, v in facts.items()), flush=True
    )
    sources = {
        "text": lambda: text_rows(text, args.repeats),
        "vae": lambda: vae_rows(vae, size, dit, args.repeats),
        "dit": lambda: dit_rows(dit, size, args),
    }
    rows = []
    for stage in STAGES if args.stage == "all" else (args.stage,):
        for row in sources[stage]():
            rows.append(row)
            print(f"  {row.stage}, {row.what}: {row.ms:.2f} ms", file=sys.stderr, flush=True)
            if args.json:
                with Path(args.json).open("a") as file:
                    file.write(json.dumps({"model": args.model, **facts, **dataclasses.asdict(row)}) + "\n")
    print(table(rows))
    return 0


def main(argv: list[str] | None = None) -> int:
    """Exit codes as `tdjax.generate`: 0 ok, 2 usage."""
    try:
        return run(parse(sys.argv[1:] if argv is None else argv))
    except TdjaxError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
