"""Prompt embeddings as a file: encode once, generate anywhere without the text encoder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from tdjax.errors import UsageError
from tdjax.files import written


def save_embeds(path, embeds: np.ndarray, prompts: list[str], overwrite: bool = False) -> Path:
    """Writes embeds [b s d] and their prompts as .safetensors. Raises UsageError where the file
    exists."""
    rows = {"prompt_embeds": np.ascontiguousarray(embeds)}
    with written(path, overwrite) as part:
        save_file(rows, part, metadata={"prompts": json.dumps(prompts)})
    return Path(path)


def load_embeds(path) -> np.ndarray:
    """Returns [b s d]. Raises UsageError when the file is not one of `save_embeds`."""
    try:
        with safe_open(path, framework="np") as f:
            return f.get_tensor("prompt_embeds")
    except (OSError, SafetensorError) as error:
        raise UsageError(
            f"{path} holds no prompt embeddings", str(error), "make it with save_prompt_embeds"
        ) from error


def load_latents(path) -> np.ndarray:
    """Start noise [1 t h w c] from .npy, or from a .safetensors that holds `latents`; UsageError
    otherwise."""
    try:
        if str(path).endswith(".safetensors"):
            with safe_open(path, framework="np") as f:
                array = f.get_tensor("latents")
        else:
            array = np.load(path, allow_pickle=False)
        if not isinstance(array, np.ndarray) or array.dtype.kind != "f":
            raise ValueError(
                f"it holds {getattr(array, 'dtype', type(array).__name__)}, not one array of floats"
            )
    except (OSError, ValueError, EOFError, SafetensorError) as error:
        raise UsageError(
            f"{path} holds no latents",
            str(error),
            "it is one float array [1 t h w c], .npy or .safetensors",
        ) from error
    return array
