"""The command line of `tdjax generate`: argparse over the names of the official scripts. Imports no
jax."""

from __future__ import annotations

import argparse
import os
import tomllib
from collections.abc import Container
from pathlib import Path
from typing import Any

import tdjax
from tdjax import cli
from tdjax.config.parsing import json_value
from tdjax.config.values import shown
from tdjax.errors import UsageError
from tdjax.files import near
from tdjax.generate.again import is_metadata, options_of

FORMATS = ("mp4", "webm", "mkv", "gif", "png", "npy", "latents")
# Class names that the official scripts take as --model, beside a checkpoint path.
OFFICIAL_MODELS = {
    "wan2.1-1.3b": ("t2v", 1536),
    "wan2.1-14b": ("t2v", 5120),
    "wan2.2-a14b": ("i2v", 5120),
}
# Other words for an option: short ones, and those of diffusers.
ALIASES = {
    "image_path": ("--image",),
    "num_steps": ("--num_inference_steps",),
    "guidance_scale": ("--cfg",),
    "num_samples": ("--num_videos_per_prompt",),
    "attention_type": ("--attention",),
    "attention_impl": ("--impl",),
    "save_path": ("-o", "--output"),
}
# Options that take the place of others: what is said on the command line, or last in a session, is
# meant, and not the same thing under another name in a file or before.
INSTEAD = {
    "seconds": ("num_frames",),
    "num_frames": ("seconds",),
    "ode": ("sampler",),
    "sampler": ("ode",),
    "adaptive_resolution": ("fit",),
    "fit": ("adaptive_resolution",),
    "quant_linear": ("quant",),
    "quant": ("quant_linear",),
    "resolution": ("width", "height"),
    "aspect_ratio": ("width", "height"),
    "prompt_file": ("prompt",),
    "prompt_embeds": ("prompt",),
    "serve": ("prompt",),
}
EXAMPLES = """\
examples:
  tdjax generate "a red circle moving right on a navy background"
  tdjax generate "a fox in the snow ..." --model turbowan2.1-t2v-1.3b-480p -o fox.mp4
  tdjax generate "the boat leaves" --model turbowan2.2-i2v-a14b-720p-quant --image boat.jpg
  tdjax generate --prompt_file prompts.csv --num_samples 2 --save_path "out/{row}_{index}.mp4"

Options may be written with hyphens. Paths written go to stdout, everything else to stderr.
`tdjax models` lists the models."""
_PATH = os.path.expanduser  # a path that stays a word, because it may be - or a template


def build_parser() -> argparse.ArgumentParser:
    """Every option of the command."""
    p = cli.Parser(
        "tdjax generate",
        usage="%(prog)s [PROMPT] [options]",
        description=(
            "Prompt (or image and prompt) to video in 1 to 4 network steps.\n"
            "With no model: the embedded demo, on any machine."
        ),
        epilog=EXAMPLES,
    )
    p.add_argument("--version", action="version", version=f"tdjax {tdjax.__version__}")
    p.add_argument("words", nargs="?", metavar="PROMPT", help="the same as --prompt")
    what = p.add_argument_group("what to run")
    add_model_options(what)
    what.add_argument(
        "--task",
        choices=("auto", "t2v", "i2v"),
        default="auto",
        help="of the weights; read from them, so that this is only a check",
    )

    prompt = p.add_argument_group("prompt and image")
    prompt.add_argument(
        "--prompt",
        help=(
            "text, or - for standard input; default: one of the prompts that the embedded demo"
            " suggests"
        ),
    )
    prompt.add_argument(
        "--negative_prompt",
        default="",
        help="what the video should not show; undistilled weights only",
    )
    prompt.add_argument(
        "--prompt_file",
        metavar="FILE",
        type=_PATH,
        help=(
            ".txt (one a line), .csv, .tsv, .json or .jsonl with prompt, seed, image, num_frames,"
            " out; - for standard input; resumes"
        ),
    )
    prompt.add_argument(
        "--prompt_embeds",
        metavar="FILE",
        type=_PATH,
        help=".safetensors written by --save_prompt_embeds; the text encoder is not loaded",
    )
    prompt.add_argument(
        "--save_prompt_embeds",
        metavar="FILE",
        type=_PATH,
        help="write the prompt's embeddings and stop",
    )
    prompt.add_argument(
        "--prompt_cache",
        choices=("on", "off"),
        default="on",
        help="keep embeddings of prompts on disk (tdjax cache)",
    )
    prompt.add_argument(
        "--image_path",
        *ALIASES["image_path"],
        metavar="FILE",
        type=_PATH,
        help="first frame (image-to-video)",
    )
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
    sampler.add_argument(
        "--num_steps",
        *ALIASES["num_steps"],
        type=int,
        help="calls of the network: 1 to 4 with distilled weights (default 4), else 50",
    )
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
        "--boundary",
        type=float,
        help="time at which the low-noise expert of two takes over (default 0.9)",
    )
    sampler.add_argument("--shift", type=float, help="undistilled weights only (default 5)")
    sampler.add_argument(
        "--guidance_scale",
        *ALIASES["guidance_scale"],
        type=float,
        help="undistilled weights only (default 5)",
    )
    sampler.add_argument("--seed", type=int, default=0, help="-1 draws one and prints it")
    sampler.add_argument(
        "--num_samples",
        *ALIASES["num_samples"],
        type=int,
        default=1,
        help="videos of each prompt, one file each",
    )
    sampler.add_argument("--grid", action="store_true", help="one tiled file for all samples")
    sampler.add_argument(
        "--latents", metavar="FILE.npy", type=_PATH, help="start noise [1 t h w c]"
    )

    speed = add_speed_options(p)
    speed.add_argument("--quant_linear", action="store_true", help="same as --quant int8")
    speed.add_argument(
        "--ray",
        type=int,
        metavar="N",
        help=(
            "with --prompt_file: rows are made by N processes of a Ray cluster (RAY_ADDRESS, else"
            " this machine), whose hosts share the files"
        ),
    )
    speed.add_argument(
        "--ray_gpus", type=int, default=1, metavar="N", help="of each such process; 0 for CPUs"
    )
    speed.add_argument(
        "--default_norm",
        action="store_true",
        help="accepted: LayerNorm is always the true one here",
    )

    cli.add_hosts(p)

    out = p.add_argument_group("output")
    out.add_argument(
        "--save_path",
        *ALIASES["save_path"],
        metavar="PATH",
        type=_PATH,
        help=(
            "where to; the suffix chooses the format"
            " (default output/{model}_{seed}_{index}.mp4); fields model, seed, index, prompt_slug,"
            " date, row"
        ),
    )
    out.add_argument("--format", choices=FORMATS, help="default: from the suffix of --save_path")
    out.add_argument(
        "--upscale",
        type=int,
        metavar="N",
        help=(
            "each pixel as a square of N x N; default 6 for the embedded demo's .mp4, .webm and"
            " .gif, else 1"
        ),
    )
    out.add_argument(
        "--crf", type=int, default=17, help="quality of mp4 and webm; lower is better, and larger"
    )
    out.add_argument(
        "--metadata",
        choices=("on", "off"),
        default="on",
        help="sidecar .json and comment in the file",
    )
    out.add_argument("--overwrite", action="store_true", help="replace the files that are named")
    out.add_argument(
        "--preview",
        action="store_true",
        help=(
            "after each step, what the network predicts, as NAME_preview.mp4 beside the video's"
            " NAME; gone when the video is there"
        ),
    )
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
    look.add_argument(
        "--profile", metavar="DIR", type=_PATH, help="jax profiler trace of a second, warm run"
    )
    look.add_argument(
        "--check",
        choices=("finite", "none"),
        default="finite",
        help="finite: stop where a network returns NaN or infinity, and write nothing",
    )
    look.add_argument(
        "--serve",
        action="store_true",
        help="read prompts from standard input, one a line, with the model resident",
    )
    look.add_argument(
        "--config",
        metavar="FILE",
        type=_PATH,
        help=(
            ".toml or .json of these names, or the .json beside a video, which makes it again; the"
            " command line wins"
        ),
    )
    look.add_argument("-q", "--quiet", action="store_true", help="no progress and no notes")
    look.add_argument(
        "-v",
        "--verbose",
        action="store_true",
        help="a line for each stage, also where stderr is not a terminal",
    )
    return p


def add_model_options(group: argparse._ArgumentGroup) -> None:
    """Adds the options that name a model and its files."""
    group.add_argument(
        "--model",
        default="demo",
        help="a name of `tdjax models`, hub id, .pth/.safetensors file, or folder",
    )
    for name, text in (
        ("dit_path", "transformer file, instead of the model's own"),
        ("high_noise_model_path", "high-noise expert (Wan2.2 A14B)"),
        ("low_noise_model_path", "low-noise expert (Wan2.2 A14B)"),
        ("vae_path", "Wan2.1_VAE.pth"),
        ("text_encoder_path", "models_t5_umt5-xxl-enc-bf16.pth"),
        ("tokenizer_path", "folder or file: tokenizer.json or spiece.model"),
    ):
        group.add_argument(f"--{name}", metavar="PATH", type=_PATH, help=text)
    group.add_argument("--revision", metavar="REV", help="hub revision")
    group.add_argument(
        "--offline", action="store_true", help="never ask the hub; use what is in its cache"
    )
    for name, text in (
        ("lora", "merged at load, into every expert"),
        ("lora_high", "high-noise expert only"),
        ("lora_low", "low-noise expert only"),
    ):
        group.add_argument(
            f"--{name}",
            action="append",
            default=[],
            type=_PATH,
            metavar="FILE[:WEIGHT]",
            help=text,
        )


def add_speed_options(p: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Adds the options that say how a model runs; returns their group."""
    speed = p.add_argument_group("speed and memory")
    speed.add_argument(
        "--attention_type",
        *ALIASES["attention_type"],
        dest="attention_type",
        choices=("auto", "original", "dense", "sla", "sagesla"),
        default="auto",
        help=(
            "original is dense; sagesla: sla with int8 scores; auto: sla where the weights have its"
            " projection"
        ),
    )
    speed.add_argument(
        "--attention_impl",
        *ALIASES["attention_impl"],
        dest="attention_impl",
        default="auto",
        choices=("auto", "reference", "triton", "mosaic", "cudnn"),
        help=(
            "auto: the kernels that the device has; triton: every Triton kernel of this package;"
            " mosaic: those for Hopper, which auto takes there; never a silent fallback"
        ),
    )
    speed.add_argument(
        "--mesh",
        help=(
            "several devices: for one video sp=4, tp=2,sp=2, cfg=2 (guided steps), auto (sp over"
            " all GPUs); dp=2 makes two videos at a time, of samples or rows"
        ),
    )
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
    speed.add_argument(
        "--dtype",
        choices=("auto", "bfloat16", "float16", "float32"),
        default="auto",
        help="of weights and computation; auto: bfloat16 on an accelerator, float32 on a CPU",
    )
    speed.add_argument(
        "--vae_dtype",
        choices=("bfloat16", "float16", "float32"),
        help="of the VAE, where it is another (default: --dtype)",
    )
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
        "--transformer_device",
        choices=("auto", "device", "stream"),
        default="auto",
        help=(
            "stream: blocks wait in the host's memory and are copied while others run; auto: where"
            " the transformer does not fit"
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
        type=_PATH,
        help="persistent compile cache (default: user cache); none turns it off",
    )
    return speed


def parse(argv: list[str]) -> argparse.Namespace:
    """Arguments, with a config file under them and the official synonyms resolved. Raises
    UsageError."""
    parser, own = build_parser(), argv
    early = cli.Parser(parser.prog, add_help=False)
    early.add_argument("--config", type=_PATH, help=".toml or .json")
    config = early.parse_known_args(argv)[0].config
    if config:  # its own name once more, so that an option of several values ends there
        argv = [*_config_words(Path(config), parser, argv), f"--config={config}", *argv]
    args = parser.parse_intermixed_args(argv)
    if args.words is not None:
        if any(word.partition("=")[0] == "--prompt" for word in own):
            raise UsageError(
                f"{args.words!r} and --prompt", "both are the prompt", "give one of them"
            )
        args.prompt = args.words
    return _with_synonyms(args)


def _with_synonyms(args: argparse.Namespace) -> argparse.Namespace:
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


def _config_words(path: Path, parser: argparse.ArgumentParser, argv: list[str]) -> list[str]:
    """A file of option names, or a video's metadata, as words of the command line, so that they are
    checked like it. argv: the words beside it."""
    said = {word.partition("=")[0] for word in argv}
    try:
        text = path.read_text(encoding="utf-8-sig")
        toml = path.suffix.lower() == ".toml"
        values = tomllib.loads(text) if toml else json_value(text, unique=True)
        if not isinstance(values, dict):
            raise ValueError("it is not a table of names and values")
    except (OSError, ValueError, RecursionError) as error:  # the last from tomllib
        raise UsageError(
            f"--config {path} cannot be read",
            str(error),
            "it is TOML (.toml) or JSON of option names",
        ) from error
    if is_metadata(values):
        values = options_of(values, path, said)
    named = [action.dest for action in parser._actions if said & {*action.option_strings}]
    replaced = {other for name in named for other in INSTEAD.get(name, ())}
    return option_words(path, parser, values, without=replaced)


def option_words(
    where: Path | str,
    parser: argparse.ArgumentParser,
    values: dict[str, Any],
    without: Container[str] = (),
) -> list[str]:
    """Returns {option: value} as words of the command line, so that they are checked like it.
    where: they stand, for errors. without: options that are left away. Raises UsageError."""
    actions = {
        option[2:]: action
        for action in parser._actions
        for option in action.option_strings
        if option.startswith("--")
    }
    words = []
    for name, value in values.items():
        option = name.replace("-", "_")
        if option not in actions:
            close = near(option, actions)
            raise UsageError(
                f"{where}: unknown name {name!r}",
                "names are those of the options",
                f"did you mean {close[0]!r}?" if close else f"see {parser.prog} --help",
            )
        if actions[option].dest not in without:
            words += _words(where, option, actions[option], value)
    return words


def _words(where: Path | str, option: str, action: argparse.Action, value: Any) -> list[str]:
    """One option and its value as words of the command line."""
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise UsageError(
                f"{where}: {option} is {shown(value)}",
                "it is a switch: true or false",
                "write true",
            )
        return [f"--{option}"] if value else []
    several = action.nargs == "+" or isinstance(action.default, list)
    values = value if several and isinstance(value, list) else [value]
    if any(isinstance(item, bool) or not isinstance(item, str | int | float) for item in values):
        raise UsageError(
            f"{where}: {option} is {shown(value)}",
            "a list of texts or numbers is needed" if several else "a text or a number is needed",
            "leave it away for the option's default",
        )
    items = [str(item) for item in values]
    if action.nargs == "+":
        return [f"--{option}", *items]
    return [f"--{option}={item}" for item in items]
