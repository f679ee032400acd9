"""`loss.time.mean=1.1`: dotted keys over the dataclasses of configs.py.

A part of a configuration is a Tree of what was given, until `build` makes the object: a class
checks its fields together, so none is made before all of them are known. Imports no jax.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from typing import Any

from tdjax.config import DiTConfig
from tdjax.config.values import parse_real, parse_whole, shown
from tdjax.errors import UsageError
from tdjax.files import near

# Fields that no key sets: chosen by other keys, or not trained.
_FIXED = {DiTConfig: ("attention", "linear", "impl", "sla", "policy", "image_dim", "remat")}


@dataclasses.dataclass
class Tree:
    """Values given for one object of `cls`: {field: value or Tree}; a field that is not there keeps
    its default."""

    cls: type
    values: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Field:
    """A field that a key can set. kinds: the alternatives of its type."""

    kinds: tuple[Any, ...]
    default: Any
    note: str

    @property
    def classes(self) -> tuple[type, ...]:
        """The dataclasses among the alternatives."""
        return tuple(kind for kind in self.kinds if dataclasses.is_dataclass(kind))


@functools.cache
def fields(cls: type) -> dict[str, Field]:
    """Returns the fields of a configuration class that keys can set, by name."""
    hints = typing.get_type_hints(cls)
    return {
        field.name: Field(
            _alternatives(hints[field.name]), field.default, field.metadata.get("help", "")
        )
        for field in dataclasses.fields(cls)
        if field.name not in _FIXED.get(cls, ())
    }


def _alternatives(hint) -> tuple[Any, ...]:
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return tuple(sorted(kinds, key=lambda kind: kind is str))  # which takes any word: tried last


def put(parts: dict[str, Tree], key: str, value: Any) -> None:
    """Sets one dotted key. A string is parsed by the field's type; other values are a preset's.

    Raises UsageError for a key that is not there and for a value of another type.
    """
    first, *words = key.split(".")
    if first not in parts or not words:
        raise _unknown(parts, key)
    tree = parts[first]
    for depth, word in enumerate(words, 1):
        if word not in fields(tree.cls):
            raise _unknown(parts, key)
        field = fields(tree.cls)[word]
        if depth == len(words):
            tree.values[word] = _parse(key, field, value) if isinstance(value, str) else value
            return
        cls = _class_of(tree.values.get(word, field.default))
        if cls is None and len(field.classes) == 1:
            tree.values.pop(word, None)  # a key of the only object that it can be asks for it
            cls = field.classes[0]
        if cls is None:
            raise _no_object(key, field, ".".join([first, *words[:depth]]))
        tree = tree.values.setdefault(word, Tree(cls))


def _class_of(value) -> type | None:
    """Returns the class of a config, or of the one that a Tree describes; None for other values."""
    if isinstance(value, Tree):
        return value.cls
    return type(value) if dataclasses.is_dataclass(value) else None


def _no_object(key: str, field: Field, parent: str) -> UsageError:
    if not field.classes:
        kinds = " or ".join(map(_name, field.kinds))
        return UsageError(f"unknown key {key}", f"{parent} is a {kinds}", f"set {parent} itself")
    choices = " or ".join(map(_name, field.classes))
    return UsageError(
        f"{key} without an object", f"{parent} is none", f"first choose one: {parent}={choices}"
    )


def _unknown(parts: dict[str, Tree], key: str) -> UsageError:
    known = list(table(parts))
    last = key.rpartition(".")[2]
    same_end = [k for k in known if k.rpartition(".")[2] == last]
    close = near(key, same_end, cutoff=0) or near(key, known)
    return UsageError(
        f"unknown key {key[:80]}",
        "PRESET --help lists the keys",
        f"did you mean {close[0]}?" if close else "keys are dotted, such as run.steps",
    )


# -- values ----------------------------------------------------------------------------------------


def _parse(key: str, field: Field, text: str) -> Any:
    """A value from the command line: the first of the field's alternatives that takes it."""
    for kind in field.kinds:
        if kind in field.classes and text.lower() == kind.__name__.lower():
            return Tree(kind)
        if kind in _PARSERS:
            found = _PARSERS[kind](text)
            if found is not _MISFIT:
                return found
    words = [_WORDS.get(kind, _name(kind)) for kind in field.kinds]
    inner = [f"{key}.{name}" for kind in field.classes for name in fields(kind)]
    fix = f"the default is {_shown(field.default)}"
    if inner:
        fix = f"or set one of its keys: {', '.join(inner)}"
    raise UsageError(f"{key} is {shown(text)}", f"allowed: {', or '.join(words)}", fix)


_MISFIT = object()
_TRIPLE = tuple[int, int, int]
_REALS = tuple[float, ...]


def _number(parse):
    def number(text: str):
        try:
            found = parse(text)
        except ValueError:
            return _MISFIT
        return found if math.isfinite(found) else _MISFIT

    return number


def _triple(text: str):
    values = tuple(_PARSERS[int](word.strip()) for word in text.strip("()[]").split(","))
    return values if len(values) == 3 and _MISFIT not in values else _MISFIT


def _reals(text: str):
    values = tuple(_PARSERS[float](word.strip()) for word in text.strip("()[]").split(","))
    return _MISFIT if _MISFIT in values else values


_PARSERS = {
    int: _number(parse_whole),
    float: _number(parse_real),
    bool: lambda text: {"true": True, "false": False}.get(text.lower(), _MISFIT),
    types.NoneType: lambda text: None if text.lower() == "none" else _MISFIT,
    str: lambda text: text,
    _TRIPLE: _triple,
    _REALS: _reals,
}
_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    types.NoneType: "none",
    _TRIPLE: "three numbers a,b,c",
    _REALS: "numbers a,b,...",
}


def _name(kind) -> str:
    return "None" if kind is types.NoneType else kind.__name__


def _shown(value) -> str:
    """A value as the command line takes it."""
    cls = _class_of(value)
    if cls is not None:
        return cls.__name__
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


# -- objects ---------------------------------------------------------------------------------------


def table(parts: dict[str, Tree]) -> dict[str, tuple[str, str]]:
    """Returns {dotted key: (its value now, its note)} for every key that may be set now."""
    out: dict[str, tuple[str, str]] = {}

    def walk(prefix: str, given: Tree, usual) -> None:
        for name, field in fields(given.cls).items():
            key, default = f"{prefix}.{name}", getattr(usual, name)
            value = given.values.get(name, default)
            cls = _class_of(value)
            if cls is None or len(field.kinds) > 1:
                out[key] = (_shown(value), field.note)
            if cls is not None:
                inner = value if isinstance(value, Tree) else Tree(cls)
                walk(key, inner, default if type(default) is cls else cls())

    for first, tree in parts.items():
        walk(first, tree, tree.cls())
    return out


def build(tree: Tree, base=None):
    """Returns the object of a tree; fields that are not given are those of `base` where that is of
    the tree's class, else the class's defaults.

    What the class refuses is raised as UsageError.
    """
    base = base if type(base) is tree.cls else tree.cls()
    values = {
        name: build(value, getattr(base, name)) if isinstance(value, Tree) else value
        for name, value in tree.values.items()
    }
    try:
        return dataclasses.replace(base, **values)
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(
            str(error),
            "the settings do not fit together",
            "PRESET --help lists the keys with their defaults",
        ) from error


def lines(name: str, config) -> list[str]:
    """Returns a config as `key=value` lines that the command line takes, defaults included."""
    out = []
    for field, known in fields(type(config)).items():
        value, key = getattr(config, field), f"{name}.{field}"
        cls = _class_of(value)
        if cls is None or len(known.kinds) > 1:
            out.append(f"{key}={_shown(value)}")
        if cls is not None:
            out += lines(key, value)
    return out
