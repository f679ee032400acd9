"""The persistent cache of compiled programs, which JAX keeps: where it is, and from which programs
on. Imports jax when it is turned on."""

from __future__ import annotations

import secrets
from pathlib import Path

from tdjax.checkpoints.locate import cache_folder

WORTH_KEEPING = 0.1  # seconds of compiling from which on a program is kept


def keep_programs(folder: Path | None = None) -> str | None:
    """Turns the cache on for this process, whether or not JAX has compiled something; returns a
    line for the user where the folder cannot be written, which costs time and not the run.

    folder: None for the one that this process or its environment has set for JAX, else tdjax's own.
    """
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    if folder is None and jax.config.jax_compilation_cache_dir:  # pyright: ignore
        return None
    folder = folder or cache_folder() / "compiled"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{secrets.token_hex(4)}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        return (
            f"compile cache {folder} is not writable ({error.strerror}): going on without;"
            " `compile_cache` chooses another"
        )
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", WORTH_KEEPING)
    compilation_cache.reset_cache()  # a process asks once whether there is one
    return None
