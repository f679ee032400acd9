"""Stage 6: the table. Every row has a file of its own, so rows may be made in several runs; and the
timing of rows on one machine."""

from __future__ import annotations

import json
import time
from pathlib import Path

import jax
import numpy as np

from tdjax.config.parsing import json_object
from tdjax.errors import CheckpointError
from tdjax.files import write_text
from tdjax.train.evaluate import sheets
from tdjax.train.tiny import work
from tdjax.train.tiny.evaluation import report
from tdjax.train.tiny.evaluation.evaluate import Bench, evaluate, seconds
from tdjax.train.tiny.evaluation.variants import Variant, variants
from tdjax.train.tiny.settings import EvaluateStage
from tdjax.train.tiny.work import OutOfTime, Run

SHOWN = (  # on the sheets of frames
    "truth",
    "teacher_unipc_50",
    "teacher_euler_4",
    "student_4",
    "student_2",
    "student_1",
    "sla_50",
    "merged_4",
    "merged_int8_4",
)
_TOLD = ("all", "fd_pca", "diversity", "psnr")  # of a row, while the table is made


def _file_of(run: Run, row: Variant) -> Path:
    return run.folder / "results" / f"{row.key}.json"


def read(run: Run, row: Variant) -> dict:
    """Returns a row's results so far; {} where there are none. Raises CheckpointError where they
    are damaged."""
    path = _file_of(run, row)
    try:
        return json_object(path.read_bytes()) if path.is_file() else {}
    except ValueError as error:
        raise CheckpointError(
            f"{path} is damaged", str(error), "remove it: the row is then measured again"
        ) from error


def write(run: Run, row: Variant, found: dict) -> None:
    """Adds to a row's results; the file is complete or not there."""
    path = _file_of(run, row)
    path.parent.mkdir(parents=True, exist_ok=True)
    old = read(run, row)
    values = old.get("values", {}) | found.get("values", {})
    write_text(path, json.dumps(old | found | {"values": values}, indent=1) + "\n")


def possible(run: Run, cfg: EvaluateStage) -> dict[str, Variant]:
    """Returns the rows asked for whose weights are there."""
    rows = {row.key: row for row in variants(cfg) if _has_weights(run, row)}
    if cfg.rows == "all":
        return rows
    return {key: rows[key] for key in cfg.rows.split(",") if key in rows}


def _has_weights(run: Run, row: Variant) -> bool:
    return not row.weights or work.finished(run, row.weights)


def families(rows: dict[str, Variant], parent: str = "") -> list[Variant]:
    """Returns rows with their children behind them, so that the parents' clips are still there."""
    parent_of = lambda row: row.parent if row.parent in rows else ""
    own = [row for row in rows.values() if parent_of(row) == parent]
    return [member for row in own for member in (row, *families(rows, row.key))]


def run_stage(run: Run) -> None:
    """Makes the rows that have no results yet, then the table and the sheets of frames. Raises
    OutOfTime between two rows."""
    bench = Bench(run)
    rows = possible(run, bench.cfg)
    known = {row.key: row for row in variants(bench.cfg)}
    for row in families(rows):
        if "seeds" not in read(run, row):
            if time.monotonic() > run.until:
                raise OutOfTime(
                    f"evaluate: stopped before {row.key}; the same command goes on from there"
                )
            start = time.monotonic()
            write(run, row, evaluate(bench, row, known))
            values = read(run, row)["values"]
            shown = "  ".join(f"{name} {values[name]:.4g}" for name in _TOLD if name in values)
            run.say(f"{row.key}: {shown}  ({time.monotonic() - start:.0f} s)")
    _write_table(run)
    if all(key in rows for key in SHOWN[1:] if _has_weights(run, known[key])):
        _write_sheets(run, bench, [known[key] for key in SHOWN if key in rows])


def timing_stage(run: Run) -> None:
    """Measures the time of one clip on this machine, for the column of its kind."""
    bench = Bench(run)
    gpu = jax.default_backend() == "gpu"
    column, factor = ("gpu_ms", 1000.0) if gpu else ("cpu_seconds", 1.0)
    for row in possible(run, bench.cfg).values():
        if row.sampler is not None and column not in read(run, row).get("values", {}):
            value = factor * seconds(bench, row)
            write(run, row, {"values": {column: value}})
            run.say(f"{row.key}: {column} {value:.4g}")
    _write_table(run)


def _write_table(run: Run) -> None:
    """All results so far as a table, table.md."""
    found = [(row, read(run, row)) for row in variants(run.settings["evaluate"])]
    rows = [
        sheets.Row(
            name=row.title,
            evaluations=result["evaluations"],
            steps=result["steps"],
            values=result["values"],
        )
        for row, result in found
        if "seeds" in result
    ]
    (run.folder / "table.md").write_text(sheets.table(rows, report.COLUMNS))


def _write_sheets(run: Run, bench: Bench, rows: list[Variant], prompts: int = 3) -> None:
    """Frames of a few prompts from every variant, all from the same noise: sheet_0.png,
    sheet_1.png, ..."""
    shown: dict[int, dict[str, np.ndarray]] = {i: {} for i in range(prompts)}
    first = bench.prompts(rows[0], 0, bench.cfg.clips).first(bench.cfg.batch)
    texts = first.texts
    for row in rows:
        video = bench.made(row, 0, first)
        for i in shown:
            label = f"{row.title}: {texts[i]}"
            if row.sampler:
                plural = "s" if row.sampler.num_steps > 1 else ""
                label = f"{row.title}, {row.sampler.num_steps} step{plural}"
            shown[i][label] = video[i]
    for i, strips in shown.items():
        sheets.contact_sheet(run.folder / f"sheet_{i}.png", strips)
