"""Prompt embeddings as a file: encode once, generate anywhere without the text encoder."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from tdjax.config.parsing import NPY, npy_array
from tdjax.errors import UsageError
from tdjax.files import near_files, written

FINISHED = {"tdjax": "finished latents"}  # mark of a file that is a video and not noise


def save_embeds(path, embeds: np.ndarray, prompts: list[str], overwrite: bool = False) -> Path:
    """Writes embeds [b s d] and their prompts as .safetensors. Raises UsageError where the file
    exists."""
    rows = {"prompt_embeds": np.ascontiguousarray(embeds)}
    with written(path, overwrite) as part:
        save_file(rows, part, metadata={"prompts": json.dumps(prompts)})
    return Path(path)


def load_embeds(path) -> np.ndarray:
    """Returns [b s d]. Raises UsageError when the file is not one of `save_embeds`."""
    _refuse_absent(Path(path))
    try:
        return stored_tensor(path, "prompt_embeds")
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{path} holds no prompt embeddings", str(error), "make it with save_prompt_embeds"
        ) from error


def stored_tensor(path, name: str) -> np.ndarray:
    """Returns one tensor of a .safetensors file. Raises ValueError where the file has none of this
    name or is damaged, OSError where it cannot be read."""
    try:
        with safe_open(path, framework="np") as f:
            return f.get_tensor(name)
    except OSError:
        raise
    except Exception as error:  # numpy lacks some of the format's types, and each fails in its way
        raise ValueError(str(error).partition("\n")[0]) from error


def load_latents(path) -> np.ndarray:
    """Start noise [1 t h w c] from .npy, or from a .safetensors that holds `latents`; UsageError
    otherwise, and for the latents of a finished video."""
    if _finished(Path(path)):
        raise UsageError(
            f"{path} holds latents of a finished video",
            "`latents` is the noise that sampling begins with",
            f"tdjax decode {path} makes frames of it; in Python, pipe.decode(Result.load(file))",
        )
    return read_latents(path)


def _finished(path: Path) -> bool:
    """Whether a file says that it is a video's latents, or the metadata beside it does."""
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    with contextlib.suppress(OSError, SafetensorError), safe_open(path, framework="np") as f:
        if (f.metadata() or {}).items() >= FINISHED.items():
            return True
    return path.with_name(path.name + ".json").is_file()


def read_latents(path) -> np.ndarray:
    """One array of floats from .npy, or from a .safetensors that holds `latents`; UsageError
    otherwise."""
    _refuse_absent(Path(path))
    try:
        with open(path, "rb") as f:
            npy = f.read(len(NPY)) == NPY
        array = npy_array(Path(path).read_bytes()) if npy else stored_tensor(path, "latents")
        if array.dtype.kind != "f":
            raise ValueError(f"it holds {array.dtype}, not floats")
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{path} holds no latents",
            str(error),
            "it is one float array [1 t h w c], .npy or .safetensors",
        ) from error
    return array


def _refuse_absent(path: Path) -> None:
    if not path.exists():
        raise UsageError(f"{path} does not exist", "arrays are read from it", near_files(path))
