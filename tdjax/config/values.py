"""Values as callers and files give them, settled as the plain Python values that were meant: whole
floats and numpy's numbers where a number is needed, and nothing else in its place. Imports no
jax."""

from __future__ import annotations

import dataclasses
import operator
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tdjax.errors import UsageError

LIMIT = 2**63  # whole numbers lie between this and its negative
DIGITS = 20  # of a whole number that is written out
SHOWN = 80  # characters of a value in a message


def shown(value: Any) -> str:
    """Returns a value as a message shows it, cut where it is long."""
    if isinstance(value, int) and abs(value) >= LIMIT:
        return f"a number of {value.bit_length()} bits"
    try:
        text = repr(value)
    except ValueError:  # Python refuses to write the longest numbers
        return f"a {type(value).__name__} of long numbers"
    except RuntimeError:  # JAX, an array that was deleted
        return f"a {type(value).__name__} without values"
    if not isinstance(value, str):
        text = " ".join(text.split())
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def whole(name: str, value: Any) -> int:
    """Returns a whole number, also one that a float or an array of one number holds. Raises
    UsageError."""
    if isinstance(value, float | np.floating) and float(value).is_integer():
        value = int(value)
    try:
        number = None if isinstance(value, bool | np.bool_) else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise _refused(name, value, "a whole number")
    if not -LIMIT < number < LIMIT:
        raise _refused(name, value, "a whole number of at most 63 bits")
    return number


def real(name: str, value: Any) -> float:
    """Returns a number as a float, also one that an array holds. Raises UsageError."""
    plain = isinstance(value, int | float) or _is_array_of_one(value)
    if not plain or isinstance(value, bool) or (isinstance(value, int) and abs(value) >= LIMIT):
        raise _refused(name, value, "a number")
    return float(value)


def _is_array_of_one(value: Any) -> bool:
    """Whether a value is a number of numpy's or JAX's, or an array without axes that holds one."""
    kind = np.dtype(getattr(value, "dtype", "O"))
    return getattr(value, "shape", None) == () and (kind.kind in "iuf" or is_small_float(kind))


def is_small_float(kind: np.dtype) -> bool:
    """Whether these are floats that numpy itself lacks, such as bfloat16."""
    return kind.kind == "V" and kind.names is None and kind.type.__module__ == "ml_dtypes"


def reals(name: str, value: Any) -> tuple[float, ...]:
    """Returns several numbers, of a list, a tuple or a flat array. Raises UsageError."""
    if not is_flat(value):
        raise _refused(name, value, "a list of numbers")
    return tuple(real(name, number) for number in value)


def is_flat(value: Any) -> bool:
    """Whether a value is a list, a tuple, or an array of one axis."""
    return isinstance(value, list | tuple) or getattr(value, "ndim", None) == 1


def switch(name: str, value: Any) -> bool:
    """Returns True or False, and takes nothing else for them. Raises UsageError."""
    if not isinstance(value, bool | np.bool_):
        raise _refused(name, value, "True or False")
    return bool(value)


def text(name: str, value: Any) -> str:
    """Returns a text, which bytes are not. Raises UsageError."""
    if not isinstance(value, str):
        raise _refused(name, value, "a text")
    return value


def path(name: str, value: Any) -> str | os.PathLike[str]:
    """Returns a path as it is, if the system can have such a name. Raises UsageError."""
    named = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not named or not isinstance(named, str):
        raise _refused(name, value, "a path")
    try:
        Path(named).expanduser().lstat()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass
    except (OSError, ValueError, RuntimeError) as error:  # the last: ~ of a user who is not there
        why = getattr(error, "strerror", None) or str(error)
        raise UsageError(
            f"{name} is {shown(os.fspath(value))}",
            f"no file can have this name: {why}",
            "give another path",
        ) from error
    return value


_KINDS: dict[str, Callable[[str, Any], Any]] = {
    "int": whole,
    "float": real,
    "bool": switch,
    "str": text,
    "Path": path,
    "tuple[float, ...]": reals,
}


def settled(name: str, value: Any, annotation: str) -> Any:
    """Returns a value as its annotation has it, such as "int | None". Annotations that are of none
    of the kinds here leave it as it is. Raises UsageError with the argument's name."""
    kinds = annotation.split(" | ")
    if value is None and "None" in kinds:
        return value
    if "Path" in kinds:
        return path(name, value)
    known = [_KINDS[kind] for kind in kinds if kind in _KINDS]
    return known[0](name, value) if len(known) == len([k for k in kinds if k != "None"]) else value


def settle(config: Any, **names: str) -> None:
    """Settles all fields of a frozen dataclass, from its `__post_init__`.

    names: {field: name of the argument that it comes from}, where they differ.
    Raises UsageError.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        name = names.get(field.name, field.name)
        object.__setattr__(config, field.name, settled(name, value, str(field.type)))


def parse_whole(word: str) -> int:
    """Returns a whole number that is written in digits 0 to 9. Raises ValueError."""
    if not re.fullmatch(rf"\s*[+-]?[0-9]{{1,{DIGITS}}}\s*", word):
        raise ValueError(f"{shown(word)} is not a whole number")
    return int(word)


def parse_real(word: str) -> float:
    """Returns a number that is written in digits 0 to 9, as 0.5, .5 or 1e-5. Raises ValueError."""
    number = r"([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,4})?"
    if len(word) > SHOWN or not re.fullmatch(rf"\s*[+-]?({number}|inf|nan)\s*", word, re.ASCII):
        raise ValueError(f"{shown(word)} is not a number")
    return float(word)


def _refused(name: str, value: Any, needed: str) -> UsageError:
    kind = type(value).__name__
    return UsageError(
        f"{name} is {shown(value)}", f"{needed} is needed", f"this is of the type {kind}"
    )
