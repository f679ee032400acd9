"""The embedded demo model: a small Wan-shaped set that ships with the package and runs on any
machine (`python -m tdjax.train.tiny`)."""

from __future__ import annotations

from pathlib import Path

from tdjax.errors import CheckpointError

PACKAGED = Path(__file__).parent.parent / "assets" / "demo"
PARTS = ("model.json", "dit", "vae", "text", "tokenizer.json")


def folder() -> Path:
    """Where the package keeps the model. Raises CheckpointError where an installation came without
    it."""
    missing = [name for name in PARTS if not (PACKAGED / name).exists()]
    if missing:
        raise CheckpointError(
            f"the embedded demo model is not in this installation: {PACKAGED} has no"
            f" {', '.join(missing)}",
            "it is package data of less than 10 MB, and this copy of tdjax was made without it",
            "install tdjax again; or train it (python -m tdjax.train.tiny) and give `model`"
            " runs/tiny/demo; or give another `model`",
        )
    return PACKAGED
