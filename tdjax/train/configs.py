"""`loss.time.mean=1.1`: dotted keys over frozen dataclasses, checked against the classes' source
text.

The classes of losses and optimizers stand beside code that imports jax, which takes a second; their
names, types and defaults are read from the syntax tree instead, so that a wrong key is answered at
once. `build` then makes the objects.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import importlib
import re
from pathlib import Path
from typing import Any

import tdjax
from tdjax.errors import UsageError

ROOT = Path(tdjax.__file__).parent.parent
SOURCES = {
    "RunConfig": "tdjax.train.presets",
    "DataConfig": "tdjax.train.presets",
    "ModelConfig": "tdjax.train.presets",
    "FlowMatchingConfig": "tdjax.train.flow_matching",
    "SLATrainingConfig": "tdjax.train.sla",
    "RCMConfig": "tdjax.train.rcm",
    "SCM": "tdjax.train.rcm",
    "DCM": "tdjax.train.rcm",
    "OptimizerConfig": "tdjax.train.optimizer",
    "EMAConfig": "tdjax.train.state",
    "UniformShift": "tdjax.train.times",
    "LogNormal": "tdjax.train.times",
    "SLAConfig": "tdjax.config",
    "DiTConfig": "tdjax.config",
    "VAEStage": "tdjax.train.tiny.settings",
    "TeacherStage": "tdjax.train.tiny.settings",
    "SLAStage": "tdjax.train.tiny.settings",
    "RCMStage": "tdjax.train.tiny.settings",
    "MergeStage": "tdjax.train.tiny.settings",
    "EvaluateStage": "tdjax.train.tiny.settings",
}
ALIASES = {"TimeDistribution": "UniformShift | LogNormal"}
ELSEWHERE = {
    "DiTConfig": ("attention", "linear", "impl", "sla", "policy", "image_dim", "remat")
}  # chosen by other keys, or not trained


@dataclasses.dataclass
class Tree:
    """Values given for one object: {field: value or Tree}; the fields that are not there have their
    defaults."""

    cls: str
    values: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Field:
    """types: the alternatives of the annotation. default: a value, a Tree, or source text that is
    neither. note: the comment."""

    types: tuple[str, ...]
    default: Any
    note: str

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(t for t in self.types if t in SOURCES)


@functools.cache
def fields(cls: str) -> dict[str, Field]:
    """The fields of a configuration class, by its source."""
    text = (ROOT / (SOURCES[cls].replace(".", "/") + ".py")).read_text()
    node = next(n for n in ast.parse(text).body if isinstance(n, ast.ClassDef) and n.name == cls)
    lines, out = text.splitlines(), {}
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and item.target.id not in ELSEWHERE.get(cls, ()):
            annotation = ast.unparse(item.annotation)
            types = tuple(t.strip() for t in ALIASES.get(annotation, annotation).split("|"))
            note = lines[item.end_lineno - 1][item.end_col_offset :].partition("#")[2].strip()
            out[item.target.id] = Field(types, default_of(item.value), note)
    return out


def default_of(node: ast.expr) -> Any:
    """`1e-5` -> 1e-05, `LogNormal(mean=1.5)` -> Tree("LogNormal", {"mean": 1.5}), `2 / 3` -> "2 /
    3" """
    if isinstance(node, ast.Call):
        return Tree(node.func.id, {word.arg: default_of(word.value) for word in node.keywords})
    return (
        ast.literal_eval(node)
        if isinstance(node, ast.Constant | ast.Tuple | ast.UnaryOp)
        else ast.unparse(node)
    )


def put(parts: dict[str, Tree], key: str, value: Any) -> None:
    """Set one dotted key. A string is parsed by the field's type; other values are a preset's.
    Raises UsageError."""
    first, *words = key.split(".")
    if first not in parts or not words:
        raise unknown(parts, key)
    tree = parts[first]
    for depth, word in enumerate(words, 1):
        if word not in fields(tree.cls):
            raise unknown(parts, key)
        field = fields(tree.cls)[word]
        if depth == len(words):
            tree.values[word] = parse(key, field, value) if isinstance(value, str) else value
            return
        inner = tree.values.get(word, field.default)
        if not isinstance(inner, Tree):
            raise no_object(key, field, ".".join([first, *words[:depth]]))
        tree = tree.values.setdefault(word, Tree(inner.cls))


def no_object(key: str, field: Field, parent: str) -> UsageError:
    if not field.classes:
        return UsageError(
            f"unknown key {key}",
            f"{parent} is a {' or '.join(field.types)}",
            f"set {parent} itself",
        )
    return UsageError(
        f"{key} without an object",
        f"{parent} is none",
        f"first choose one: {parent}={' or '.join(field.classes)}",
    )


def unknown(parts: dict[str, Tree], key: str) -> UsageError:
    known = list(table(parts))
    same_end = [k for k in known if k.rpartition(".")[2] == key.rpartition(".")[2]]
    near = (
        difflib.get_close_matches(key, same_end, 1, 0) or difflib.get_close_matches(key, known, 1)
    )[:1]
    return UsageError(
        f"unknown key {key}",
        "PRESET --help lists the keys",
        f"did you mean {near[0]}?" if near else "",
    )


def parse(key: str, field: Field, text: str) -> Any:
    """A value from the command line: the first of the field's types that takes it."""
    for kind in field.types:
        if kind in SOURCES and text.lower() == kind.lower():
            return Tree(kind)
        if kind in PARSERS:
            found = PARSERS[kind](text)
            if found is not MISFIT:
                return found
    words = [WORDS.get(kind, kind) for kind in field.types]
    inner = [f"{key}.{name}" for kind in field.classes for name in fields(kind)]
    fix = (
        f"or set one of its keys: {', '.join(inner)}"
        if inner
        else f"the default is {shown(field.default)}"
    )
    raise UsageError(f"{key} is {text!r}", f"allowed: {', or '.join(words)}", fix)


MISFIT = object()


def number(kind, pattern: str):
    return lambda text: kind(text) if re.fullmatch(pattern, text) else MISFIT


def three(text: str):
    values = tuple(PARSERS["int"](word.strip()) for word in text.strip("()[]").split(","))
    return values if len(values) == 3 and MISFIT not in values else MISFIT


PARSERS = {
    "int": number(int, r"[+-]?\d+"),
    "float": number(float, r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?"),
    "bool": lambda text: {"true": True, "false": False}.get(text.lower(), MISFIT),
    "None": lambda text: None if text.lower() == "none" else MISFIT,
    "str": lambda text: text,
    "tuple[int, int, int]": three,
}
WORDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "None": "none",
    "tuple[int, int, int]": "three numbers a,b,c",
}


def table(parts: dict[str, Tree]) -> dict[str, tuple[str, str]]:
    """{dotted key: (its value now, its note)} for every key that may be set now."""
    out: dict[str, tuple[str, str]] = {}

    def walk(prefix: str, given: Tree, default: dict[str, Any]):
        for name, field in fields(given.cls).items():
            key, usual = f"{prefix}.{name}", default.get(name, field.default)
            value = given.values.get(name, usual)
            if not isinstance(value, Tree) or len(field.types) > 1:
                out[key] = (shown(value), field.note)
            if isinstance(value, Tree):
                walk(
                    key,
                    value,
                    usual.values if isinstance(usual, Tree) and usual.cls == value.cls else {},
                )

    for first, tree in parts.items():
        walk(first, tree, {})
    return out


def build(tree: Tree, base=None):
    """The object of a tree; fields that are not given are those of `base`, or the class's defaults.

    Imports the class's module. What the class refuses is raised as UsageError.
    """
    cls = getattr(importlib.import_module(SOURCES[tree.cls]), tree.cls)
    base = base if type(base) is cls else None
    values = {}
    for name, value in tree.values.items():
        if isinstance(value, Tree):
            default = (
                getattr(base, name)
                if base
                else next(f.default for f in dataclasses.fields(cls) if f.name == name)
            )
            value = build(value, default)
        values[name] = value
    try:
        return dataclasses.replace(base, **values) if base else cls(**values)
    except ValueError as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(
            str(error),
            "the settings do not fit together",
            "PRESET --help lists the keys with their defaults",
        ) from error


def lines(name: str, config) -> list[str]:
    """A config as `key=value` lines that the command line takes, defaults included."""
    out = []
    for field in fields(type(config).__name__):
        value, key = getattr(config, field), f"{name}.{field}"
        if type(value).__name__ in SOURCES:
            if len(fields(type(config).__name__)[field].types) > 1:
                out.append(f"{key}={type(value).__name__}")
            out += lines(key, value)
        else:
            out.append(f"{key}={shown(value)}")
    return out


def shown(value) -> str:
    """A value as the command line takes it."""
    if isinstance(value, Tree):
        return value.cls
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
