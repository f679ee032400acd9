"""Prompt embeddings as a file: encode once, generate anywhere without the text encoder."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from tdjax.errors import UsageError


def save_embeds(path, embeds: np.ndarray, prompts: list[str], overwrite: bool = False) -> Path:
    """embeds [b s d] and their prompts -> .safetensors."""
    path = Path(path)
    if path.exists() and not overwrite:
        raise UsageError(f"{path} exists", "nothing is overwritten by itself", "give another name, or --overwrite")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    save_file({"prompt_embeds": np.ascontiguousarray(embeds)}, part, metadata={"prompts": json.dumps(prompts)})
    os.replace(part, path)
    return path


def load_embeds(path) -> np.ndarray:
    """[b s d]; raises UsageError when the file is not one of `save_embeds`."""
    try:
        with safe_open(path, framework="np") as f:
            return f.get_tensor("prompt_embeds")
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{path} holds no prompt embeddings", str(error), "make it with --save_prompt_embeds") from error
