"""Text and arrays that others wrote, parsed within bounds: whatever is wrong with them is one
ValueError that says it, and what they claim is compared with their size before anything is built.
"""

from __future__ import annotations

import ast
import json
import math
import os
import re
import types
import typing
import zipfile
from pathlib import Path
from typing import Any, NotRequired

import numpy as np

from tdjax.config.values import shown

NPY = b"\x93NUMPY"
HEADER = 10_000  # bytes in the header of a .npy file, as numpy itself allows
EXPANDED = 2**30  # bytes that the arrays of a small .npz may take


def json_value(text: str | bytes, unique: bool = False) -> Any:
    """The value that JSON text stands for. unique: a key that is there twice is an error. Raises
    ValueError for anything else, also for text that is nested too deep and bytes that are not
    UTF-8."""
    hook = _once if unique else None
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        return json.loads(text.removeprefix("\ufeff"), object_pairs_hook=hook)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def json_object(text: str | bytes, unique: bool = False) -> dict[str, Any]:
    """As `json_value`, for text that must be an object."""
    value = json_value(text, unique)
    if not isinstance(value, dict):
        raise ValueError("it is not a table of names and values")
    return value


def _once(pairs):
    """A JSON object whose keys are all different."""
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a key is there twice")
    return out


# Types
# --------------------------------------------------------------------------------------------------


def mismatch(value: Any, expected: Any, where: str = "it") -> str | None:
    """Where JSON values differ from a type, as a line for a message; None where they fit.

    expected: int, float, str, bool, None, Any, unions, list[...], tuple[...], dict[str, ...], or a
              TypedDict, whose other keys are free. Numbers must be finite and fit 64 bits, text
              must be text (no half of a surrogate pair).
    """
    origin, inside = typing.get_origin(expected), typing.get_args(expected)
    if expected is Any:
        return None
    if origin in (types.UnionType, typing.Union):
        found = [mismatch(value, one, where) for one in inside]
        return found[0] if all(found) else None
    if typing.is_typeddict(expected):
        return _fields_mismatch(value, expected, where)
    if origin is dict:
        if not isinstance(value, dict):
            return f"{where} is {told(value)}, not a table"
        pairs = ((mismatch(v, inside[1], f"{where}[{shown(k)}]"), k) for k, v in value.items())
        return next((found for found, _ in pairs if found), None)
    if origin in (list, tuple):
        return _items_mismatch(value, origin, inside, where)
    if not _is(value, expected):
        name = "null" if expected is type(None) else expected.__name__
        return f"{where} is {told(value)}, not {name}"
    return None


def _fields_mismatch(value, expected, where: str) -> str | None:
    if not isinstance(value, dict):
        return f"{where} is {told(value)}, not a table"
    hints = typing.get_type_hints(expected, include_extras=True)
    optional = {name for name, hint in hints.items() if typing.get_origin(hint) is NotRequired}
    hints = typing.get_type_hints(expected)
    missing = [name for name in hints if name not in value and name not in optional]
    if missing and expected.__total__:
        return f"{where} has no {missing[0]}"
    found = (mismatch(value[name], hints[name], name) for name in hints if name in value)
    return next((line for line in found if line), None)


def _items_mismatch(value, origin, inside, where: str) -> str | None:
    if not isinstance(value, list | tuple):
        return f"{where} is {told(value)}, not a list"
    if origin is list or inside[-1] is Ellipsis:
        expected = [inside[0]] * len(value)
    else:
        expected = list(inside)
    if len(expected) != len(value):
        return f"{where} has {len(value)} items, not {len(expected)}"
    found = (
        mismatch(v, e, f"{where}[{i}]")
        for i, (v, e) in enumerate(zip(value, expected, strict=True))
    )
    return next((line for line in found if line), None)


def _is(value, expected) -> bool:
    """Whether a value has a plain type; a bool is no number, a whole number is a float as well."""
    if expected is float:
        return type(value) in (int, float) and abs(value) < 2.0**1000
    if expected is int:
        return type(value) is int and abs(value) < 2**63
    if expected is str and isinstance(value, str):
        return value.isascii() or not any("\ud800" <= c <= "\udfff" for c in value)
    return type(value) is expected


def told(value: Any) -> str:
    """A JSON value for a message: what it is, not what is in it."""
    if isinstance(value, dict | list | tuple):
        return "a table" if isinstance(value, dict) else f"a list of {len(value)}"
    return shown(value)


# Arrays
# --------------------------------------------------------------------------------------------------


def npy_array(data: bytes) -> np.ndarray:
    """The array of a .npy file. Raises ValueError for anything else, and where the header's shape
    and type are not the size of what follows it; nothing is built before."""
    if data[:6] != NPY or len(data) < 10:
        raise ValueError("it is not one array (.npy)")
    wide = data[6] > 1  # versions 2 and 3 give four bytes to the header's length
    begin = 12 if wide else 10
    end = begin + int.from_bytes(data[8:begin], "little")
    if end - begin > HEADER or end > len(data):
        raise ValueError(f"its header has {end - begin} bytes")
    try:
        header = _literal(data[begin:end].decode("utf-8" if data[6] == 3 else "latin-1"))
        text, shape = header["descr"], header["shape"]
        column_major = header["fortran_order"]
        if not (isinstance(text, str) and re.fullmatch(r"[<>|=]?[?bifcuV]\d{0,2}", text)):
            raise ValueError(f"its dtype is {shown(text)}")
        dtype = np.dtype(text)
    except (TypeError, KeyError) as error:
        raise ValueError(f"its header cannot be read ({type(error).__name__})") from error
    if (
        not isinstance(shape, tuple)
        or len(shape) > 32
        or not all(type(n) is int and 0 <= n < 2**63 for n in shape)
        or type(column_major) is not bool
        or not dtype.itemsize
    ):
        raise ValueError(f"its shape is {shown(shape)}, its dtype {text}")
    if math.prod(shape) * dtype.itemsize != len(data) - end:
        raise ValueError(f"its header says {shape} of {dtype}, and {len(data) - end} bytes follow")
    flat = np.frombuffer(data, dtype, offset=end)
    return flat.reshape(shape, order="F" if column_major else "C")


def _literal(text: str) -> Any:
    """The value of a Python literal: what the parser says of anything else, as one error."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError(f"its header cannot be read ({type(error).__name__})") from error


def _entries(path: Path) -> int:
    """How many entries a zip file without a comment says that it has, in its last record."""
    with path.open("rb") as file:
        file.seek(-22, os.SEEK_END)
        return int.from_bytes(file.read()[10:12], "little")


def npz_arrays(path: Path) -> dict[str, np.ndarray]:
    """{name: array} of an .npz file, whose checksums are compared. Raises ValueError where it is
    damaged, or would take far more memory than it has on disk."""
    limit = max(EXPANDED, 4 * path.stat().st_size)
    try:
        with zipfile.ZipFile(path) as archive:
            if len(archive.infolist()) != _entries(path):  # the table itself has no checksum
                raise ValueError("its table of entries is damaged")
            total = sum(info.file_size for info in archive.infolist())
            if total > limit:
                raise ValueError(f"its arrays would have {total} bytes")
            return {
                info.filename.removesuffix(".npy"): npy_array(archive.read(info))
                for info in archive.infolist()
            }
    except OSError:
        raise
    except Exception as error:  # zip files and what unpacks them raise a dozen kinds
        raise ValueError(f"{type(error).__name__}: {error}") from error
