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
        raise UsageError(
            f"{path} exists",
            "nothing is overwritten by itself",
            "give another name, or --overwrite",
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    save_file(
        {"prompt_embeds": np.ascontiguousarray(embeds)},
        part,
        metadata={"prompts": json.dumps(prompts)},
    )
    os.replace(part, path)
    return path


def load_embeds(path) -> np.ndarray:
    """[b s d]; raises UsageError when the file is not one of `save_embeds`."""
    try:
        with safe_open(path, framework="np") as f:
            return f.get_tensor("prompt_embeds")
    except (OSError, SafetensorError) as error:
        raise UsageError(
            f"{path} holds no prompt embeddings", str(error), "make it with --save_prompt_embeds"
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
