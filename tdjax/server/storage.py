"""Files of finished videos in an object store that all servers share, by fsspec."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import fsspec
from fsspec.implementations.local import LocalFileSystem

from tdjax.errors import UsageError
from tdjax.progress import say

CHUNK = 4 * 2**20  # bytes that are read at a time


class Storage:
    """A place under an address such as s3://bucket/prefix. A name there is a whole file or none."""

    def __init__(self, url: str):
        self.url = url
        try:
            # Listings are not kept: other servers put files there.
            self.fs, self.root = fsspec.core.url_to_fs(url, use_listings_cache=False)
        except (ValueError, ImportError, OSError) as error:
            why = str(error).strip().split("\n")[0]
            fix = "s3://bucket/prefix needs pip install s3fs, gs:// gcsfs, abfs:// adlfs"
            raise UsageError(f"{url} cannot be opened", why, fix) from error
        self._removing = ThreadPoolExecutor(1)

    def close(self) -> None:
        """Waits until what was to be removed is."""
        self._removing.shutdown()

    def _place(self, name: str) -> str:
        return f"{self.root.rstrip('/')}/{name}"

    def put(self, path: Path) -> None:
        """Publishes a file of this machine under its name."""
        part = f"{path.name}.{secrets.token_hex(4)}.part"
        try:
            self.fs.put_file(str(path), self._place(part))
            self.fs.mv(self._place(part), self._place(path.name))  # not all show whole files alone
        except BaseException:
            self.remove([part])
            raise

    def fetch(self, name: str, path: Path) -> None:
        """Writes a file of this machine from one of the store."""
        self.fs.get_file(self._place(name), str(path))

    def size(self, name: str) -> int:
        """Returns the bytes of a file; 0 where there is none."""
        try:
            return int(self.fs.info(self._place(name))["size"])
        except FileNotFoundError:
            return 0

    def read(self, name: str, begin: int, end: int) -> Iterator[bytes]:
        """The bytes of a part of a file, from `begin` and before `end`."""
        for first in range(begin, end, CHUNK):
            last = min(first + CHUNK, end)
            yield self.fs.cat_file(self._place(name), start=first, end=last)

    def remove(self, names: Iterable[str]) -> None:
        """Removes files, if they are there; not waited for."""
        self._removing.submit(self._remove, list(names))

    def _remove(self, names: list[str]) -> None:
        for name in names:
            try:
                self.fs.rm_file(self._place(name))
            except FileNotFoundError:
                pass
            except Exception as error:  # whatever a library of a store raises
                say(f"tdjax: {name} cannot be removed from {self.url}: {error}")


def opened(given: str) -> Path | Storage:
    """Returns the folder or the store that a path or an address means. Raises UsageError."""
    if not urlsplit(given).scheme:
        return Path(given).expanduser()
    storage = Storage(given)
    if isinstance(storage.fs, LocalFileSystem):  # file://: processes write there themselves
        storage.close()
        return Path(storage.root)
    return storage
