"""`python -m tdjax.bench`: generation at real size with random weights, in one process, as one
table: every stage, then end to end.

Speed does not depend on the values, so no checkpoint is needed. With --error each denoising row
also gives the relative L2 of its latents to those of the same weights and noise in float32, with
dense or sparse-linear attention in reference form, and the PSNR of the frames that one VAE with
random weights makes of both. What XLA tunes on a GPU it remembers for the process: for a cold
compile that is quite cold, run --stage e2e with one kind of attention and of layer.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import platform
import re
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from tdjax import cli

if __name__ == "__main__":
    cli.heed_signals()

from tdjax.config import (
    ATTENTION,
    LINEAR,
    DiTConfig,
    SamplerConfig,
    TextConfig,
    TinyVAEConfig,
    VAEConfig,
    VideoSize,
)
from tdjax.errors import UsageError
from tdjax.files import refuse_unwritable
from tdjax.media.resolution import choose_size
from tdjax.precision import FLOATS, Policy
from tdjax.presets import PRESETS, TEACHER_SAMPLER
from tdjax.progress import GIB, device_bytes, host_peak_bytes, say

if TYPE_CHECKING:
    from tdjax.bench.stages import Row

STAGES = ("text", "vae", "dit", "e2e")
ONE = "one"  # device, in a list of meshes
MOST_RANK = 4096  # of a LoRA


def build_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        "tdjax bench",
        usage="%(prog)s [options]",
        description=(__doc__ or "").partition("\n\n")[0],
    )
    parser.add_argument(
        "--model",
        default="turbowan2.1-t2v-1.3b-480p",
        choices=("demo", *PRESETS),
        metavar="PRESET",
        help=f"demo, {', '.join(PRESETS)}",
    )
    parser.add_argument("--size", help="480p, 720p or WIDTHxHEIGHT; default: the preset's")
    parser.add_argument("--num_frames", type=int, help="default 81 (demo: 33)")
    parser.add_argument("--num_steps", type=int, default=4, help="of the sampler")
    parser.add_argument(
        "--stage",
        choices=("all", *STAGES),
        default="all",
        help="text encoder, VAE, transformer, or from prompt to latents",
    )
    parser.add_argument(
        "--attention", default="dense,sla,sagesla", help="comma list of " + ", ".join(ATTENTION)
    )
    parser.add_argument("--linear", default="float,int8", help="comma list of " + ", ".join(LINEAR))
    parser.add_argument(
        "--impl",
        default="auto",
        choices=("auto", "reference", "triton", "mosaic", "cudnn"),
        help=(
            "implementation of every op: auto, reference, triton; of sparse attention and 8-bit"
            " linear layers: mosaic; of dense attention: cudnn"
        ),
    )
    parser.add_argument(
        "--mesh",
        nargs="+",
        default=["one"],
        metavar="MESH",
        help=(
            "devices that share the work, one row for each: one, sp=2, sp=4, tp=2,sp=2 ..., with"
            " --teacher cfg=2; rows of a mesh say how many times as fast as `one` they are"
        ),
    )
    parser.add_argument(
        "--dtype",
        choices=FLOATS,
        help="of weights and computation; default: the model's own (demo: float32)",
    )
    parser.add_argument(
        "--stream",
        action="store_true",
        help="denoising rows with blocks streamed from the host's memory (stage dit)",
    )
    parser.add_argument(
        "--lora",
        type=int,
        metavar="RANK",
        help="also each row of 8-bit layers with a LoRA of this rank on all of them (stage dit)",
    )
    parser.add_argument(
        "--vae",
        choices=("wan", "tiny"),
        default="wan",
        help="the decoder of stage vae: Wan's, or a small one (TAEHV)",
    )
    parser.add_argument(
        "--teacher",
        action="store_true",
        help="also the original: 50 guided steps, dense, one step timed",
    )
    parser.add_argument(
        "--error",
        action="store_true",
        help="also the error of each denoising row (a float32 run: slow at real size)",
    )
    parser.add_argument(
        "--repeats",
        type=int,
        default=20,
        help="runs of each row; the demo on a CPU takes some 6 minutes with 1",
    )
    parser.add_argument(
        "--save",
        metavar="FOLDER",
        type=cli.path,
        help="also time runs from prompt to mp4, written into FOLDER (stage e2e)",
    )
    parser.add_argument(
        "--json", metavar="FILE", type=cli.path, help="append one JSON line for each row"
    )
    return parser


def parse(argv: list[str]) -> argparse.Namespace:
    return build_parser().parse_args(argv)


def chosen(text: str, allowed: tuple[str, ...], flag: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in allowed:
            raise UsageError(
                f"--{flag} has {name!r}",
                f"allowed: {', '.join(allowed)}",
                f"use --{flag} {','.join(allowed)}",
            )
    return names


def configs(args) -> tuple[DiTConfig, VAEConfig, TextConfig, VideoSize]:
    """What the model of that name is made of, and the size of its video."""
    if args.model == "demo":
        from tdjax.train.tiny import configs as demo

        dit, vae, text = demo.DIT_SLA, demo.VAE, demo.TEXT
        size = demo.SIZE
    else:
        preset = PRESETS[args.model]
        dit, vae, text = preset.config, VAEConfig(), TextConfig()
        sides = re.fullmatch("([0-9]{1,5})x([0-9]{1,5})", args.size or "")
        if sides:
            size = choose_size(width=int(sides[1]), height=int(sides[2]))
        else:
            size = choose_size(resolution=args.size or preset.resolution)
    if args.model == "demo" and args.size:
        raise UsageError(
            "--size with --model demo", "the demo model makes 64x64", "leave --size away"
        )
    if args.dtype:
        policy = Policy(param=args.dtype, compute=args.dtype)
        dit = dataclasses.replace(dit, policy=policy)
        vae = dataclasses.replace(vae, policy=policy)
        text = dataclasses.replace(text, policy=policy)
    vae = dataclasses.replace(vae, impl="reference" if args.impl == "reference" else "auto")
    if args.num_frames is not None:
        size = dataclasses.replace(size, frames=args.num_frames)
    return dit, vae, text, size


def machine() -> dict[str, str]:
    import jax

    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def sources(args) -> dict[str, Callable[[], Iterator[Row]]]:
    """Where the rows of each stage come from."""
    from tdjax.bench import pipeline, stages
    from tdjax.parallel.mesh import make_mesh

    dit, vae, text, size = configs(args)
    decoder = vae if args.vae == "wan" else TinyVAEConfig(policy=vae.policy)
    meshes = [None if name == ONE else make_mesh(name, dit) for name in args.mesh]
    on_each = lambda rows: itertools.chain.from_iterable(map(rows, meshes))
    return {
        "text": lambda: stages.text_rows(text, args.repeats),
        "vae": lambda: on_each(lambda mesh: stages.vae_rows(decoder, size, args.repeats, mesh)),
        "dit": lambda: on_each(lambda mesh: stages.dit_rows(dit, vae, size, args, mesh)),
        "e2e": lambda: on_each(lambda mesh: pipeline.e2e_rows(dit, vae, text, size, args, mesh)),
    }


def against_one(row: Row, rows: list[Row]) -> Row:
    """The row of a mesh with its speed against one device, where that was measured before."""
    for other in rows:
        if row.mesh and not other.mesh and (row.stage, row.what) == (other.stage, other.what):
            return dataclasses.replace(row, one=other.ms / row.ms)
    return row


def with_peaks(row: Row, host: int) -> Row:
    """The row with the memory that the process has reached by now; host: by the row before."""
    device, host = device_bytes(), max(host, row.host_peak or 0, host_peak_bytes() or 0)
    return dataclasses.replace(
        row, device_peak=device[1] if device else None, host_peak=host or None
    )


def table(rows: list[Row]) -> str:
    names = [row.what + (f", {row.mesh}" if row.mesh else "") for row in rows]
    wide = max(map(len, names))
    numbers = (
        f"{'ms':>9} {'p10':>9} {'p90':>9} {'compile s':>10} {'weights':>10} {'working':>10}"
        f" {'error':>9} {'PSNR':>8} {'speed':>6}"
    )
    lines = [f"{'stage':11} {'what':{wide}} {numbers}"]
    for name, r in zip(names, rows, strict=True):
        error = "" if r.error is None else f"{r.error:.2e}"
        psnr = "" if r.psnr is None else f"{r.psnr:.1f} dB"
        speed = "" if r.one is None else f"{r.one:.2f}x"
        compile_s = "" if r.compile_s is None else f"{r.compile_s:.1f}"
        memory = f"{r.weights / GIB:6.2f} GiB {r.working / GIB:6.2f} GiB"
        numbers = (
            f"{r.ms:9.2f} {r.p10:9.2f} {r.p90:9.2f} {compile_s:>10} {memory} {error:>9} {psnr:>8}"
            f" {speed:>6}"
        )
        lines.append(f"{r.stage:11} {name:{wide}} {numbers}".rstrip())
    return "\n".join(lines)


def conclusions(rows: list[Row], steps: int) -> list[str]:
    """Each row against the original, and the memory of the process."""
    lines = []
    for row in rows:
        if row.ratio is not None:
            seconds = steps * row.ms / 1e3
            original = f"original {TEACHER_SAMPLER.num_steps} steps {row.ratio * seconds:.1f} s"
            lines.append(
                f"{original}; {row.what}: {steps} step{'s' * (steps > 1)} {seconds:.2f} s,"
                f" {row.ratio:.0f}x"
            )
    size = lambda n: "not reported" if n is None else f"{n / GIB:.2f} GiB"
    return [
        *lines,
        (
            f"peak of the process: device {size(rows[-1].device_peak)}, host"
            f" {size(rows[-1].host_peak)}"
        ),
    ]


def check_early(args) -> None:
    """Raises UsageError for whatever can be wrong before anything is timed."""
    from tdjax.parallel.mesh import parse_mesh

    if not 1 <= args.repeats <= 100_000:
        raise UsageError(
            f"--repeats is {args.repeats}", "it must be at least 1 and at most 100000", "use 20"
        )
    SamplerConfig(num_steps=args.num_steps)
    if args.lora is not None and not 1 <= args.lora <= MOST_RANK:
        raise UsageError(f"--lora is {args.lora}", f"it is a rank from 1 to {MOST_RANK}", "use 64")
    if args.stream and args.mesh != [ONE]:
        raise UsageError(
            "--stream with --mesh", "blocks are streamed to one device", "leave one away"
        )
    for name in args.mesh:
        axes = {} if name == ONE else parse_mesh(name)
        if "dp" in axes:
            raise UsageError(
                f"--mesh {name}",
                "dp makes several videos at a time, and every row here is of one",
                "use sp, tp, cfg or fsdp",
            )
        if "cfg" in axes and not args.teacher:
            raise UsageError(
                f"--mesh {name} without --teacher",
                "cfg divides guided steps, and few steps have no guidance",
                "add --teacher, or use sp",
            )
    of_stages = {"save": "e2e", "vae": "vae"}
    of_stages |= dict.fromkeys(("error", "teacher", "stream", "lora"), "dit")
    for flag, stage in of_stages.items():
        if getattr(args, flag) not in (None, False, "wan") and args.stage not in ("all", stage):
            raise UsageError(
                f"--{flag} with --stage {args.stage}",
                f"it is of the stage {stage}",
                f"use --stage {stage}, or all",
            )
    if args.save:
        refuse_unwritable(args.save / "clip.mp4")
    if args.json:
        if args.json.is_dir():
            raise UsageError(f"--json {args.json} is a folder", "lines go to a file", "name one")
        refuse_unwritable(args.json)


def run(args) -> int:
    check_early(args)
    *_, size = configs(args)
    args.attention = chosen(args.attention, ATTENTION, "attention")
    args.linear = chosen(args.linear, LINEAR, "linear")
    cli.start_jax(lambda text: say(f"tdjax: {text}"))
    facts = machine()
    told = ", ".join(f"{k} {v}" for k, v in facts.items())
    print(f"{args.model}, {size.frames} frames of {size.width}x{size.height}, {told}", flush=True)
    rows, made = [], sources(args)
    try:
        for stage in STAGES if args.stage == "all" else (args.stage,):
            for row in made[stage]():
                row = against_one(row, rows)
                rows.append(with_peaks(row, (rows[-1].host_peak or 0) if rows else 0))
                where = f", {row.mesh}" if row.mesh else ""
                say(f"  {row.stage}, {row.what}{where}: {row.ms:.2f} ms")
                if args.json:
                    line = {"model": args.model, **facts, **dataclasses.asdict(rows[-1])}
                    with args.json.open("a") as file:
                        file.write(json.dumps(line) + "\n")
    finally:  # what was measured before a stage failed is not lost
        if rows:
            print(table(rows), *conclusions(rows, args.num_steps), sep="\n")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Exit codes as those of tdjax.generate: 0 ok, 2 usage, 130 interrupted."""
    return cli.main(
        lambda words: run(parse(words)), argv, parser=build_parser, interrupted="rows above stand"
    )


if __name__ == "__main__":
    cli.run(main)
