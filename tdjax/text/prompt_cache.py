"""Embeddings of prompts on disk: a prompt that was encoded before needs no text encoder, neither
its weights nor its program."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from tdjax.files import by_last_use, trim, written
from tdjax.text.characters import repaired
from tdjax.text.embeds import stored_tensor

FOLDER, SUFFIX = "prompts", ".safetensors"
LIMIT = 2**29  # bytes of all entries; a prompt of 100 tokens takes 0.8 MB with umT5-xxl in bfloat16
FORMAT = 1


def entry_key(ids: np.ndarray, mask: np.ndarray, facts: dict[str, Any]) -> str:
    """The name of one prompt's entry: its tokens [s] (they stand for text and tokenizer), and what
    computed the embedding."""
    text = json.dumps(
        {"format": FORMAT, "ids": ids[mask > 0].tolist(), "length": len(ids), **facts},
        sort_keys=True,
    )
    return hashlib.sha256(text.encode()).hexdigest()


@dataclasses.dataclass
class PromptCache:
    """One file for each prompt, of its rows up to the prompt's end (the rest is zeros). The least
    recently used ones go first.

    Nothing here stops a run: an entry that is damaged counts as absent, and a folder that cannot be
    written is told of once.
    """

    folder: Path
    limit: int = LIMIT
    failed: bool = False

    def path(self, key: str) -> Path:
        return self.folder / f"{key}{SUFFIX}"

    def read(self, key: str, into: np.ndarray) -> bool:
        """Whether the entry is there; its rows are written into an array [s d] of zeros."""
        path = self.path(key)
        try:
            rows = stored_tensor(path, "rows")
        except (OSError, ValueError):
            return False
        fits = rows.ndim == 2 and len(rows) <= len(into) and rows.shape[1] == into.shape[1]
        if not fits or rows.dtype != into.dtype:
            return False
        with contextlib.suppress(OSError):
            os.utime(path)
        into[: len(rows)] = rows
        return True

    def put(self, key: str, embeds: np.ndarray, tokens: int, prompt: str) -> str | None:
        """Keep the first `tokens` rows of [s d]; a line for the user where that is not possible,
        the first time."""
        rows = {"rows": np.ascontiguousarray(embeds[:tokens])}
        try:
            with written(self.path(key), overwrite=True) as part:
                save_file(rows, part, metadata={"prompt": repaired(prompt)})
            self.trim()
        except (OSError, SafetensorError) as error:
            if self.failed:
                return None
            self.failed = True
            why = getattr(error, "strerror", None) or error
            return f"prompt cache {self.folder} cannot be written ({why}): going on without"
        return None

    def entries(self) -> list[tuple[Path, os.stat_result]]:
        """Files and their facts, the least recently used first."""
        return by_last_use(self.folder, f"*{SUFFIX}")

    def trim(self) -> None:
        """Removes the oldest entries until the rest fits."""
        trim(self.folder, f"*{SUFFIX}", self.limit)


def prompt_of(path: Path) -> str:
    """The text that an entry was made from."""
    try:
        with safe_open(path, framework="np") as f:
            return (f.metadata() or {}).get("prompt", "")
    except (OSError, SafetensorError):
        return "(damaged)"
