"""A run as one page: <run>/report.html, with its settings, a curve for every number of
metrics.jsonl, and the sheets of its samples beside it. It needs no network and no script."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from tdjax.files import write_text
from tdjax.train import metrics

NAME = "report.html"
SAMPLES, SHEET = "samples", "sheet.png"  # <run>/samples/step_000500/sheet.png
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 420, 200, 62, 22  # of a plot, and of its margins, in pixels
_POINTS = 600  # of a curve; more are thinned out
_LOG = 30.0  # from this ratio of largest to smallest on, the axis is logarithmic
_STYLE = """
:root { color-scheme: light dark; font: 14px/1.4 system-ui, sans-serif }
body { max-width: 1340px; margin: 2em auto; padding: 0 1em }
.plots { display: flex; flex-wrap: wrap; gap: 14px }
figure { margin: 0 } figcaption { font-size: 12px } img { max-width: 100% }
svg { border: 1px solid #8884 } polyline { fill: none; stroke: #2a78d6; stroke-width: 1.5 }
text { font-size: 11px; fill: currentColor } line { stroke: #8884 }
table { border-collapse: collapse; font: 12px ui-monospace, monospace }
td { padding: 1px 12px 1px 0; overflow-wrap: anywhere }
"""


def write(run: Path, title: str, settings: Mapping[str, str]) -> Path:
    """Writes the page of a run, over that of before. Returns its path."""
    rows = metrics.read(run)
    names = sorted({name for row in rows for name in row if name != "step"}, key=_order)
    plots = [_figure(name, rows) for name in names]
    last = rows[-1]["step"] if rows else 0
    table = "".join(
        f"<tr><td>{html.escape(key)}</td><td>{html.escape(value)}</td></tr>"
        for key, value in settings.items()
    )
    text = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>',
        f"<style>{_STYLE}</style><h1>{html.escape(title)}</h1><p>Step {last}.</p>",
        '<h2>Numbers</h2><div class="plots">',
        *plots,
        "</div>",
        *_samples(run),
        f"<h2>Settings</h2><table>{table}</table></html>",
    ]
    write_text(run / NAME, "\n".join(text) + "\n")
    return run / NAME


def _samples(run: Path) -> list[str]:
    """The sheets of the run's samples, the last one first."""
    steps = sorted((int(p.parent.name.removeprefix("step_")), p) for p in _sheets(run))
    pictures = [
        f'<figure><img src="{sheet.relative_to(run).as_posix()}" loading="lazy" alt="">'
        f"<figcaption>step {step}</figcaption></figure>"
        for step, sheet in reversed(steps)
    ]
    return ["<h2>Samples</h2>", *pictures] if pictures else []


def _sheets(run: Path) -> list[Path]:
    found = run.glob(f"{SAMPLES}/step_*/{SHEET}")
    return [path for path in found if re.fullmatch(r"step_\d{6,}", path.parent.name)]


def _order(name: str) -> tuple[bool, str]:
    """Losses first."""
    return not name.endswith("loss"), name


def _figure(name: str, rows: Sequence[Mapping]) -> str:
    points = [(row["step"], row[name]) for row in rows if isinstance(row.get(name), int | float)]
    thin = math.ceil(len(points) / _POINTS) or 1
    points = [*points[:-1:thin], *points[-1:]]
    last = f"{points[-1][1]:.4g}" if points else "no number"
    caption = f"<figcaption>{html.escape(name)}: {last}</figcaption>"
    return f"<figure>{plot(points)}{caption}</figure>"


def plot(points: Sequence[tuple[float, float]]) -> str:
    """Returns a curve through (step, value) as SVG; its axis is logarithmic where values are
    positive and far apart."""
    size = f'viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}"'
    if not points:
        return f'<svg {size} role="img"></svg>'
    values = [value for _, value in points]
    low, high = min(values), max(values)
    log = low > 0 and high / low > _LOG
    scale = math.log if log else float
    x = _axis([step for step, _ in points], _LEFT, _WIDTH - 8)
    y = _axis([scale(value) for value in values], _HEIGHT - _BOTTOM, 10)
    line = " ".join(f"{x(step):.1f},{y(scale(value)):.1f}" for step, value in points)
    marks = [
        f'<line x1="{_LEFT}" x2="{_WIDTH - 8}" y1="{y(scale(v)):.1f}" y2="{y(scale(v)):.1f}"/>'
        f'<text x="{_LEFT - 5}" y="{y(scale(v)) + 4:.1f}" text-anchor="end">{v:.3g}</text>'
        for v in dict.fromkeys((low, high))
    ]
    ends = dict.fromkeys((points[0][0], points[-1][0]))
    marks += [
        f'<text x="{x(step):.1f}" y="{_HEIGHT - 6}" text-anchor="middle">{step}</text>'
        for step in ends
    ]
    return f'<svg {size} role="img">{"".join(marks)}<polyline points="{line}"/></svg>'


def _axis(values: Sequence[float], start: float, end: float):
    """Values to places from `start` to `end`; equal ones lie in the middle."""
    low, high = min(values), max(values)
    if low == high:
        return lambda value: (start + end) / 2
    return lambda value: start + (end - start) * (value - low) / (high - low)
