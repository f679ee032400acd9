"""Where the videos of a command go: all names known, and refused or skipped, before anything
runs."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import re
import string
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import Any

from tdjax import files
from tdjax.checkpoints.locate import PATHS
from tdjax.cli import lora_pair
from tdjax.errors import UsageError
from tdjax.files import refuse_inputs, refuse_unwritable
from tdjax.generate.jobs import Job
from tdjax.generate.resume import finished, replaceable, shown
from tdjax.media.video import (
    Writer,
    check_settings,
    comment_of,
    enlarged,
    target_notes,
    write,
)
from tdjax.pipeline.result import check_save, sidecar, write_json
from tdjax.progress import Stages

DEFAULT = "output/{model}_{seed}_{index}.mp4"
# prompt files: the row keeps equal prompts apart
DEFAULT_ROWS = "output/{model}_{row}_{prompt_slug}_{seed}_{index}.mp4"
FIELDS = ("model", "seed", "index", "prompt_slug", "date", "row")
DEMO_UPSCALE = 6  # the embedded model's 64 pixels are a stamp in a player
PREVIEW_UPSCALE = 4  # of previews with a pixel for each latent: half the video's sides
PREVIEW = "tdjax: a preview, which is replaced and removed"  # the comment of these files
_VIEWED = (".mp4", ".webm", ".gif")  # what people look at; other files are read by programs
SUFFIX = {"png": "", "latents": ".safetensors"}


def template(args) -> str:
    """The template of the command's file names. A row's `out` is a name as it stands, not one."""
    return args.save_path or (DEFAULT_ROWS if args.prompt_file else DEFAULT)


def check_early(args) -> None:
    """Whatever can be refused about the command's files before the model's name is known: fields of
    the template, suffix and settings of the file, a folder that cannot be written, and names
    without fields that are there. Raises UsageError."""
    text = template(args)
    path = check_template(text, args.format)
    if path.suffix != SUFFIX["latents"]:
        check_settings(path, args.fps, args.crf)
    if args.save_path and not args.prompt_file and "{" not in text:
        job = Job(prompt="", seed=args.seed, image=args.image_path)
        _check(args, job, targets(args, "", job), args.overwrite)
    elif "{" not in str(Path(text).parent):
        refuse_unwritable(path)


def check_template(text: str, given_format: str | None) -> Path:
    """An example of the paths that a template means. Raises UsageError for unknown fields, and for
    a suffix that contradicts --format."""
    try:
        path = Path(_filled(text, "model", Job(prompt="prompt", seed=0), 0))
    except (KeyError, IndexError, ValueError) as error:
        why = str(error).strip("'\"")
        raise UsageError(
            f"--save_path {text}: {why}",
            f"fields are {', '.join(FIELDS)}, with a format such as {{index:03d}}",
            "{{ and }} stand for braces in the name",
        ) from error
    suffix = given_format and SUFFIX.get(given_format, f".{given_format}")
    if given_format and text not in (DEFAULT, DEFAULT_ROWS) and path.suffix not in ("", suffix):
        raise UsageError(
            f"--format {given_format} and --save_path {text}",
            "the suffix says another format",
            "give one of them",
        )
    return path if suffix is None else path.with_suffix(suffix)


def _names(text: str) -> set[str]:
    """The fields of a template. Raises ValueError for a brace that is not closed."""
    return {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}


def _filled(text: str, model: str, job: Job, index: int) -> str:
    """The template with its fields. Raises KeyError for an unknown one, ValueError for a format
    that its kind of value does not have."""
    slug = re.sub(r"\W+", "-", (job.prompt or "embeds").lower()).strip("-")[:40]
    values = {
        "model": model,
        "seed": job.seed,
        "index": index,
        "prompt_slug": slug,
        "date": datetime.date.today(),
        "row": job.row,
    }
    if unknown := sorted(_names(text) - values.keys()):
        raise KeyError(f"unknown field {{{unknown[0]}}}")
    if re.search(r"\{\w+:[^{}]*[0-9]{4}", text):
        raise ValueError("a field is a thousand characters wide or more")
    return text.format(**values)


def _path(args, model: str, job: Job, index: int, count: int) -> Path:
    """The path of one sample."""
    text = template(args)
    path = Path(job.out or _filled(text, model, job, index))
    if args.format:
        path = path.with_suffix(SUFFIX.get(args.format, f".{args.format}"))
    numbered = job.out is None and "index" in _names(text)
    return path if numbered or count == 1 else path.with_stem(f"{path.stem}_{index}")


def targets(args, name: str, job: Job) -> list[Path]:
    """All files of a job, one a sample, or the tiled one. A default name that is taken gives way:
    demo_0_0-2.mp4."""
    paths = _numbered(args, name, job, 0)
    if args.overwrite or args.prompt_file or template(args) != DEFAULT:
        return paths
    return [_unused(path) for path in paths]


def _numbered(args, name: str, job: Job, first: int) -> list[Path]:
    """The files of a job, where `{index}` begins with `first`."""
    count = 1 if args.grid else args.num_samples
    return [_path(args, name, job, first + index, count) for index in range(count)]


def _going_on(
    args, name: str, job: Job, taken: Container[Path], session: bool, begun: dict[Path, int]
) -> list[Path]:
    """The files of a job; `{index}` goes on where an earlier row has the names, and in a session
    also where there are files of that name.

    begun: {file of index 0: where `{index}` went on last}, so that many rows do not each begin at
           0.
    """
    if job.out is not None or "index" not in _names(template(args)):
        return targets(args, name, job)
    paths = _numbered(args, name, job, 0) if session else targets(args, name, job)
    beside = session and not args.overwrite
    start = _place(paths[0])
    first = begun.get(start, 0)
    if first:
        paths = _numbered(args, name, job, first)
    while any(_place(path) in taken or (beside and _there(path)) for path in paths):
        first += 1
        paths = _numbered(args, name, job, first)
    begun[start] = first
    return paths


def preview_of(path: Path) -> Path:
    """Where the previews of a video are seen."""
    return path.with_name(f"{path.stem}_preview.mp4")


def _next(path: Path) -> Path:
    """The next unused name after one that is taken: demo_0_0.mp4, demo_0_0-2.mp4."""
    stem, _, number = path.stem.rpartition("-")
    if stem and number.isascii() and number.isdecimal():
        return _unused(path.with_stem(f"{stem}-{int(number) + 1}"))
    return _unused(path.with_stem(f"{path.stem}-2"))


def _place(path: Path) -> Path:
    """The one name of a file that rows may spell in several ways."""
    return Path(os.path.abspath(path))


def _there(path: Path) -> bool:
    return path.exists() or sidecar(path).exists()


def _unused(path: Path) -> Path:
    number, candidate = 1, path
    while _there(candidate):
        number += 1
        candidate = path.with_stem(f"{path.stem}-{number}")
    return candidate


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A job with its files, one a sample, or the tiled one. overwrite: whether those that are there
    may be replaced."""

    job: Job
    paths: list[Path]
    overwrite: bool


def assign(
    args,
    name: str,
    jobs: list[Job],
    note: Callable[[str], None],
    facts: Callable[[Job], dict[str, Any]],
    session: dict[Path, int] | None = None,
) -> list[Task]:
    """What is to be made. Rows of a prompt file whose videos are there are skipped, if these were
    made in the same way; anything else in the way is refused.

    facts:   gives what the metadata of a job's videos will be.
    session: {file: row} of the lines before in an interactive session, to which those of these jobs
             are added.
    """
    todo: list[Task] = []
    lines: dict[str, None] = {}
    taken = {} if session is None else session
    begun: dict[Path, int] = {}
    for job in jobs:
        paths = _going_on(args, name, job, taken, session is not None, begun)
        for path in map(_place, paths):
            if path in taken:
                raise UsageError(
                    f"two videos would be written to {path}",
                    f"rows {taken[path]} and {job.row}",
                    "give each row its own out" if session is None else ":set save_path NAME",
                )
            taken[path] = job.row
        task = remaining(args, job, paths, note, facts)
        if task is not None:
            lines |= dict.fromkeys(target_notes(paths[0], args.fps, args.crf))
            todo.append(task)
    if args.grid and args.num_samples == 1:
        lines["--grid has no effect: there is one sample"] = None
    for line in lines:
        note(line)
    return todo


def remaining(
    args,
    job: Job,
    paths: list[Path],
    note: Callable[[str], None],
    facts: Callable[[Job], dict[str, Any]],
) -> Task | None:
    """What is to be made of a job with these files; None for a row that is done. Raises UsageError
    for anything else in the way."""
    overwrite = args.overwrite
    if args.prompt_file and not overwrite and any(map(_there, paths)):
        if finished(args, paths, facts(job), note):
            return None
        overwrite = replaceable(args, paths)  # an interrupted row is made anew, whole
    _check(args, job, paths, overwrite)
    return Task(job=job, paths=paths, overwrite=overwrite)


def inputs(args, image: str | None) -> list[Path]:
    """Files that a video is made from, as far as they are named by their paths."""
    loras = [lora_pair(text)[0] for text in (*args.lora, *args.lora_high, *args.lora_low)]
    named = [image, args.latents, args.prompt_embeds, args.prompt_file, args.model, *loras]
    named += [getattr(args, name) for name in PATHS]
    return [Path(name) for name in named if name]


def _check(args, job: Job, paths: list[Path], overwrite: bool) -> None:
    metadata = args.metadata == "on"
    for path in paths:
        if overwrite:
            refuse_inputs(path, inputs(args, job.image))
        check_save(path, fps=args.fps, crf=args.crf, metadata=metadata, overwrite=overwrite)
        if args.preview:
            _check_preview(preview_of(path))


def _check_preview(path: Path) -> None:
    """Raises UsageError for a file where previews would go, a name that nobody has given: only
    those of a run that was killed are replaced."""
    if os.path.lexists(path) and comment_of(path) != PREVIEW:
        raise UsageError(
            f"{path} exists",
            "previews of the video would go there, and be removed at its end",
            "give the video another name, or move this file",
        )


@contextlib.contextmanager
def claimed(args, task: Task, note: Callable[[str], None]) -> Iterator[list[Path] | None]:
    """The files of a task, which no other process makes while the block runs. A default name gives
    way to other processes as it does to files; None for a row that another one makes or has made.
    Raises UsageError for a name that was asked for and is taken."""
    gives_way = not (args.overwrite or args.prompt_file) and template(args) == DEFAULT
    paths = task.paths
    with contextlib.ExitStack() as stack:
        while True:
            mine = stack.enter_context(files.claimed(paths))
            free = mine and (task.overwrite or not any(map(_there, paths)))
            if free or not gives_way:
                break
            stack.close()
            paths = [_next(path) for path in paths]
        if args.prompt_file and not free:
            note(f"{shown(paths)} is made by another process: skipped")
            yield None
            return
        if not mine:
            raise UsageError(
                f"{shown(paths)} is being made by another process",
                "two videos of one name would be one",
                "give another save_path",
            )
        _check(args, task.job, paths, task.overwrite)
        yield paths


class Files:
    """The files of one job, encoded in a thread while the frames are decoded. None of them is there
    before `finish`; previews are, until then.

    with Files(args, pipe.stages, paths, facts, overwrite=False) as made:
        made.finish(pipe(prompt, **arguments, **made.listen))

    facts: the metadata of all videos.
    """

    def __init__(
        self,
        args,
        stages: Stages,
        paths: list[Path],
        facts: dict[str, Any],
        *,
        overwrite: bool,
        demo: bool = False,
    ):
        self.args, self.stages, self.paths, self.facts = args, stages, paths, facts
        self.upscale = args.upscale or (DEMO_UPSCALE if demo else 1)
        if args.upscale is None and not all(path.suffix in _VIEWED for path in paths):
            self.upscale = 1
        self.options = {"crf": args.crf, "overwrite": overwrite}
        self.writers: dict[int, Writer] = {}
        # a grid and latents are made of what is there at the end only
        self.whole = args.grid or any(path.suffix == ".safetensors" for path in paths)
        self.listen: dict[str, Callable] = {} if self.whole else {"on_frames": self.take}
        self.previews = set[Path]()
        if args.preview:
            self.listen["on_preview"] = self.show

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        for writer in self.writers.values():
            writer.cancel()  # of no effect on one that is closed
        for path in self.previews:
            path.unlink(missing_ok=True)

    def show(self, step: int, frames) -> None:
        """Puts the preview of a step in the place of the one before. Of a grid, the sample that is
        made; of videos that are made together, the first."""
        path = preview_of(self.paths[min(self.stages.listener.first, len(self.paths) - 1)])
        if not self.previews:
            self.stages.tell(f"what each step predicts: {path}")
        self.previews.add(path)
        clip = self.facts["size"]
        factor = self.upscale if frames.shape[1] == clip["height"] else PREVIEW_UPSCALE
        fps = self.args.fps * len(frames) / clip["frames"]
        write(path, enlarged(frames, factor), fps=fps, metadata=PREVIEW, overwrite=True)

    def take(self, index: int, frames) -> None:
        if index not in self.writers:
            facts = json.dumps({**self.facts, "index": index, "fps": self.args.fps})
            metadata = facts if self.args.metadata == "on" else None
            self.writers[index] = Writer(
                self.paths[index], fps=self.args.fps, metadata=metadata, **self.options
            )
        self.writers[index].put(enlarged(frames, self.upscale))

    def finish(self, result) -> None:
        """Complete every file; each path on stdout once it is there."""
        metadata = self.args.metadata == "on"
        facts = {**self.facts, "timings": result.timings}
        result = dataclasses.replace(result, metadata=facts)
        if self.args.grid:
            result = _tiled(result)
        for index, path in enumerate(self.paths):
            with self.stages("write"):
                if not self.whole:
                    self.writers[index].close()
                    if metadata:
                        facts = {**result.metadata, "index": index, "fps": self.args.fps}
                        write_json(sidecar(path), facts)
                else:
                    result.save(
                        path,
                        index=index,
                        metadata=metadata,
                        upscale=self.upscale,
                        **self.options,
                    )
            with self.stages.aside():
                tell(self.args, path, result.seed, index, result.timings)


def listening(made: list[Files]) -> dict[str, Callable]:
    """Returns what a call that makes the videos of several jobs, one after another, tells their
    files; a preview shows the first."""
    if len(made) == 1:
        return made[0].listen
    each = made[0].args.num_samples

    def take(number: int, frames) -> None:
        files = made[number // each]
        if not files.whole:
            files.take(number % each, frames)

    return {**made[0].listen, "on_frames": take}


def divided(result, made: list[Files]) -> list:
    """Returns the result of each of the jobs that one call has made."""
    if len(made) == 1:
        return [result]
    each = len(result) // len(made)
    part = lambda array, job: None if array is None else array[job * each : (job + 1) * each]
    return [
        dataclasses.replace(
            result,
            frames=part(result.frames, job),
            latents=part(result.latents, job),
            seed=result.seed[job],
        )
        for job in range(len(made))
    ]


def tell(args, path: Path, seed: int | None, index: int, timings: dict[str, float]) -> None:
    """Writes on stdout that a file is there."""
    line = {"path": str(path), "seed": seed, "index": index, "timings": timings}
    print(json.dumps(line) if args.json else path, flush=True)


def _tiled(result):
    """All samples side by side, as the official scripts write them."""
    from einops import rearrange

    columns = max(
        n for n in range(1, len(result) + 1) if len(result) % n == 0 and n * n <= len(result)
    )
    frames = rearrange(
        result.frames, "(r c) t h w k -> 1 t (r h) (c w) k", c=len(result) // columns
    )
    return dataclasses.replace(result, frames=frames, latents=result.latents[:1])
