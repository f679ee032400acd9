"""The persistent cache of compiled programs, which JAX keeps: where it is, from which programs on,
and that no damaged entry stays in it. `tdjax.pipeline.executables` keeps its own beside them.
Imports jax when it is turned on."""

from __future__ import annotations

import os
import secrets
import stat
import zlib
from pathlib import Path

from tdjax.checkpoints.locate import cache_folder

ENTRY = f"*-{'[0-9a-f]' * 64}-cache"  # JAX's names; the folder may hold other things
CHECKED = ".tdjax-checked"  # is as old as the last look at the entries
PIECE = 2**20  # bytes that are decompressed at once
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
        try:
            probe.touch()
            _remove_damaged(folder, probe)
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        return (
            f"compile cache {folder} is not writable ({error.strerror}): going on without;"
            " `compile_cache` chooses another"
        )
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", WORTH_KEEPING)
    compilation_cache.reset_cache()  # a process asks once whether there is one
    return None


def _remove_damaged(folder: Path, now: Path) -> None:
    """Removes entries that were cut while they were written: JAX replaces none that is there, and
    would compile its program in every process. Only those are looked at that were written since
    the last time.

    now: a file that was made just now; it becomes the mark of this look.
    """
    mark = folder / CHECKED
    since = mark.stat().st_mtime_ns if mark.exists() else 0
    if since > now.stat().st_mtime_ns:
        since = 0  # the clock has been put back: entries since then are older than the mark
    for entry in folder.glob(ENTRY):
        try:
            facts = entry.lstat()
            regular = stat.S_ISREG(facts.st_mode)
            if regular and facts.st_mtime_ns >= since and not _is_whole(entry):
                entry.unlink()
        except FileNotFoundError:  # another process was first
            continue
    os.replace(now, mark)


def _is_whole(entry: Path) -> bool:
    """Whether an entry is not empty, and comes to its end where zlib has compressed it."""
    with entry.open("rb") as file:
        data = file.read(PIECE)
        if data[:1] != b"\x78":
            return bool(data)
        stream = zlib.decompressobj()
        try:
            while data and not stream.eof:
                stream.decompress(data)
                data = file.read(PIECE)
        except zlib.error:
            return False
    return stream.eof
