"""Results for people: a markdown table, and a sheet of frames."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from einops import rearrange, repeat
from PIL import Image, ImageDraw, ImageFont

GAP = 4  # pixels of a sheet
LABEL_HEIGHT = 14
_PAPER = (250, 250, 250)
_INK = (20, 20, 20)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A variant's line: what it is, how many network evaluations a clip costs and sampler steps,
    where that is known, and measured values by column."""

    name: str
    evaluations: int | None = None
    steps: int | None = None
    values: Mapping[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Column:
    """A measured value: its key in Row.values, its heading, and how it is written (`format`
    specification)."""

    key: str
    title: str
    form: str


def table(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    """Returns a table in markdown. A column that no row has is left out; a value that a row lacks,
    or that is not a number, is a dash."""
    columns = [column for column in columns if any(column.key in row.values for row in rows)]
    counts = ["NFE", "steps"] if any(row.steps is not None for row in rows) else []
    lines = [
        ["", *counts, *(column.title for column in columns)],
        ["---", *["---:"] * (len(counts) + len(columns))],
    ]
    for row in rows:
        cells = [_cell(row.values.get(column.key), column.form) for column in columns]
        costs = [str(row.evaluations), str(row.steps)] if counts else []
        lines.append([row.name, *costs, *cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None or math.isnan(value) else format(value, form)


def contact_sheet(
    path: str | Path, clips: Mapping[str, np.ndarray], columns: int = 9, scale: int = 1
) -> Path:
    """Writes frames side by side, a row for each named clip (uint8 [t h w 3], all of one height and
    width), first and last included. Returns the path.

    path: a .png file. scale: screen pixels for a pixel. Raises ValueError for what is no clip.
    """
    strips = []
    for name, clip in clips.items():
        if clip.dtype != np.uint8 or clip.ndim != 4 or clip.shape[-1] != 3:
            raise ValueError(
                f"clip {name!r} is {clip.dtype} {clip.shape}; a sheet takes uint8 [t h w 3]"
            )
        chosen = np.linspace(0, len(clip) - 1, min(columns, len(clip))).round().astype(int)
        frames = clip[chosen]
        frames = repeat(frames, "n h w c -> n (h a) (w b) c", a=scale, b=scale)
        frames = np.pad(frames, ((0, 0), (0, GAP), (0, GAP), (0, 0)), constant_values=_PAPER[0])
        strips.append((name, rearrange(frames, "n h w c -> h (n w) c")))
    width = max(strip.shape[1] for _, strip in strips)
    height = sum(strip.shape[0] + LABEL_HEIGHT for _, strip in strips)
    sheet = Image.new("RGB", (width + GAP, height + GAP), _PAPER)
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=10)
    top = GAP
    for name, strip in strips:
        pen.text((GAP, top), name, fill=_INK, font=font)
        sheet.paste(Image.fromarray(strip), (GAP, top + LABEL_HEIGHT))
        top += LABEL_HEIGHT + strip.shape[0]
    sheet.save(path, "PNG")
    return Path(path)
