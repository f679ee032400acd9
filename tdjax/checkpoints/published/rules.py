"""Conversion as rows of three strings: source key, our leaf, einops layout.

    Row("blocks.{i}.{a:self|cross}_attn.{p:q|k|v|o}.weight", "blocks.{a}_attn.{p}.kernel", "o i -> i
    o")

`{i}` is the layer: such keys are stacked on axis 0 of the leaf. Any other placeholder is copied;
`{x}` stands for one name without dots, `{x:a|b}` for one of a few. Every key of a file is claimed
by exactly one row and every leaf of the abstract module is filled exactly once, or the conversion
stops with the full list. The same rows, read backwards, are the export.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import einops
import numpy as np

from tdjax.checkpoints.published.tensor import is_float
from tdjax.errors import CheckpointError

PLACEHOLDER = re.compile(r"\{(\w+)(?::([^}]*))?\}")
LAYER = "i"


@dataclasses.dataclass(frozen=True)
class Row:
    """source: key pattern. path: leaf pattern, or None for keys that nothing needs. layout: einops,
    "" for as it is.

    role: "" usual; "optional": dropped where the model asked for has no such leaf; "twin": another
          name of a tensor that files may hold once or twice, dropped where the first name is there;
          or both.
    """

    source: str
    path: str | None
    layout: str = ""
    role: str = ""

    @functools.cached_property
    def stacked(self) -> bool:
        """One leaf for all layers."""
        return (
            f"{{{LAYER}}}" in self.source
            and self.path is not None
            and f"{{{LAYER}}}" not in self.path
        )

    @functools.cached_property
    def source_pattern(self) -> re.Pattern:
        return _pattern(self.source, {})

    @functools.cached_property
    def path_pattern(self) -> re.Pattern:
        choices = {name: allowed for name, allowed in PLACEHOLDER.findall(self.source) if allowed}
        return _pattern(self.path, choices)

    def claim(self, key: str) -> tuple[str | None, int | None] | None:
        """(leaf name, layer) if the key is this row's."""
        match = self.source_pattern.fullmatch(key)
        if match is None:
            return None
        fields = match.groupdict()
        layer = int(fields[LAYER]) if self.stacked else None
        return (None if self.path is None else _fill(self.path, fields)), layer

    def key(self, leaf: str, layer: int | None) -> str | None:
        """The source key of a leaf's layer, if the leaf is this row's."""
        match = self.path_pattern.fullmatch(leaf)
        return None if match is None else _fill(self.source, {**match.groupdict(), LAYER: layer})

    @property
    def stacked_layout(self) -> str | None:
        """The layout with the layer axis, or None where there is nothing to do."""
        if not self.layout or not self.stacked:
            return self.layout or None
        left, right = self.layout.split("->")
        return f"n {left.strip()} -> n {right.strip()}"

    @property
    def inverse_layout(self) -> str | None:
        """The layout of one layer read backwards."""
        left, _, right = self.layout.partition("->")
        return f"{right.strip()} -> {left.strip()}" if self.layout else None


def _pattern(text: str, choices: Mapping[str, str]) -> re.Pattern:
    out, end = "", 0
    for m in PLACEHOLDER.finditer(text):
        name = m[1]
        allowed = m[2] or choices.get(name)
        inside = r"0|[1-9]\d{0,5}" if name == LAYER else r"[^.]+"
        if allowed:
            inside = "|".join(map(re.escape, allowed.split("|")))
        out += re.escape(text[end : m.start()]) + f"(?P<{name}>{inside})"
        end = m.end()
    return re.compile(out + re.escape(text[end:]))


def _fill(text: str, fields: Mapping[str, Any]) -> str:
    return PLACEHOLDER.sub(lambda m: str(fields[m[1]]), text)


@dataclasses.dataclass(frozen=True)
class Claim:
    """The keys that fill one leaf: one for each layer, or a single one."""

    row: Row
    keys: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Binding:
    """How a file's keys fill a module: {leaf name: Claim}, and the keys that were claimed and are
    not needed."""

    claims: dict[str, Claim]
    dropped: tuple[str, ...]


def slots(keys: Iterable[str], rows: tuple[Row, ...]) -> tuple[dict, list[str], list[str]]:
    """({(leaf, layer): (row, key)}, keys dropped, keys that no row claims). Two rows for one key
    are a mistake in the rows."""
    out: dict[tuple[str, int | None], tuple[Row, str]] = {}
    dropped, unknown, twins = [], [], []
    for key in keys:
        found = [(row, claim) for row in rows if (claim := row.claim(key)) is not None]
        if len(found) > 1:
            raise ValueError(
                f"{key} is claimed by {len(found)} rows: {', '.join(r.source for r, _ in found)}"
            )
        if not found:
            unknown.append(key)
            continue
        row, slot = found[0]
        if row.path is None:
            dropped.append(key)
        elif "twin" in row.role:
            twins.append((slot, row, key))
        elif slot in out:
            raise ValueError(f"{key} and {out[slot][1]} both fill {slot}")
        else:
            out[slot] = (row, key)
    for slot, row, key in twins:
        if slot in out:
            dropped.append(key)
        else:
            out[slot] = (row, key)
    return out, dropped, unknown


def bind(
    tensors: Mapping[str, Any], rows: tuple[Row, ...], leaves: Mapping[str, Any], name: str
) -> Binding:
    """Match a file's tensors (shape, dtype) with the leaves of an abstract module.

    Raises CheckpointError with the first differences, then all: unexpected keys, missing keys,
        other shapes or dtypes.
    """
    found, dropped, unknown = slots(tensors, rows)
    problems = [f"unexpected  {key} {list(tensors[key].shape)}" for key in unknown]
    by_leaf: dict[str, dict[int | None, tuple[Row, str]]] = {}
    for (leaf, layer), (row, key) in found.items():
        if leaf in leaves:
            by_leaf.setdefault(leaf, {})[layer] = (row, key)
        elif "optional" in row.role:
            dropped.append(key)
        else:
            problems.append(
                f"unexpected  {key} {list(tensors[key].shape)} (this model has no {leaf})"
            )
    claims = {}
    for leaf, target in leaves.items():
        layers = by_leaf.get(leaf, {})
        row = next(iter(layers.values()))[0] if layers else row_of(leaf, rows)
        expected = range(target.shape[0]) if row.stacked else (None,)
        problems += [
            f"missing     {row.key(leaf, layer)}" for layer in expected if layer not in layers
        ]
        problems += [
            f"unexpected  {key} (layer {n} of {len(expected)})"
            for n, (_, key) in layers.items()
            if n not in expected
        ]
        for layer in expected:
            if layer in layers:
                problems += _misfit(tensors[layers[layer][1]], layers[layer][1], row, target)
        claims[leaf] = Claim(row, tuple(layers[layer][1] for layer in expected if layer in layers))
    if problems:
        _fail(name, sorted(problems), len(tensors))
    return Binding(claims, tuple(sorted(dropped)))


def _fail(name: str, problems: list[str], count: int) -> None:
    kinds = {
        kind: sum(p.startswith(kind) for p in problems)
        for kind in ("missing", "unexpected", "different")
    }
    counts = ", ".join(f"{n} {kind}" for kind, n in kinds.items() if n)
    first = "; ".join(re.sub(" +", " ", p) for p in problems[:3])
    raise CheckpointError(
        f"{name} does not fit the model that its keys suggest: {counts} (it has {count} keys)",
        f"first: {first}",
        "all:\n" + "\n".join(f"  {p}" for p in problems),
    )


def row_of(leaf: str, rows: tuple[Row, ...]) -> Row:
    """The row that fills a leaf. None, or two, is a mistake in the rows."""
    found = [
        row
        for row in rows
        if row.path is not None and "twin" not in row.role and row.path_pattern.fullmatch(leaf)
    ]
    if len(found) != 1:
        raise ValueError(
            f"{leaf} is filled by {len(found)} rows: {', '.join(r.source for r in found)}"
        )
    return found[0]


@functools.lru_cache(maxsize=4096)
def _layout_shape(shape: tuple[int, ...], layout: str) -> tuple[int, ...] | None:
    """The shape after an einops layout, or None where it does not apply."""
    try:
        return (
            einops.rearrange(np.broadcast_to(np.int8(0), shape), layout).shape if layout else shape
        )
    except (einops.EinopsError, ValueError):
        return None


def _misfit(tensor, key: str, row: Row, target) -> list[str]:
    """At most one line about a tensor whose shape or kind of dtype is not the leaf's."""
    shape, want = tuple(tensor.shape), target.shape[1:] if row.stacked else target.shape
    if _layout_shape(shape, row.layout) != tuple(want):
        return [
            f"different   {key} {list(shape)}, expected {list(want)}"
            + (f" after {row.layout}" if row.layout else "")
        ]
    if tensor.dtype is not None and is_float(tensor.dtype) != is_float(target.dtype):
        return [
            f"different   {key} is {np.dtype(tensor.dtype).name}, expected"
            f" {np.dtype(target.dtype).name}"
        ]
    return []


def invert(
    leaves: Mapping[str, Any], rows: tuple[Row, ...], twins: bool = False
) -> Iterator[tuple[str, Row, list[tuple[int | None, str]]]]:
    """(leaf name, row, [(layer, source key)]) for every leaf: what an export writes. With `twins`,
    second names too."""
    for leaf, target in leaves.items():
        row = row_of(leaf, rows)
        layers = range(target.shape[0]) if row.stacked else (None,)
        yield leaf, row, [(layer, row.key(leaf, layer)) for layer in layers]
        if twins:
            for twin in rows:
                if "twin" in twin.role and twin.path_pattern.fullmatch(leaf):
                    yield leaf, twin, [(layer, twin.key(leaf, layer)) for layer in layers]
