"""Rows of files as people have them: lines, tables from spreadsheets, JSON."""

from __future__ import annotations

import codecs
import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tdjax.config.parsing import json_value
from tdjax.errors import UsageError
from tdjax.files import near, near_files
from tdjax.text.characters import repaired

TABLES = (".csv", ".tsv")
SHEETS = (".xlsx", ".xls", ".xlsm", ".ods", ".numbers")  # which are not read
JSON_LINES = (".jsonl", ".ndjson")
SUFFIXES = (".txt", *TABLES, ".json", *JSON_LINES)
# Characters at which str.splitlines() ends a line beside \n: text pasted from a web page or a word
# processor has them inside a prompt.
_SEPARATORS = re.compile("[\v\f\x1c-\x1e\x85\u2028\u2029]+")


def rows_of(data: bytes, suffix: str, columns: tuple[str, ...]) -> list[Any]:
    """Returns the rows of a file, not yet checked: tables of {column: value}, and for plain lines
    {first of the columns: line}. Raises ValueError for what cannot be read.

    suffix: one of SUFFIXES, or "" for plain lines. columns: those that are known, which tell the
            mark between them.
    """
    text = decoded(data)
    if suffix in TABLES:
        return _table_rows(text, "\t" if suffix == ".tsv" else None, columns)
    if suffix == ".json":
        return _json_rows(text)
    if suffix in JSON_LINES:
        return [json_value(line, unique=True) for line in text.split("\n") if line.strip()]
    return _line_rows(text, columns)


def read_rows(path: Path, columns: tuple[str, ...], suffixes: Sequence[str]) -> list[Any]:
    """Returns `rows_of` a file. Raises UsageError for another suffix than these, for a file that is
    not there, and for what cannot be read."""
    suffix = path.suffix.lower()
    if suffix not in suffixes:
        named = [each for each in suffixes if each]
        raise UsageError(
            f"{path} has the suffix {path.suffix!r}",
            f"read are {', '.join(named)}",
            f"nearest: {near(suffix, named, cutoff=0)[0]}",
        )
    if not path.is_file():
        raise UsageError(f"{path} does not exist", "its rows are read", near_files(path))
    try:
        return rows_of(path.read_bytes(), suffix, columns)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{path} cannot be read", str(error), f"give a .csv or .jsonl with {columns[0]}"
        ) from error


def read_prompts(path: Path, columns: tuple[str, ...] = ("prompt",)) -> list[str]:
    """Returns the prompts of a file, one a row; its other columns are not read. columns: where they
    may stand; the first that a row has counts. Raises UsageError."""
    prompts = []
    for number, row in enumerate(read_rows(path, columns, ("", *SUFFIXES)), 1):
        if isinstance(row, dict):
            row = next((row[name] for name in columns if name in row), None)
        if not isinstance(row, str) or not row.strip():
            raise UsageError(
                f"{path}, row {number}: no prompt",
                "every row needs one",
                f"fill the column {' or '.join(columns)}",
            )
        prompts.append(repaired(row.strip()))
    if not prompts:
        raise UsageError(f"{path} holds no prompts", "it is empty", "one prompt a line")
    return prompts


def decoded(data: bytes) -> str:
    """Returns bytes as text with \\n at the end of lines: UTF-8, or UTF-16 with its mark. Raises
    ValueError with the line that is neither, and for what is no text."""
    if data.startswith(b"PK\x03\x04"):
        raise ValueError("it is a zip archive, as spreadsheets are: save the table as .csv")
    utf_16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = data.decode("utf-16" if utf_16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(
            f"line {line} is not UTF-8 (byte 0x{data[error.start]:02x}): save the file as UTF-8"
        ) from error
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise ValueError(f"line {line} holds the character 0, which no text has: save it as UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _line_rows(text: str, columns: tuple[str, ...]) -> list[Any]:
    """One row a line; a line that begins with # is a comment. Raises ValueError for a table or
    JSON under the name of plain text."""
    lines = [_SEPARATORS.sub(" ", line).strip() for line in text.split("\n")]
    lines = [line for line in lines if line and not line.startswith("#")]
    header = re.split(r"\s*[,;\t]\s*", lines[0].lower()) if lines else []
    if len(header) > 1 and set(header) <= set(columns):
        raise ValueError(f"its first line, {lines[0]!r}, is that of a table: name it .csv")
    if lines and lines[0].startswith(("[", "{")):
        raise ValueError("it begins like JSON: name it .json, or .jsonl for one row a line")
    return [{columns[0]: line} for line in lines]


def _json_rows(text: str) -> list[Any]:
    rows = json_value(text, unique=True)
    if not isinstance(rows, list):
        raise ValueError("it is not a list of rows or prompts")
    return rows


def _table_rows(text: str, delimiter: str | None, columns: tuple[str, ...]) -> list[Any]:
    """Rows of a table whose first line names the columns; rows without any value are left out, and
    so is a column without a name (the numbers that pandas writes). Raises ValueError for damage,
    such as a quote that is never closed."""
    text = text.lstrip("\n")
    if said := re.match(r'"?sep=(.)"?\n', text):  # Excel's own line before a table
        delimiter, text = said[1], text[said.end() :]
    if not text:
        return []
    if delimiter is None:
        known = lambda mark: len(set(_names(text.partition("\n")[0], mark)) & set(columns))
        delimiter = max(",;\t", key=known)
    try:
        header, *lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    except csv.Error as error:
        raise ValueError(str(error)) from error
    names = [name.strip().lower() for name in header]
    if twice := [name for name in names if name and names.count(name) > 1]:
        raise ValueError(f"its column {twice[0]!r} is there twice")
    rows = []
    for values in lines:
        if len(values) > len(names):
            shown = delimiter if delimiter != "\t" else "tab"
            raise ValueError(
                f"the row {delimiter.join(values)!r} has {len(values)} values for {len(names)}"
                f" columns: put a prompt that holds a {shown} between double quotes"
            )
        row = {name: value.strip() for name, value in zip(names, values, strict=False) if name}
        rows += [row] if any(row.values()) else []
    return rows


def _names(line: str, delimiter: str) -> list[str]:
    return [name.strip().strip('"').lower() for name in line.split(delimiter)]
