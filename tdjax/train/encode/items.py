"""Which videos and images there are, and what their captions are: a folder with text files beside
its videos, or a table of both. Imports no jax."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from tdjax.config.values import shown
from tdjax.errors import UsageError
from tdjax.files import near_files
from tdjax.text.characters import repaired
from tdjax.text.rows import JSON_LINES, TABLES, decoded, read_rows

VIDEOS = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi")
IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
# Names that columns have in the tables of other projects.
PATHS = ("path", "video", "image", "file", "file_name", "filename")
TEXTS = ("text", "caption", "prompt")
_TABLES = (*TABLES, ".json", *JSON_LINES)


@dataclasses.dataclass(frozen=True)
class Item:
    """A video or an image. name: its path as it was listed; text: its caption, or None; trouble:
    why there is none, where its file cannot be read."""

    path: Path
    name: str
    text: str | None
    trouble: str = ""

    @property
    def is_image(self) -> bool:
        """Whether it is one picture, by its suffix."""
        return self.path.suffix.lower() in IMAGES


def read_items(videos: Path, captions: Path | None) -> list[Item]:
    """Returns what is to be encoded, in the order of names or of the table. Raises UsageError.

    videos:   a folder, with all that is below it; or a table of paths and texts, whose paths begin
              at its own folder.
    captions: a table for a folder's videos; None where each has its text file beside it.
    """
    if videos.is_dir():
        return _of_folder(videos, captions)
    if not videos.is_file():
        raise UsageError(
            f"{videos} does not exist", "a folder or a table of videos", near_files(videos)
        )
    if captions is not None:
        raise UsageError(
            f"captions with {videos.name}",
            "a table has the texts beside the paths",
            "leave `captions` away, or give the folder of the videos",
        )
    rows = _table(videos)
    if not rows:
        raise UsageError(f"{videos} holds no rows", "it is empty", "a row has a path and a text")
    return [Item(videos.parent / name, name, text) for name, text in rows]


def _of_folder(folder: Path, captions: Path | None) -> list[Item]:
    found = [
        Path(root) / name
        for root, _, names in os.walk(folder)
        for name in names
        if Path(name).suffix.lower() in (*VIDEOS, *IMAGES) and not name.startswith(".")
    ]
    if not found:
        raise UsageError(
            f"{folder} has no videos",
            f"looked for {', '.join((*VIDEOS, *IMAGES))}, also in its folders",
            "give another folder, or a table of paths and texts",
        )
    names = {path: path.relative_to(folder).as_posix() for path in found}
    ordered = sorted(found, key=names.__getitem__)
    if captions is None:
        return [Item(path, names[path], *_beside(path)) for path in ordered]
    texts = _by_name(captions, set(names.values()))
    return [Item(path, names[path], texts.get(names[path])) for path in ordered]


def _by_name(captions: Path, names: set[str]) -> dict[str, str | None]:
    """{name of a video: its text} of a table; names without a folder, or without a suffix, will do
    where they are clear."""
    if not captions.is_file():
        raise UsageError(
            f"{captions} does not exist", "it is a table of paths and texts", near_files(captions)
        )
    short: dict[str, set[str]] = {}
    for name in names:
        for other in (Path(name).name, Path(name).stem, str(Path(name).with_suffix(""))):
            short.setdefault(other, set()).add(name)
    texts: dict[str, str | None] = {}
    for given, text in _table(captions):
        name = given.removeprefix("./")
        meant = {name} if name in names else short.get(name, set())
        if len(meant) == 1:
            texts[meant.pop()] = text
    if not texts:
        raise UsageError(
            f"{captions} names none of the videos",
            f"a video's path is {min(names)}",
            "write paths as they are below the folder of the videos",
        )
    return texts


def _table(path: Path) -> list[tuple[str, str | None]]:
    """(path, text) of the rows of a table."""
    rows = read_rows(path, (*PATHS, *TEXTS), _TABLES)
    return [_pair(path, number, row) for number, row in enumerate(rows, 1)]


def _pair(table: Path, number: int, row: Any) -> tuple[str, str | None]:
    """(path, text) of a row; its other columns are not read."""
    columns = {str(name).lower(): name for name in row} if isinstance(row, dict) else {}
    name = next((columns[each] for each in PATHS if each in columns), None)
    text = next((columns[each] for each in TEXTS if each in columns), None)
    if name is None or text is None:
        raise UsageError(
            f"{table}, row {number} has no {'path' if name is None else 'text'}",
            f"columns: one of {', '.join(PATHS)}, and one of {', '.join(TEXTS)}",
            f"it has {', '.join(map(str, columns)) or 'none'}",
        )
    for column, value in ((name, row[name]), (text, row[text])):
        if not isinstance(value, str) and (column == name or value is not None):
            raise UsageError(
                f"{table}, row {number}: {column} is {shown(value)}", "it is text", "quote it"
            )
    if not row[name].strip():
        raise UsageError(f"{table}, row {number} has no path", "it is empty", "give one")
    return row[name].strip(), _clean(row[text])


def _beside(path: Path) -> tuple[str | None, str]:
    """(the text in the .txt file beside a video or None, what is wrong with that file)."""
    file = path.with_suffix(".txt")
    try:
        return _clean(" ".join(decoded(file.read_bytes()).split())), ""
    except FileNotFoundError:
        return None, ""
    except (OSError, ValueError) as error:
        return None, f"{file.name}: {error}"


def _clean(text: str | None) -> str | None:
    """A caption with U+FFFD for what is not UTF-8; None for one that is empty."""
    return repaired(text.strip()) or None if text else None
