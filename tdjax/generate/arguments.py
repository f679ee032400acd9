"""The command line of `python -m tdjax.generate`: argparse over the names of the official scripts.
Imports no jax."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import difflib
import io
import json
import re
import sys
import tomllib
from pathlib import Path

from tdjax.errors import UsageError

PATHS = (
    "dit_path",
    "high_noise_model_path",
    "low_noise_model_path",
    "vae_path",
    "text_encoder_path",
    "tokenizer_path",
)
FORMATS = ("mp4", "webm", "mkv", "gif", "png", "npy", "latents")
# Class names that the official scripts take as --model, beside a checkpoint path.
OFFICIAL_MODELS = {
    "wan2.1-1.3b": ("t2v", 1536),
    "wan2.1-14b": ("t2v", 5120),
    "wan2.2-a14b": ("i2v", 5120),
}


def build_parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m tdjax.generate",
        description=(
            "Prompt (or image and prompt) to video in 1 to 4 network steps. With no model: the"
            " embedded demo, on any machine."
        ),
        epilog=(
            "Every option is accepted with underscores or hyphens. Paths written go to stdout,"
            " everything else to stderr."
        ),
        allow_abbrev=False,
    )
    what = p.add_argument_group("what to run")
    what.add_argument(
        "--model",
        default="demo",
        help="preset name, hub id, .pth/.safetensors file, or folder (default: embedded demo)",
    )
    what.add_argument(
        "--task", choices=("auto", "t2v", "i2v"), default="auto", help="checked against the weights"
    )
    for name, text in (
        ("dit_path", "transformer file, instead of the model's own"),
        ("high_noise_model_path", "high-noise expert (Wan2.2 A14B)"),
        ("low_noise_model_path", "low-noise expert (Wan2.2 A14B)"),
        ("vae_path", "Wan2.1_VAE.pth"),
        ("text_encoder_path", "models_t5_umt5-xxl-enc-bf16.pth"),
        ("tokenizer_path", "folder or file: tokenizer.json or spiece.model"),
        ("revision", "hub revision"),
    ):
        what.add_argument(f"--{name}", metavar="PATH" if "path" in name else "REV", help=text)
    what.add_argument(
        "--offline", action="store_true", help="never ask the hub; use what is in its cache"
    )
    for name, text in (
        ("lora", "merged at load, into every expert"),
        ("lora_high", "high-noise expert only"),
        ("lora_low", "low-noise expert only"),
    ):
        what.add_argument(
            f"--{name}", action="append", default=[], metavar="FILE[:WEIGHT]", help=text
        )

    prompt = p.add_argument_group("prompt and image")
    prompt.add_argument(
        "--prompt",
        help=(
            "text, or - for standard input (default: one of the prompts that the embedded demo"
            " suggests)"
        ),
    )
    prompt.add_argument("--negative_prompt", default="", help="teacher samplers only")
    prompt.add_argument(
        "--prompt_file",
        metavar="FILE",
        help=".txt (one a line), .csv or .jsonl with prompt, seed, image, num_frames, out; resumes",
    )
    prompt.add_argument(
        "--prompt_embeds",
        metavar="FILE",
        help=".safetensors written by --save_prompt_embeds; the text encoder is not loaded",
    )
    prompt.add_argument(
        "--save_prompt_embeds", metavar="FILE", help="write the prompt's embeddings and stop"
    )
    prompt.add_argument(
        "--prompt_cache",
        choices=("on", "off"),
        default="on",
        help="keep embeddings of prompts on disk (python -m tdjax.cache)",
    )
    prompt.add_argument("--image_path", metavar="FILE", help="first frame (image-to-video)")
    prompt.add_argument(
        "--fit",
        choices=("crop", "pad", "stretch", "adaptive"),
        help="image to frame (default crop)",
    )
    prompt.add_argument("--adaptive_resolution", action="store_true", help="same as --fit adaptive")

    size = p.add_argument_group("size and length")
    size.add_argument(
        "--resolution", help="480p, 720p (the official scripts' 480, 512, 720 are other sizes)"
    )
    size.add_argument(
        "--aspect_ratio", help="16:9, 9:16, 4:3, 3:4, 1:1 (default 16:9; with an image the nearest)"
    )
    size.add_argument("--width", type=int, help="pixels, a multiple of 16")
    size.add_argument("--height", type=int, help="pixels, a multiple of 16")
    size.add_argument("--num_frames", type=int, help="4k+1 (default 81)")
    size.add_argument("--seconds", type=float, help="instead of --num_frames")
    size.add_argument(
        "--fps", type=int, default=16, help="of the file; the models were trained at 16"
    )

    sampler = p.add_argument_group("sampler")
    sampler.add_argument("--num_steps", type=int, help="1 to 4 (distilled weights; default 4)")
    sampler.add_argument("--sigma_max", type=float, help="default 80 (text) or 200 (image)")
    sampler.add_argument(
        "--mid_t",
        type=float,
        nargs="+",
        help="TrigFlow times between first and last (default 1.5 1.4 1.0)",
    )
    sampler.add_argument(
        "--sampler",
        choices=("sde", "ode", "unipc", "euler"),
        help="sde, ode: distilled; unipc, euler: undistilled",
    )
    sampler.add_argument("--ode", action="store_true", help="same as --sampler ode")
    sampler.add_argument(
        "--boundary", type=float, help="time at which the low-noise expert takes over (default 0.9)"
    )
    sampler.add_argument("--shift", type=float, help="teacher samplers (default 5)")
    sampler.add_argument("--guidance_scale", type=float, help="teacher samplers (default 5)")
    sampler.add_argument("--seed", type=int, default=0, help="-1 draws one and prints it")
    sampler.add_argument("--num_samples", type=int, default=1, help="one file each")
    sampler.add_argument("--grid", action="store_true", help="one tiled file for all samples")
    sampler.add_argument("--latents", metavar="FILE.npy", help="start noise [1 t h w c]")

    speed = p.add_argument_group("speed and memory")
    speed.add_argument(
        "--attention_type",
        choices=("auto", "original", "dense", "sla", "sagesla"),
        default="auto",
        help=(
            "original is dense; sagesla: sla with int8 scores; auto: sla where the weights have its"
            " projection"
        ),
    )
    speed.add_argument(
        "--attention_impl",
        default="auto",
        choices=("auto", "reference", "triton", "mosaic", "cudnn"),
        help=(
            "triton: every Triton kernel of this package; mosaic: those for Hopper; never a silent"
            " fallback"
        ),
    )
    speed.add_argument("--mesh", help="several devices for one video: sp=4, tp=2,sp=2")
    speed.add_argument(
        "--sla_topk", type=float, help="share of key blocks kept (default 0.1; 0.15 for quality)"
    )
    speed.add_argument(
        "--quant",
        choices=("auto", "none", "int8", "int8_channel", "fp8"),
        default="auto",
        help=(
            "auto: as stored; none: dequantise; int8 (published tiles), int8_channel, fp8 (by token"
            " and channel): quantise at load"
        ),
    )
    speed.add_argument("--quant_linear", action="store_true", help="same as --quant int8")
    speed.add_argument(
        "--default_norm",
        action="store_true",
        help="accepted: LayerNorm is always the true one here",
    )
    speed.add_argument(
        "--dtype", choices=("auto", "bfloat16", "float16", "float32"), default="auto"
    )
    speed.add_argument("--vae_dtype", choices=("bfloat16", "float16", "float32"))
    speed.add_argument(
        "--text_encoder_device",
        choices=("auto", "device", "stream"),
        default="auto",
        help=(
            "stream: a layer at a time, no weights stay; auto: streamed on a GPU unless --serve or"
            " --mesh, or where not all fits together"
        ),
    )
    speed.add_argument(
        "--vae",
        choices=("auto", "full", "tiled"),
        default="auto",
        help="decode whole frames or tiles; auto: tiles where a frame does not fit",
    )
    speed.add_argument(
        "--low_memory",
        action="store_true",
        help="free every part as soon as its stage ends; stream the text encoder",
    )
    speed.add_argument(
        "--compile_cache_dir",
        metavar="DIR",
        help="persistent compile cache (default: user cache); none turns it off",
    )

    out = p.add_argument_group("output")
    out.add_argument(
        "--save_path",
        help=(
            "default output/{model}_{seed}_{index}.mp4; fields model, seed, index, prompt_slug,"
            " date"
        ),
    )
    out.add_argument("--format", choices=FORMATS, help="default: from the suffix of --save_path")
    out.add_argument("--crf", type=int, default=17, help="quality of mp4 and webm, lower is better")
    out.add_argument(
        "--metadata",
        choices=("on", "off"),
        default="on",
        help="sidecar .json and comment in the file",
    )
    out.add_argument("--overwrite", action="store_true")
    out.add_argument("--json", action="store_true", help="one JSON line for each file on stdout")

    look = p.add_argument_group("looking inside")
    look.add_argument(
        "--dry_run",
        action="store_true",
        help="resolve everything, print the memory plan, load nothing",
    )
    look.add_argument(
        "--timings", action="store_true", help="table of seconds and memory for each stage"
    )
    look.add_argument("--warmup", action="store_true", help="compile and stop")
    look.add_argument("--profile", metavar="DIR", help="jax profiler trace of a second, warm run")
    look.add_argument("--check", choices=("finite", "none"), default="finite")
    look.add_argument(
        "--serve",
        action="store_true",
        help="read prompts from standard input, one a line, with the model resident",
    )
    look.add_argument(
        "--config", metavar="FILE", help=".toml or .json of these names; the command line wins"
    )
    look.add_argument("-q", "--quiet", action="store_true", help="no progress")
    look.add_argument(
        "-v", "--verbose", action="store_true", help="progress also where stderr is not a terminal"
    )
    return p


def hyphens(argv: list[str]) -> list[str]:
    """--num-steps=4 -> --num_steps=4"""
    out = []
    for word in argv:
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            word = "--" + name[2:].replace("-", "_") + equals + value
        out.append(word)
    return out


def parse(argv: list[str]) -> argparse.Namespace:
    """Arguments, with a config file under them and the official synonyms resolved. Raises
    UsageError."""
    parser, argv = build_parser(), hyphens(argv)
    names = {a.dest for a in parser._actions}
    early, _ = argparse.ArgumentParser(add_help=False, allow_abbrev=False), None
    early.add_argument("--config")
    config = early.parse_known_args(argv)[0].config
    if config:
        argv = [*read_config(Path(config), parser), *argv]
    for word in argv:
        name = word.partition("=")[0]
        if name.startswith("--") and name[2:] and name[2:] not in names:
            near = difflib.get_close_matches(name[2:], names, 1)
            raise UsageError(
                f"unknown option {name}",
                "see python -m tdjax.generate --help",
                f"did you mean --{near[0]}?" if near else "",
            )
    args = parser.parse_args(argv)
    return synonyms(args)


def synonyms(args: argparse.Namespace) -> argparse.Namespace:
    """--ode, --quant_linear, --adaptive_resolution, --seconds and the official --model names,
    checked for contradictions."""
    for flag, name, value in (
        ("ode", "sampler", "ode"),
        ("adaptive_resolution", "fit", "adaptive"),
    ):
        if getattr(args, flag):
            if getattr(args, name) not in (None, value):
                raise UsageError(
                    f"--{flag} and --{name} {getattr(args, name)}",
                    "they contradict each other",
                    "give one of them",
                )
            setattr(args, name, value)
    if args.quant_linear:
        if args.quant == "none":
            raise UsageError(
                "--quant_linear and --quant none", "they contradict each other", "give one of them"
            )
        args.quant = "int8"
    if args.seconds is not None:
        if args.num_frames is not None:
            raise UsageError(
                "--seconds and --num_frames", "both give the length", "give one of them"
            )
        if not 0 < args.seconds < 1e6:
            raise UsageError(
                f"--seconds is {args.seconds}",
                "a positive length is needed",
                "81 frames at 16 a second are 5",
            )
        args.num_frames = max(1, round(args.seconds * args.fps / 4) * 4 + 1)
    args.official_model = None
    if args.model.lower() in OFFICIAL_MODELS:
        args.official_model, args.model = args.model, "demo"
        if not (args.dit_path or args.high_noise_model_path):
            raise UsageError(
                f"--model {args.official_model} names a network size, not weights",
                "the official scripts take it together with a checkpoint",
                "add --dit_path FILE.pth (or the two expert paths), or give --model"
                " turbowan2.1-t2v-1.3b-480p",
            )
    return args


def read_config(path: Path, parser: argparse.ArgumentParser) -> list[str]:
    """A file of option names as words of the command line, so that they are checked like it."""
    try:
        text = path.read_text()
        values = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
        if not isinstance(values, dict):
            raise ValueError("it is not a table of names and values")
    except (OSError, ValueError) as error:
        raise UsageError(
            f"--config {path} cannot be read",
            str(error),
            "it is TOML (.toml) or JSON of option names",
        ) from error
    options, words = {a.dest: a for a in parser._actions}, []
    for name, value in values.items():
        dest = name.replace("-", "_")
        if dest not in options:
            near = difflib.get_close_matches(dest, options, 1)
            fix = f"did you mean {near[0]!r}?" if near else ""
            raise UsageError(
                f"{path}: unknown name {name!r}", "names are those of the options", fix
            )
        if options[dest].nargs == 0:
            if not isinstance(value, bool):
                raise UsageError(
                    f"{path}: {name} is {value!r}", "it is a switch: true or false", "write true"
                )
            words += [f"--{dest}"] if value else []
        elif options[dest].nargs == "+":
            words += [f"--{dest}", *map(str, value if isinstance(value, list) else [value])]
        else:
            words += [
                f"--{dest}={item}" for item in (value if isinstance(value, list) else [value])
            ]
    return words


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One video request: a row of a prompt file, or the command line itself."""

    prompt: str | None
    seed: int
    image: str | None = None
    num_frames: int | None = None
    out: str | None = None
    row: int = 1


def read_jobs(args: argparse.Namespace, default_prompt: str | None = None) -> list[Job]:
    """The prompt file's rows, or one job from the command line."""
    own = Job(
        prompt=args.prompt,
        seed=args.seed,
        image=args.image_path,
        num_frames=args.num_frames,
        out=args.save_path,
    )
    if args.prompt_file:
        if args.prompt:
            raise UsageError("--prompt and --prompt_file", "both give the text", "give one of them")
        return read_prompt_file(Path(args.prompt_file), own)
    if args.prompt == "-":
        own = dataclasses.replace(own, prompt=sys.stdin.read().strip())
    if own.prompt is None and not args.prompt_embeds and default_prompt:
        own = dataclasses.replace(own, prompt=default_prompt)
    return [own]


def read_prompt_file(path: Path, own: Job) -> list[Job]:
    columns = [f.name for f in dataclasses.fields(Job) if f.name != "row"]
    try:
        text = path.read_text(encoding="utf-8-sig")
        lines = text.splitlines()
        if path.suffix == ".csv":
            rows = list(csv.DictReader(io.StringIO(text, newline="")))
        elif path.suffix == ".jsonl":
            rows = [json.loads(line) for line in lines if line.strip()]
        else:
            rows = [
                {"prompt": line.strip()}
                for line in lines
                if line.strip() and not line.startswith("#")
            ]
    except (OSError, ValueError) as error:
        raise UsageError(
            f"--prompt_file {path} cannot be read",
            str(error),
            ".txt (one prompt a line), .csv or .jsonl",
        ) from error
    jobs = []
    for number, row in enumerate(rows, 1):
        wrong = None if isinstance(row, dict) else "not a table row"
        if wrong is None:
            unknown = [k for k in row if k not in columns]
            wrong = (
                f"unknown column {unknown[0]!r}"
                if unknown
                else None
                if row.get("prompt")
                else "no prompt"
            )
        if wrong is None:
            values = {k: str(v) for k, v in row.items() if v not in (None, "")}
            wrong = next(
                (
                    f"{k} is {values[k]!r}"
                    for k in ("seed", "num_frames")
                    if not re.fullmatch(r"-?\d+", values.get(k, "0"))
                ),
                None,
            )
        if wrong:
            raise UsageError(
                f"{path}, row {number}: {wrong}",
                f"columns are {', '.join(columns)}; seed and num_frames are whole numbers",
                "only prompt is needed",
            )
        numbers = {k: int(values[k]) for k in ("seed", "num_frames") if k in values}
        jobs.append(dataclasses.replace(own, row=number, **(values | numbers)))
    if not jobs:
        raise UsageError(
            f"{path} holds no prompts", "it is empty, or only comments", "one prompt a line"
        )
    return jobs
