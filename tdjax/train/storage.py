"""Where shards are: a folder, or a folder of object storage, from which they are copied as their
turn comes. Imports no jax, and nothing that is slow to import."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from pathlib import Path
from typing import Any

from tdjax.errors import UsageError, first_line
from tdjax.files import written


def is_remote(folder: str | Path) -> bool:
    """Whether a folder is an address, such as s3://bucket/shards."""
    return "://" in str(folder)


def find_shards(folder: Path) -> list[Path]:
    """Returns the shards in a folder, and in the folders in it."""
    return sorted([*folder.glob("shard*.tar"), *folder.glob("*/shard*.tar")])


@dataclasses.dataclass(frozen=True)
class LocalFolder:
    """Shards on a disk. names: their paths below the folder; sizes: their bytes."""

    folder: Path
    names: tuple[str, ...]
    sizes: tuple[int, ...]

    def fetch(self, unit: int) -> Path:
        """Returns the file of a shard."""
        return self.folder / self.names[unit]


class RemoteFolder:
    """Shards in object storage, by fsspec: whole files are copied to `folder`, and the `keep` that
    were asked for last stay there. A copy of the right size that is there is taken."""

    def __init__(self, files: Any, paths: dict[str, tuple[str, int]], folder: Path, keep: int):
        self.files = files
        self.names = tuple(paths)
        self.sizes = tuple(size for _, size in paths.values())
        self.folder = folder
        self.keep = keep
        self._paths = [path for path, _ in paths.values()]
        self._here: OrderedDict[int, Path] = OrderedDict()

    def fetch(self, unit: int) -> Path:
        """Returns a copy of a shard. Raises UsageError where it cannot be read."""
        path = self.folder / self.names[unit]
        if not path.is_file() or path.stat().st_size != self.sizes[unit]:
            with written(path, overwrite=True, size=self.sizes[unit]) as part:
                _tried(self._paths[unit], self.files.get_file, self._paths[unit], str(part))
        self._here[unit] = path
        self._here.move_to_end(unit)
        while len(self._here) > self.keep:
            self._here.popitem(last=False)[1].unlink(missing_ok=True)
        return path


def open_storage(folder: str | Path, cache: Path, keep: int) -> LocalFolder | RemoteFolder:
    """Returns the shards of a folder or an address; nothing of them is read. Raises UsageError for
    an address that cannot be listed.

    cache: where copies of remote shards go; keep: how many stay.
    """
    if not is_remote(folder):
        folder = Path(folder)
        found = find_shards(folder)
        names = tuple(path.relative_to(folder).as_posix() for path in found)
        return LocalFolder(folder, names, tuple(path.stat().st_size for path in found))
    import fsspec

    files, root = _tried(str(folder), fsspec.core.url_to_fs, str(folder))
    listed = _tried(str(folder), files.find, root, maxdepth=2, detail=True)
    prefix = root.rstrip("/") + "/"
    paths = {path.removeprefix(prefix): (path, facts["size"]) for path, facts in listed.items()}
    shard = lambda name: name.rpartition("/")[2].startswith("shard") and name.endswith(".tar")
    return RemoteFolder(files, {n: paths[n] for n in sorted(paths) if shard(n)}, cache, keep)


def _tried(address: str, function, *args, **options):
    """What a function of fsspec returns; its errors, of whatever kind, in three lines."""
    try:
        return function(*args, **options)
    except ImportError as error:
        raise UsageError(
            f"{address} needs a driver", str(error), "pip install s3fs (s3://) or gcsfs (gs://)"
        ) from error
    except Exception as error:  # each driver raises its own
        raise UsageError(
            f"{address} cannot be read",
            f"{type(error).__name__}: {first_line(error)}",
            "check the address and the rights to it",
        ) from error
