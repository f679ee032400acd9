"""`python -m tdjax.train.synthesize PROMPTS --out SHARDS`: prompts to shards, by a teacher's many
steps; or their embeddings alone. jax is imported after everything cheap is checked."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import time
from collections.abc import Iterator
from typing import Any

from tdjax import cli
from tdjax.errors import UsageError
from tdjax.files import claimed, refuse_unwritable
from tdjax.text.rows import read_prompts
from tdjax.train import made
from tdjax.train.made import parse_part

EXAMPLES = """\
examples:
  python -m tdjax.train.synthesize prompts.txt --model wan2.1-t2v-14b --out shards
  python -m tdjax.train.synthesize prompts.txt --model wan2.1-t2v-1.3b --part 1/8 --out shards
  python -m tdjax.train.synthesize prompts.txt --text_only --out shards

The same command goes on where it was stopped."""
# Arguments of a pipeline's call that are options here.
_CALL = ("resolution", "aspect_ratio", "width", "height", "num_frames", "num_steps", "sampler")
_CALL += ("sigma_max", "shift", "guidance_scale", "negative_prompt")


# What metadata says of a video beside its weights, prompt and seed.
_OF_VIDEOS = ("size", "sampler", "negative_prompt")


@dataclasses.dataclass(frozen=True)
class Part:
    """Prompts that go into one shard. first: number of the first of them in the file."""

    number: int
    first: int
    prompts: tuple[str, ...]

    @property
    def name(self) -> str:
        """Its file."""
        return f"shard_{self.number:06}.tar"

    def identity(self) -> str:
        """Returns a hash of its prompts."""
        return hashlib.sha256(json.dumps(self.prompts).encode()).hexdigest()


def build_parser() -> argparse.ArgumentParser:
    """Every option of the command."""
    p = cli.Parser(
        "python -m tdjax.train.synthesize",
        usage="%(prog)s PROMPTS --out SHARDS [options]",
        description="A teacher's videos of prompts, as shards of latents that training reads.",
        epilog=EXAMPLES,
    )
    p.add_argument(
        "prompts",
        metavar="PROMPTS",
        type=cli.path,
        help=".txt (one a line), .csv, .tsv, .json or .jsonl with a column prompt",
    )
    p.add_argument("--out", metavar="SHARDS", type=cli.path, help="folder of the shards")
    p.add_argument(
        "--text_only",
        action="store_true",
        help="embeddings alone, for distribution matching without data",
    )
    model = p.add_argument_group("teacher")
    model.add_argument("--model", default="demo", help="a preset, hub id, file or folder")
    model.add_argument("--offline", action="store_true", help="never ask the hub")
    for name, kind, text in (
        ("resolution", str, "480p or 720p"),
        ("aspect_ratio", str, "such as 16:9"),
        ("width", int, "in pixels, with --height"),
        ("height", int, "in pixels"),
        ("num_frames", int, "4k+1"),
        ("num_steps", int, "of the sampler"),
        ("sampler", str, "unipc or euler; sde or ode for distilled weights"),
        ("sigma_max", float, "where sampling begins"),
        ("shift", float, "of the times, towards noise"),
        ("guidance_scale", float, "of undistilled weights"),
        ("negative_prompt", str, "what videos should not show"),
    ):
        model.add_argument(f"--{name}", type=kind, help=f"{text}; default: the model's own")
    work = p.add_argument_group("work")
    work.add_argument(
        "--seed", type=int, default=0, help="of the first prompt; each one has the next"
    )
    work.add_argument("--part", metavar="I/N", help="the I-th of N processes that share the shards")
    work.add_argument("--shard_size", type=int, default=256, help="samples in a file")
    work.add_argument("--dry_run", action="store_true", help="say what would be made, and stop")
    work.add_argument("-q", "--quiet", action="store_true", help="no progress")
    work.add_argument(
        "-v", "--verbose", action="store_true", help="progress also where stderr is not a terminal"
    )
    return p


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 ok, 2 usage, 3 checkpoint, 4 out of memory, 5 not finite, 130 interrupted."""
    kept = "shards are whole; the same command goes on"
    return cli.main(_command, argv, parser=build_parser, interrupted=kept)


def _command(argv: list[str]) -> int:
    args = build_parser().parse_args(argv)
    place, count = check_early(args)
    prompts = read_prompts(args.prompts)
    parts = divided(prompts, args.shard_size)
    if args.dry_run:
        print(f"{len(prompts)} prompts in {len(parts)} shards, {len(parts[place::count])} here")
        return 0
    return run(args, parts[place::count])


def check_early(args: argparse.Namespace) -> tuple[int, int]:
    """Returns (place, count) of this process. Raises UsageError for whatever is wrong with the
    options."""
    if args.out is None:
        raise UsageError("--out is not given", "shards are written there", "give --out FOLDER")
    if args.shard_size < 1:
        raise UsageError(
            f"--shard_size is {args.shard_size}", "at least 1 is needed", "leave it away for 256"
        )
    if not 0 <= args.seed < 2**31:
        raise UsageError(f"--seed is {args.seed}", "a whole number from 0 to 2147483647", "use 0")
    if not args.dry_run:
        refuse_unwritable(args.out / "shard")
    return parse_part(args.part)


def divided(prompts: list[str], size: int) -> list[Part]:
    """Returns prompts as shards of `size`, in their order."""
    starts = range(0, len(prompts), size)
    return [Part(i, at, tuple(prompts[at : at + size])) for i, at in enumerate(starts)]


def run(args: argparse.Namespace, parts: list[Part]) -> int:
    cache_note = cli.set_compile_cache()
    from tdjax.progress import Stages

    stages = Stages(False if args.quiet else args.verbose or None)
    if cache_note:
        stages.note(cache_note)
    cli.start_jax(stages.note)
    from tdjax.checkpoints.locate import PATHS
    from tdjax.pipeline.load import open_pipeline
    from tdjax.pipeline.options import PipelineOptions

    options = PipelineOptions(prompt_cache=False)
    paths = dict.fromkeys(PATHS)
    pipe = open_pipeline(args.model, options, paths, offline=args.offline, stages=stages)
    call = {name: getattr(args, name) for name in _CALL if getattr(args, name) is not None}
    request = pipe.request("", **call)  # whatever is wrong with the options is told here
    if pipe.info.distilled and not args.text_only:
        stages.note(f"{pipe.name} is distilled: data are usually made by undistilled weights")
    about = _about(pipe.metadata(request), args.text_only)
    for part in parts:
        path = args.out / part.name
        wanted = {**about, "seed": args.seed + part.first, "prompts": part.identity()}
        if not made.finished(path, wanted):
            with claimed([path]) as mine:
                if not mine:
                    stages.note(f"{path} is being made by another process: left to it")
                    continue
                begun = time.monotonic()
                samples = _samples(pipe, part, None if args.text_only else call, args.seed)
                count = len(part.prompts)
                end = lambda begun=begun, wanted=wanted, count=count: {
                    **wanted,
                    "samples": count,
                    "seconds": round(time.monotonic() - begun, 2),
                }
                made.write(path, samples, part.first, end)
        print(path)
    return 0


def _samples(pipe, part: Part, call: dict[str, Any] | None, seed: int) -> Iterator[tuple]:
    """(latents [t h w c], or None without a call; text [s d]; prompt) of the prompts of a shard.
    The seed of a video is that of its place in the file."""
    rows = pipe.embed(list(part.prompts))
    for number, (prompt, text) in enumerate(zip(part.prompts, rows, strict=True), part.first):
        latents = None
        if call is not None:
            own = {**call, "prompt_embeds": text[None], "seed": seed + number}
            latents = pipe(None, output_type="latent", **own).latents[0]
        yield latents, text, prompt


def _about(metadata: dict[str, Any], text_only: bool) -> dict[str, Any]:
    """What all shards are made with, as JSON values: the model, its files, size and sampler."""
    names = ["model", "files"] if text_only else [*_OF_VIDEOS, "model", "files"]
    return {name: metadata[name] for name in names} | {"text_only": text_only}


if __name__ == "__main__":
    cli.run(main)
