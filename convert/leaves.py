"""Any checkpoint, published or ours, as named leaves that are read when asked for: the one form all
tools here work on."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np

from tdjax.checkpoints import orbax
from tdjax.checkpoints.orbax import Lazy
from tdjax.checkpoints.published.checkpoint import Checkpoint, open_checkpoint, targets
from tdjax.config import Config
from tdjax.errors import CheckpointError
from tdjax.precision import Policy

NAMES = {
    "dit": "turbo",
    "vae": "wan",
    "text": "wan",
}  # names to export under where the source does not say


@dataclasses.dataclass(frozen=True)
class Leaves:
    """lazy: {leaf name: Lazy} in the layout and dtype of `config`. facts: for reports and
    manifests. file: if published."""

    path: Path
    kind: str
    config: Config
    lazy: dict[str, Lazy]
    facts: dict[str, Any]
    file: Checkpoint | None = None

    @property
    def naming(self) -> str:
        """Whose names the weights came under."""
        return self.facts.get("names") or NAMES[self.kind]


def _stored_as(cfg: Config, dtype: str | None) -> Config:
    """The config with another storage dtype; compute follows it."""
    return (
        cfg
        if dtype is None
        else dataclasses.replace(cfg, policy=Policy(param=dtype, compute=dtype))
    )


def open_leaves(path, dtype: str | None = None, **known) -> Leaves:
    """Open either kind. dtype: storage to convert to; None keeps ours as stored and gives published
    files bfloat16."""
    path = Path(path)
    if not (path / "manifest.json").is_file():
        return of_file(open_checkpoint(path, **known), dtype)
    if known.get("lora"):
        raise CheckpointError(
            f"{path} is a converted checkpoint",
            "LoRA files are merged into published weights",
            f"first: python -m convert {path} FILE.safetensors",
        )
    kind, stored = orbax.checked(path)
    cfg = _stored_as(stored, dtype)
    shapes = targets(kind, cfg)
    read = lambda name, to: orbax.read(path, name).astype(to, copy=False)
    lazy = {
        n: Lazy(tuple(x.shape), np.dtype(x.dtype), functools.partial(read, n, x.dtype))
        for n, x in shapes.items()
    }
    source = orbax.inspect(path)["source"]
    count = {
        "tensors": len(lazy),
        "matched": len(lazy),
        "dropped": 0,
        "missing": 0,
        "unexpected": 0,
    }
    size = sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
    return Leaves(
        path,
        kind,
        cfg,
        lazy,
        {**source, "name": source.get("name", path.name), **count, "bytes": size},
    )


def of_file(file: Checkpoint, dtype: str | None) -> Leaves:
    """The leaves of an opened published file, in another storage dtype unless that is None."""
    cfg = _stored_as(file.config, dtype)
    return Leaves(file.source.path, file.kind, cfg, file.lazy(cfg), file.facts(), file)
