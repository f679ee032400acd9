"""`python -m tdjax.train.evaluate MODEL --prompts FILE --out FOLDER`: videos of a prompt set under
VBench's names, what can be measured of them without another network, and how far they are from
those of another folder."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from tdjax import cli
from tdjax.errors import UsageError
from tdjax.files import near_files, refuse_unwritable, write_text
from tdjax.text.rows import read_prompts
from tdjax.train import made

_LONGEST = 240  # bytes of a file's name; file systems have room for 255
_TEXT = ("prompt", "prompt_en")  # columns of a prompt set: our own name, and VBench's
_MADE = "made"  # the file in the folder that says how its videos were made
_COMPARED = ("model", "files", "lora", "size", "sampler")  # of a video's metadata


def build_parser() -> argparse.ArgumentParser:
    p = cli.Parser(
        "python -m tdjax.train.evaluate",
        usage="%(prog)s [MODEL] --prompts FILE --out FOLDER [--against FOLDER] [options]",
        description=(
            "Make the videos of a prompt set, as FOLDER/PROMPT-INDEX.mp4, and measure them. What"
            " the same model and options have made in the folder already is not made again."
        ),
    )
    p.add_argument("model", nargs="?", help="as tdjax generate takes it; none: only measure")
    p.add_argument(
        "--prompts",
        type=cli.path,
        help=".txt (one a line), .csv, .tsv, .json or .jsonl with a column prompt or prompt_en",
    )
    p.add_argument("--out", type=cli.path, help="where videos, latents and the table go")
    p.add_argument(
        "--against",
        type=cli.path,
        help="another such folder, of the same prompts and seeds: a teacher's, for example",
    )
    p.add_argument("--samples", type=int, default=5, help="videos of each prompt, as VBench wants")
    p.add_argument("--seed", type=int, default=0, help="of the first video of each prompt")
    p.add_argument("--limit", type=int, help="only the first prompts")
    p.add_argument("--dit_path", type=cli.path, help="another transformer, such as RUN/dit")
    p.add_argument(
        "--lora",
        type=cli.lora_pair,
        action="append",
        default=[],
        metavar="FILE[:WEIGHT]",
        help="merged at load; may be given more than once",
    )
    p.add_argument("--num_steps", type=int, help="of the sampler; none: the model's own")
    p.add_argument("--num_frames", type=int, help="4k+1; none: the model's own")
    p.add_argument("--resolution", help="480p or 720p; none: the model's own")
    p.add_argument("--aspect_ratio", help="such as 16:9")
    p.add_argument("--offline", action="store_true", help="never ask the hub")
    p.add_argument("-q", "--quiet", action="store_true", help="no progress")
    return p


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 ok, 2 usage, 3 checkpoint, 4 out of memory, 130 interrupted."""
    kept = "videos are whole; the same command goes on with those that are not there"
    return cli.main(_command, argv, parser=build_parser, interrupted=kept)


def _command(argv: list[str]) -> int:
    args = build_parser().parse_args(argv)
    _check(args)
    videos = named(prompt_set(args.prompts, args.limit), args.samples)
    if args.model is not None:
        cache_note = cli.set_compile_cache()
        from tdjax.progress import Stages

        stages = Stages(not args.quiet)
        if cache_note:
            stages.note(cache_note)
        cli.start_jax(stages.note)
        _make(args, videos, stages)
    from tdjax.train.evaluate import measures

    print(measures.write(args.out, videos, args.against))
    return 0


def _check(args: argparse.Namespace) -> None:
    for name in ("prompts", "out"):
        if getattr(args, name) is None:
            raise UsageError(
                f"--{name} is not given",
                "a prompt set and a folder are needed",
                "for example --prompts prompts.txt --out runs/evaluation",
            )
    for name, least in (("samples", 1), ("limit", 1), ("seed", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise UsageError(f"--{name} is {value}", f"it is at least {least}", "give a larger one")
    if args.against is not None and not Path(args.against).is_dir():
        raise UsageError(
            f"--against {args.against} is not a folder",
            "it is what --out was in another call",
            near_files(Path(args.against)),
        )
    refuse_unwritable(Path(args.out) / "table.md")


def prompt_set(path: Path, limit: int | None = None) -> list[str]:
    """Returns the texts of a prompt set, each once, in order. Raises UsageError."""
    return list(dict.fromkeys(read_prompts(path, _TEXT)))[:limit]


def named(prompts: list[str], samples: int) -> list[tuple[str, str, int]]:
    """Returns (name, prompt, index) of every video, the prompt first in its name as VBench reads
    it. What no file's name can have becomes a space; long ones are cut. Raises UsageError where
    two would have one name."""
    out, seen = [], {}
    for prompt in prompts:
        stem = " ".join(prompt.replace("/", " ").replace("\0", " ").split())
        stem = stem.encode()[:_LONGEST].decode(errors="ignore").strip()
        if stem in seen:
            raise UsageError(
                f"two prompts would have the files {stem[:60]}...",
                f"their first {_LONGEST} bytes are the same",
                "shorten one of them",
            )
        seen[stem] = prompt
        out += [(f"{stem}-{index}", prompt, index) for index in range(samples)]
    return out


def _make(args: argparse.Namespace, videos: list[tuple[str, str, int]], stages) -> None:
    """Makes the videos that are not there. Raises UsageError where others are, of another model or
    of other options: their names say the prompt alone."""
    from tdjax.pipeline.load import load
    from tdjax.train.evaluate import measures

    out = Path(args.out)
    missing = [video for video in videos if not measures.there(out, video[0])]
    if stages.show:
        stages.tell(f"{len(missing)} of {len(videos)} videos are to be made")
    pipe = load(
        args.model,
        dit_path=args.dit_path,
        lora=tuple(args.lora),
        offline=args.offline,
        progress=False,
    )
    own = ("num_steps", "num_frames", "resolution", "aspect_ratio")
    options = {name: getattr(args, name) for name in own}
    about = pipe.metadata(pipe.request(videos[0][1], **options))
    _hold(out, {name: about[name] for name in _COMPARED} | {"seed": args.seed})
    for number, (name, prompt, index) in enumerate(missing, 1):
        result = pipe(prompt, seed=args.seed + index, **options)
        measures.keep(out, name, result.pixels(), result.latents[0], fps=result.fps)
        if stages.show:
            stages.tell(f"{number}/{len(missing)} {name}.mp4")


def _hold(out: Path, wanted: dict[str, Any]) -> None:
    """Writes how the videos of a folder are made, beside them. Raises UsageError where some are
    there that were made otherwise."""
    about = made.sidecar(out / _MADE)
    others = made.differing(about, wanted)
    if others and next(out.glob("*.mp4"), None) is not None:
        raise UsageError(
            f"{out} holds videos that were made otherwise",
            f"other {', '.join(others)}" if about else "nothing says how they were made",
            "give another folder; without MODEL they are only measured",
        )
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / f"{_MADE}.json", json.dumps(wanted, indent=1) + "\n")


if __name__ == "__main__":
    cli.run(main)
