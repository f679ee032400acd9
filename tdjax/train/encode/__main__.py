"""`python -m tdjax.train.encode VIDEOS --out SHARDS`: videos and captions to shards. jax is
imported after everything cheap is checked."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import Any

from tdjax import cli

if __name__ == "__main__":
    cli.heed_signals()

from tdjax.checkpoints import demo
from tdjax.config import VIDEO_SIZES, VideoSize
from tdjax.config.parsing import json_object
from tdjax.config.values import parse_whole
from tdjax.errors import UsageError
from tdjax.files import near, refuse_unwritable
from tdjax.presets import PRESETS
from tdjax.train.encode.items import read_items
from tdjax.train.encode.plan import Settings, Shard, Skipped, make_plan
from tdjax.train.made import parse_part

EXAMPLES = """\
examples:
  python -m tdjax.train.encode clips --out shards
  python -m tdjax.train.encode clips --captions captions.csv --model wan2.1-t2v-1.3b --out shards
  python -m tdjax.train.encode table.jsonl --sizes 480p --num_frames 49,81 --part 1/8 --out shards

The same command goes on where it was stopped. Shards of one size are in a folder of their own."""


def build_parser() -> argparse.ArgumentParser:
    """Every option of the command."""
    p = cli.Parser(
        "python -m tdjax.train.encode",
        usage="%(prog)s VIDEOS --out SHARDS [options]",
        description="Videos (or images) and their captions, to shards that training reads.",
        epilog=EXAMPLES,
    )
    p.add_argument(
        "videos",
        metavar="VIDEOS",
        type=cli.path,
        help="a folder; or a .csv, .tsv, .json or .jsonl with columns path and text",
    )
    p.add_argument("--out", metavar="SHARDS", type=cli.path, help="folder of the shards")
    p.add_argument(
        "--captions",
        metavar="FILE",
        type=cli.path,
        help="table with columns path and text; default: a .txt file beside each video",
    )
    model = p.add_argument_group("model")
    model.add_argument(
        "--model",
        default="demo",
        help="whose VAE and text encoder: a preset, hub id or folder; its transformer is not read",
    )
    model.add_argument("--vae_path", metavar="PATH", type=cli.path, help="VAE, instead of its own")
    model.add_argument(
        "--text_encoder_path", metavar="PATH", type=cli.path, help="umT5, instead of its own"
    )
    model.add_argument(
        "--tokenizer_path", metavar="PATH", type=cli.path, help="tokenizer, instead of its own"
    )
    model.add_argument(
        "--dtype",
        choices=("auto", "bfloat16", "float32"),
        default="auto",
        help="of both networks; auto: bfloat16, on a CPU float32",
    )
    model.add_argument("--offline", action="store_true", help="never ask the hub")
    clips = p.add_argument_group("clips")
    clips.add_argument(
        "--sizes",
        help=(
            "WIDTHxHEIGHT, or 480p, 720p for all their proportions; several with commas between."
            " A video goes to the one most like it, cropped in the middle; default: the model's own"
        ),
    )
    clips.add_argument(
        "--num_frames",
        help="4k+1; several with commas between: a clip has as many as its video lasts for;"
        " default: the model's own",
    )
    clips.add_argument(
        "--fps", type=float, default=16.0, help="frames a second, to which videos are resampled"
    )
    clips.add_argument(
        "--stride",
        type=int,
        help="frames between the beginnings of a video's clips; default: they do not overlap",
    )
    clips.add_argument("--max_clips", type=int, default=0, help="of one video; 0 for all")
    clips.add_argument(
        "--upscale", action="store_true", help="also take videos smaller than their clips would be"
    )
    clips.add_argument(
        "--image_latents",
        action="store_true",
        help="also encode each clip's first frame followed by grey, for image-to-video",
    )
    work = p.add_argument_group("work")
    work.add_argument("--part", metavar="I/N", help="the I-th of N processes that share the shards")
    work.add_argument("--shard_size", type=int, default=256, help="samples in a file")
    work.add_argument(
        "--max_skipped", type=int, default=100, help="damaged videos after which all of it ends"
    )
    work.add_argument(
        "--threads", type=int, default=min(8, os.cpu_count() or 1), help="that decode videos"
    )
    work.add_argument(
        "--dry_run", action="store_true", help="say what would be made, and stop; no device is used"
    )
    work.add_argument("-q", "--quiet", action="store_true", help="no progress")
    work.add_argument(
        "-v", "--verbose", action="store_true", help="progress also where stderr is not a terminal"
    )
    return p


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 ok, 2 usage, 3 checkpoint or too many damaged videos, 4 out of memory, 130
    interrupted."""
    kept = "shards are whole; the same command goes on"
    return cli.main(_command, argv, parser=build_parser, interrupted=kept)


def _command(argv: list[str]) -> int:
    args = build_parser().parse_args(argv)
    settings, part = check_early(args)
    items = read_items(args.videos, args.captions)
    skipped = Skipped(args.max_skipped)
    shards = make_plan(items, settings, skipped, args.threads)
    if args.dry_run:
        print("\n".join(_planned(shards, len(items), skipped)))
        return 0
    return run(args, settings, shards[part[0] :: part[1]], skipped)


def check_early(args: argparse.Namespace) -> tuple[Settings, tuple[int, int]]:
    """Returns (how clips are cut, (place, count) of this process). Raises UsageError for whatever
    is wrong with the options."""
    if args.out is None:
        raise UsageError("--out is not given", "shards are written there", "give --out FOLDER")
    for name, least in (("threads", 1), ("max_skipped", 0)):
        if getattr(args, name) < least:
            raise UsageError(
                f"--{name} is {getattr(args, name)}",
                f"it must be at least {least}",
                "leave it away for the default",
            )
    own = own_size(args.model)
    settings = Settings(
        sizes=_sizes(args.sizes) if args.sizes else ((own.width, own.height),),
        frames=_frames(args.num_frames) if args.num_frames else (own.frames,),
        fps=args.fps,
        stride=args.stride,
        most=args.max_clips,
        upscale=args.upscale,
        samples=args.shard_size,
    )
    part = parse_part(args.part)
    if not args.dry_run:
        refuse_unwritable(args.out / "shard")
    return settings, part


def own_size(model: str) -> VideoSize:
    """Returns the size of clips that a model makes: by its folder, its preset, else 480p."""
    folder = demo.folder() if model == "demo" else Path(model).expanduser()
    about = folder / "model.json"
    if about.is_file():
        try:
            facts = json_object(about.read_bytes())
            return VideoSize(**{n: facts[n] for n in ("frames", "height", "width") if n in facts})
        except (OSError, ValueError, TypeError) as error:
            raise UsageError(
                f"{about} cannot be read", str(error), "give --sizes and --num_frames"
            ) from error
    preset = PRESETS.get(model.lower())
    width, height = VIDEO_SIZES[preset.resolution if preset else "480p"]["16:9"]
    return VideoSize(width=width, height=height)


def _sizes(text: str) -> tuple[tuple[int, int], ...]:
    sizes: list[tuple[int, int]] = []
    for word in text.lower().split(","):
        match = re.fullmatch(r"\s*([0-9]{1,5})x([0-9]{1,5})\s*", word)
        if match:
            sizes.append((int(match[1]), int(match[2])))
        elif word.strip() in VIDEO_SIZES:
            sizes += VIDEO_SIZES[word.strip()].values()
        else:
            raise UsageError(
                f"--sizes is {word[:80]!r}",
                f"allowed: WIDTHxHEIGHT in pixels, {', '.join(VIDEO_SIZES)}",
                f"nearest: {near(word.strip(), VIDEO_SIZES, cutoff=0)[0]}",
            )
    return tuple(dict.fromkeys(sizes))


def _frames(text: str) -> tuple[int, ...]:
    try:
        return tuple(sorted({parse_whole(word.strip()) for word in text.split(",")}))
    except ValueError as error:
        raise UsageError(
            f"--num_frames is {text[:80]!r}",
            "whole numbers of the form 4k+1 are needed, with commas between",
            "for example --num_frames 49,81",
        ) from error


def _planned(shards: list[Shard], items: int, skipped: Skipped) -> list[str]:
    """What would be made, for people."""
    sizes: dict[str, list[Shard]] = {}
    for shard in shards:
        sizes.setdefault(str(shard.size), []).append(shard)
    lines = [f"{items} videos and images"]
    for size, each in sizes.items():
        lines.append(f"{size}: {sum(len(s.clips) for s in each)} clips in {len(each)} shards")
    return lines + skipped.lines()


def run(args: argparse.Namespace, settings: Settings, shards: list[Shard], skipped: Skipped) -> int:
    cache_note = cli.set_compile_cache()
    from tdjax.progress import Stages

    stages = Stages(False if args.quiet else args.verbose or None)
    if cache_note:
        stages.note(cache_note)
    for line in skipped.lines():
        stages.note(line)
    if not shards:
        stages.note("no shard is left for this part")
        return 0
    cli.start_jax(stages.note)
    from tdjax.train.encode.encoders import Encoders
    from tdjax.train.encode.writing import Writing

    paths = {name: getattr(args, name) for name in _PATHS}
    encoders = Encoders(
        args.model,
        paths,
        {shard.size for shard in shards},
        stages,
        dtype=None if args.dtype == "auto" else args.dtype,
        offline=args.offline,
    )
    about = _about(encoders.identity(), settings, args.image_latents)
    writing = Writing(
        args.out,
        encoders,
        about,
        skipped,
        stages,
        fps=settings.fps,
        image=args.image_latents,
        threads=args.threads,
    )
    for path in writing.run(shards):
        print(path)
    name = "report" if args.part is None else f"report_{args.part.replace('/', '_of_')}"
    if writing.seconds or skipped.broken[writing.planned :]:
        told = ", ".join(map(str, writing.report(name, shards)))
        each = f"{writing.seconds_per_clip:.2f} s each"
        count, damaged = len(writing.seconds), len(skipped.broken)
        stages.note(f"{count} clips, {each}, {damaged} damaged: {told}")
    return 0


_PATHS = ("vae_path", "text_encoder_path", "tokenizer_path")


def _about(weights: dict[str, Any], settings: Settings, image: bool) -> dict[str, Any]:
    """What the clips of all shards were made with, as JSON values."""
    return {"weights": weights, "fps": settings.fps, "image": image}


if __name__ == "__main__":
    cli.run(main)
