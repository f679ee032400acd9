"""Numbers of a run: one JSON line per report in metrics.jsonl, and the same in TensorBoard where
tensorboardX is installed, and in a project of Weights & Biases."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from tdjax.config.parsing import json_object, mismatch
from tdjax.errors import UsageError
from tdjax.files import write_text

_WRITER = "tensorboardX"
_WANDB = "wandb"
_FILE = "metrics.jsonl"


class _Report(TypedDict):
    """A line; the other keys are names of numbers."""

    step: int


class Metrics:
    """The file `<run>/metrics.jsonl`, appended to. Lines after `step` come from a run that ended
    later than its last checkpoint, and go.

    wandb: the project, or "" for none; a run goes on under the name of its folder. settings: of the
    run, for it.
    """

    def __init__(
        self,
        run: Path,
        step: int = 0,
        wandb: str = "",
        settings: Mapping[str, str] | None = None,
    ):
        self.path = run / _FILE
        run.mkdir(parents=True, exist_ok=True)
        _forget(self.path, step)
        self.file = self.path.open("a")
        self.board = None
        if importlib.util.find_spec(_WRITER) is not None:
            writer = importlib.import_module(_WRITER)
            self.board = writer.SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)
        self.wandb = None
        if wandb:
            self.wandb = importlib.import_module(_WANDB).init(
                project=wandb,
                name=run.name,
                id=run.name,
                dir=str(run),
                resume="allow",
                config=dict(settings or {}),
            )

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes one report. NaN and infinity, which JSON does not know, are written as null."""
        plain = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self.file.write(json.dumps({"step": step, **plain}) + "\n")
        self.file.flush()
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)
        if self.wandb is not None:
            self.wandb.log(values, step=step)

    def show(self, step: int, picture: Path) -> None:
        """Shows a .png file in TensorBoard and Weights & Biases."""
        if self.board is not None:
            from PIL import Image  # a native module: the command heeds signals first

            with Image.open(picture) as image:
                pixels = np.asarray(image)
            self.board.add_image("samples", pixels, step, dataformats="HWC")
        if self.wandb is not None:
            shown = importlib.import_module(_WANDB).Image(str(picture))
            self.wandb.log({"samples": shown}, step=step)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()
        if self.board is not None:
            self.board.close()
        if self.wandb is not None:
            self.wandb.finish()


def check_wandb(project: str) -> None:
    """Raises UsageError where a project is named and its library is not installed."""
    if project and importlib.util.find_spec(_WANDB) is None:
        raise UsageError(
            f"run.wandb is {project!r} and wandb is not installed",
            "metrics.jsonl has the same numbers",
            "pip install wandb, then wandb login; or leave it away",
        )


def read(run: Path) -> list[dict]:
    """Returns all reports of a run; a line that a kill cut short, or that is damaged, is left
    out."""
    path = run / _FILE
    lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
    return [row for row in map(_report, lines) if row is not None]


def _report(line: bytes) -> dict[str, Any] | None:
    try:
        row = json_object(line)
    except ValueError:
        return None
    return row if mismatch(row, _Report) is None else None


def _forget(path: Path, step: int) -> None:
    """Removes reports after `step`."""
    if not path.exists():
        return
    kept = [json.dumps(row) + "\n" for row in read(path.parent) if row["step"] <= step]
    write_text(path, "".join(kept))
