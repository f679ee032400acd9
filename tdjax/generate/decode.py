"""`tdjax decode FILE`: saved latents to a video. jax is imported after everything cheap is
checked."""

from __future__ import annotations

import argparse
from pathlib import Path

from tdjax import cli

if __name__ == "__main__":
    cli.heed_signals()

from tdjax.checkpoints.locate import PATHS
from tdjax.config.parsing import json_object
from tdjax.errors import UsageError
from tdjax.files import near_files, refuse_inputs
from tdjax.pipeline.result import Result, check_save, sidecar


def build_parser() -> argparse.ArgumentParser:
    """Every option of the command."""
    p = cli.Parser(
        "tdjax decode",
        usage="%(prog)s FILE [options]",
        description="Latents that `tdjax generate --format latents` wrote, to a video.",
    )
    p.add_argument("file", metavar="FILE", type=cli.path, help="latents, a .safetensors file")
    p.add_argument(
        "-o",
        "--output",
        metavar="PATH",
        type=cli.path,
        help="where to; the suffix chooses the format (default: beside FILE, .mp4)",
    )
    p.add_argument(
        "--model",
        help="whose decoder; default: the one that the .json beside FILE names, else demo",
    )
    p.add_argument("--vae_path", metavar="PATH", type=cli.path, help="decoder, instead of its own")
    p.add_argument(
        "--vae",
        choices=("auto", "full", "tiled"),
        default="auto",
        help="decode whole frames or tiles; auto: tiles where a frame does not fit",
    )
    p.add_argument("--fps", type=int, help="of the file; default: as the .json says, else 16")
    p.add_argument("--crf", type=int, default=17, help="quality of mp4 and webm; lower is better")
    p.add_argument("--overwrite", action="store_true", help="replace the file")
    return p


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 ok, 2 usage, 3 checkpoint, 4 out of memory, 5 not finite, 130 interrupted."""
    return cli.main(_command, argv, parser=build_parser)


def _command(argv: list[str]) -> int:
    args = build_parser().parse_args(argv)
    if not args.file.is_file():
        raise UsageError(
            f"{args.file} is a folder" if args.file.is_dir() else f"{args.file} does not exist",
            "the file of latents is to be decoded",
            near_files(args.file),
        )
    model, path = args.model or _model_of(args.file), args.output or args.file.with_suffix(".mp4")
    given = Result.load(args.file)
    count = len(given)
    targets = [path.with_stem(f"{path.stem}_{i}") if count > 1 else path for i in range(count)]
    for target in targets:
        refuse_inputs(target, [args.file, *filter(None, [args.vae_path])])
        check_save(
            target, fps=args.fps or 16, crf=args.crf, metadata=True, overwrite=args.overwrite
        )
    from tdjax.pipeline.load import open_pipeline
    from tdjax.pipeline.options import PipelineOptions
    from tdjax.progress import Bar

    note = cli.set_compile_cache()
    stages = Bar()
    if note:
        stages.note(note)
    cli.start_jax(stages.note)
    paths = dict.fromkeys(PATHS) | {"vae_path": args.vae_path}
    options = PipelineOptions(vae=args.vae, text_encoder=False)
    pipe = open_pipeline(model, options, paths, stages=stages)
    for video, target in zip(pipe.decode(given, fps=args.fps), targets, strict=True):
        print(video.save(target, crf=args.crf, overwrite=args.overwrite))
    return 0


def _model_of(file: Path) -> str:
    """The model that the metadata beside a file names."""
    if not sidecar(file).is_file():
        return "demo"
    try:
        return str(json_object(sidecar(file).read_bytes())["model"])
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(
            f"{sidecar(file)} names no model", str(error), "give --model NAME"
        ) from error


if __name__ == "__main__":
    cli.run(main)
