"""What a command has to make: the rows of a prompt file, or the one video of the command line.

Prompt files are read as people have them: lines, tables from spreadsheets, JSON. What is unclear is
refused with the row, before anything runs. Imports no jax.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import os
import re
import secrets
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tdjax.config.values import DIGITS, LIMIT, parse_whole, shown
from tdjax.config.values import path as checked_path
from tdjax.errors import UsageError
from tdjax.files import near
from tdjax.text.characters import repaired
from tdjax.text.rows import SHEETS, SUFFIXES, rows_of

COLUMNS = ("prompt", "seed", "image", "num_frames", "out")
_NUMBERS = ("seed", "num_frames")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One video request. drawn: whether nobody asked for this seed. out is a path as it stands, not
    a template; None where the command says where videos go."""

    prompt: str | None
    seed: int
    drawn: bool = False
    image: str | None = None
    num_frames: int | None = None
    out: str | None = None
    row: int = 1


def read_jobs(
    args: argparse.Namespace,
    default_prompt: str | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> list[Job]:
    """The prompt file's rows, or one job from the command line. Raises UsageError."""
    own = Job(prompt=args.prompt, seed=args.seed, image=args.image_path, num_frames=args.num_frames)
    if args.prompt_file:
        if args.prompt:
            raise UsageError("--prompt and --prompt_file", "both give the text", "give one of them")
        return _read_prompt_file(args.prompt_file, own, note)
    if args.prompt == "-":
        own = dataclasses.replace(own, prompt=standard_input().read().strip())
    if own.prompt is None and not args.prompt_embeds and default_prompt:
        own = dataclasses.replace(own, prompt=default_prompt)
    return [_with_clean_prompt(with_seed(own, note), note, "the prompt")]


def standard_input():
    """sys.stdin, with bytes that are not UTF-8 let through for `repaired` to replace."""
    if sys.stdin is None:
        raise UsageError(
            "standard input is closed",
            "prompts were to be read from it",
            "give --prompt or --prompt_file FILE",
        )
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    return sys.stdin


def with_seed(job: Job, note: Callable[[str], None], where: str = "") -> Job:
    """The job with a seed drawn where it asks for none, by a negative one."""
    if job.seed >= 0:
        return job
    seed = drawn_seed()
    note(f"{where}seed {seed}")
    return dataclasses.replace(job, seed=seed, drawn=True)


def drawn_seed() -> int:
    """A seed for those who gave a negative one."""
    return secrets.randbelow(2**31)


def _with_clean_prompt(job: Job, note: Callable[[str], None], where: str) -> Job:
    if job.prompt is None or (prompt := repaired(job.prompt)) == job.prompt:
        return job
    note(f"{where} holds characters that are not UTF-8: U+FFFD stands in their place")
    return dataclasses.replace(job, prompt=prompt)


def _read_prompt_file(name: str, own: Job, note: Callable[[str], None]) -> list[Job]:
    path = Path(name).expanduser()
    suffix = path.suffix.lower()
    if suffix not in ("", *SUFFIXES):
        close = near(suffix, SUFFIXES, cutoff=0.4)
        fix = f"did you mean {close[0]}?" if close else "name it .txt for one prompt a line"
        raise UsageError(
            f"--prompt_file {name} has the suffix {path.suffix!r}",
            f"read are {', '.join(SUFFIXES)}, and no suffix (one prompt a line)",
            "save the table as .csv" if suffix in SHEETS else fix,
        )
    try:
        data = standard_input().buffer.read() if name == "-" else path.read_bytes()
        rows = rows_of(data, suffix, COLUMNS)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"--prompt_file {name} cannot be read",
            str(error),
            ".txt (one prompt a line), .csv or .jsonl",
        ) from error
    if not rows:
        raise UsageError(
            f"{name} holds no prompts", "it is empty, or only comments", "one prompt a line"
        )
    return [_job(name, number, row, own, note) for number, row in enumerate(rows, 1)]


def _job(name: str, number: int, row: Any, own: Job, note: Callable[[str], None]) -> Job:
    """One row over the options of the command. Raises UsageError with its number."""
    values = {"prompt": row} if isinstance(row, str) else row
    if wrong := _wrong(values):
        raise UsageError(
            f"{name}, row {number}: {wrong}",
            f"columns are {', '.join(map(repr, COLUMNS))}; 'seed', 'num_frames': whole numbers",
            "only prompt is needed",
        )
    given = {k: str(v).strip() for k, v in values.items() if v not in (None, "")}
    given |= {k: parse_whole(given[k].partition(".")[0]) for k in _NUMBERS if k in given}
    for column in ("image", "out"):
        if column in given:
            place = os.path.expanduser(given[column])
            given[column] = str(checked_path(f"{name}, row {number}: {column}", place))
    job = with_seed(dataclasses.replace(own, row=number, **given), note, f"row {number}: ")
    return _with_clean_prompt(job, note, f"row {number}")


def _wrong(row: Any) -> str | None:
    """What is wrong with a row, or None."""
    if not isinstance(row, dict):
        return "not a table row"
    if unknown := [column for column in row if column not in COLUMNS]:
        return f"unknown column {unknown[0]!r}"
    if not str(row.get("prompt") or "").strip():
        return "no prompt"
    # 3.0 is 3: spreadsheets write whole numbers so; 3.000 is three thousand to half of them
    whole = rf"[+-]?[0-9]{{1,{DIGITS}}}(\.(?!000$)0*)?|"
    for column, value in row.items():
        if value is None:
            continue
        plain = isinstance(value, str | int | float) and not isinstance(value, bool)
        number = column in _NUMBERS
        written = plain and not (isinstance(value, int) and abs(value) >= LIMIT)
        if not written or (number and not re.fullmatch(whole, str(value).strip())):
            return f"{column} is {shown(value)}"
    return None
