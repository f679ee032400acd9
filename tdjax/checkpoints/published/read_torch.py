"""`.pth` files without torch: a zip archive of one pickle and one stored entry per storage."""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path
from typing import Any

from tdjax.checkpoints.published import torch_pickle
from tdjax.checkpoints.published.tensor import Tensor
from tdjax.errors import CheckpointError

LOCAL_HEADER = struct.Struct(
    "<4s22sHH"
)  # signature, (not needed here), length of the name, length of the extra field
PICKLE_BYTES = 2**28
RESAVE = "with torch: torch.save({k: v for k, v in model.state_dict().items()}, 'plain.pth')"
DAMAGE = (
    zipfile.BadZipFile,
    struct.error,
    ValueError,
    NotImplementedError,
    OverflowError,
    OSError,
    EOFError,
    IndexError,
)


def read_torch(path: Path) -> Any:
    """The object saved in a torch zip file with every tensor as a `Tensor`; nothing in the file is
    executed.

    Raises CheckpointError naming the file when it is damaged, or holds anything but tensors and
        plain values.
    """
    entries = _archive(path)
    pickles = [name for name in entries if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(pickles) != 1:
        kind = "a numpy archive" if any(n.endswith(".npy") for n in entries) else "a zip archive"
        raise CheckpointError(
            f"{path} is {kind}, not a torch file",
            "it has no data.pkl",
            "give a .pth or .safetensors file",
        )
    root = pickles[0].removesuffix("data.pkl")
    if any(n.startswith(f"{root}code/") for n in entries) or f"{root}constants.pkl" in entries:
        raise CheckpointError(
            f"{path} is a TorchScript program, not a state dict",
            "programs are not executed",
            f"save its weights {RESAVE}",
        )
    with path.open("rb") as f:
        if (
            f"{root}byteorder" in entries
            and _entry_bytes(f, path, entries[f"{root}byteorder"], 16) != b"little"
        ):
            raise CheckpointError(
                f"{path} was saved on a big-endian machine",
                "only little-endian files are read",
                "save it again",
            )
        data = _entry_bytes(f, path, entries[pickles[0]], PICKLE_BYTES)
        try:
            tree = torch_pickle.load(data)
        except torch_pickle.Refused as e:
            raise CheckpointError(
                f"{path} is not a plain file of tensors: {e}",
                "it was refused and nothing in it was executed",
                f"save it again {RESAVE}",
            ) from e
        return _Binder(f, path, root, entries).bind(tree, 0)


def _archive(path: Path) -> dict[str, zipfile.ZipInfo]:
    """The archive's directory, each entry checked: stored as is, a plain relative name, inside the
    file."""
    try:
        size = path.stat().st_size
        with zipfile.ZipFile(path) as z:
            infos = z.infolist()
    except DAMAGE as e:
        raise CheckpointError(
            f"{path} is truncated or damaged",
            f"a torch file is a zip archive; {e}",
            "download it again",
        ) from e
    out: dict[str, zipfile.ZipInfo] = {}
    end = 0
    for info in sorted(infos, key=lambda i: i.header_offset):
        name, parts = info.filename, info.filename.replace("\\", "/").split("/")
        if name.startswith(("/", "\\")) or ".." in parts:
            raise CheckpointError(
                f"{path} has an entry named {name!r}",
                "it leads outside the archive",
                "do not trust this file",
            )
        if name in out:
            raise CheckpointError(
                f"{path} has two entries named {name!r}",
                "a torch file has each name once",
                "do not trust this file",
            )
        if (
            info.compress_type != zipfile.ZIP_STORED
            or info.flag_bits & 1
            or info.compress_size != info.file_size
        ):
            raise CheckpointError(
                f"{path}: entry {name!r} is compressed or encrypted",
                "torch stores entries as they are",
                "save it again with torch.save",
            )
        if (
            info.header_offset < end
            or info.header_offset + LOCAL_HEADER.size + info.file_size > size
        ):
            raise CheckpointError(
                f"{path}: entry {name!r} overlaps another one or the end of the file",
                "the archive is damaged",
                "download it again",
            )
        end = info.header_offset + LOCAL_HEADER.size + info.file_size
        out[name] = info
    return out


def _entry_start(f, path: Path, info: zipfile.ZipInfo) -> int:
    """Where an entry's bytes begin: behind its local header, whose length only the header itself
    tells."""
    f.seek(info.header_offset)
    header = f.read(LOCAL_HEADER.size)
    if len(header) < LOCAL_HEADER.size or header[:4] != b"PK\3\4":
        raise CheckpointError(
            f"{path} is damaged",
            f"entry {info.filename!r} has no header where the directory says",
            "download it again",
        )
    _, _, name, extra = LOCAL_HEADER.unpack(header)
    return info.header_offset + LOCAL_HEADER.size + name + extra


def _entry_bytes(f, path: Path, info: zipfile.ZipInfo, limit: int) -> bytes:
    if info.file_size > limit:
        raise CheckpointError(
            f"{path}: entry {info.filename!r} has {info.file_size} bytes",
            f"at most {limit} are expected",
            "do not trust this file",
        )
    f.seek(_entry_start(f, path, info))
    data = f.read(info.file_size)
    if len(data) < info.file_size:
        raise CheckpointError(
            f"{path} is truncated", f"entry {info.filename!r} ends early", "download it again"
        )
    return data


class _Binder:
    """Turns the pickle's views into tensors of the file, each storage checked once."""

    def __init__(self, f, path: Path, root: str, entries: dict[str, zipfile.ZipInfo]):
        self.f, self.path, self.root, self.entries = f, path, root, entries
        self.size = path.stat().st_size
        self.starts: dict[str, int] = {}

    def bind(self, tree, depth: int):
        """Dicts with their views replaced, four levels deep; deeper ones hold no state dict."""
        if isinstance(tree, torch_pickle.View):
            return self.tensor(tree)
        if isinstance(tree, dict) and depth < 4:
            return {key: self.bind(value, depth + 1) for key, value in tree.items()}
        return None if isinstance(tree, dict | list | tuple) else tree

    def tensor(self, v: torch_pickle.View) -> Tensor:
        start = self.start(v.storage)
        return Tensor(self.path, start + v.offset * v.dtype.itemsize, v.dtype, v.shape, v.strides)

    def start(self, storage: torch_pickle.Storage) -> int:
        if storage.key not in self.starts:
            name = f"{self.root}data/{storage.key}"
            if name not in self.entries:
                raise CheckpointError(
                    f"{self.path} is damaged", f"its entry {name!r} is missing", "download it again"
                )
            self.starts[storage.key] = _entry_start(self.f, self.path, self.entries[name])
        start, info = self.starts[storage.key], self.entries[f"{self.root}data/{storage.key}"]
        needed = storage.size * storage.dtype.itemsize
        if needed > info.file_size or start + needed > self.size:
            raise CheckpointError(
                f"{self.path} is damaged",
                f"storage {storage.key!r} should have {needed} bytes and has {info.file_size}",
                "download it again",
            )
        return start
