"""Where shards are: files of a folder. Imports no jax, and nothing that is slow to import."""

from __future__ import annotations

from pathlib import Path


def find_shards(folder: Path) -> list[Path]:
    """Returns the shards in a folder, and in the folders in it."""
    return sorted([*folder.glob("shard*.tar"), *folder.glob("*/shard*.tar")])
