"""`.pth` files without torch: a zip archive of one pickle and one stored entry per storage."""

from __future__ import annotations

import dataclasses
import struct
import zipfile
import zlib
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from tdjax.checkpoints.published import torch_pickle
from tdjax.checkpoints.published.tensor import Entry, Tensor, damaged_entry
from tdjax.checkpoints.published.torch_pickle import Opaque, View
from tdjax.errors import CheckpointError

LOCAL_HEADER = struct.Struct(
    "<4s22sHH"
)  # signature, (not needed here), length of the name, length of the extra field
PICKLE_BYTES = 2**26
# Keys under which trainers put the weights, the likeliest first.
LEVELS = (
    "state_dict",
    "model",
    "module",
    "model_state_dict",
    "ema",
    "generator",
    "generator_ema",
    "ema_model",
    "model_ema",
    "params_ema",
    "net_ema",
    "net",
    "params",
)
EXTRA = "_extra_state"  # TransformerEngine's own, which is no tensor
PLAIN = (int, float, str, bytes, bytearray, type(None))
DEPTH = 3  # levels below the top that are looked through
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


@dataclasses.dataclass(frozen=True)
class Saved:
    """The state dict of a torch file. ignored: the names of what stands in it without being a
    tensor, and beside it without being a number or text. level: under which keys it was found, such
    as "model"; "" for the top."""

    tensors: dict[str, Tensor]
    ignored: tuple[str, ...]
    level: str


def read_torch(path: Path) -> Saved:
    """The tensors saved in a torch zip file; nothing in the file is executed.

    Raises CheckpointError naming the file when it is damaged, holds no state dict, or has anything
        but tensors and plain values among the weights. Other objects beside them are left unread.
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
        archive = _Archive(f, path, root, entries)
        if (
            f"{root}byteorder" in entries
            and archive.bytes(entries[f"{root}byteorder"], 16) != b"little"
        ):
            raise CheckpointError(
                f"{path} was saved on a big-endian machine",
                "only little-endian files are read",
                "save it again",
            )
        try:
            tree = torch_pickle.load(archive.bytes(entries[pickles[0]], PICKLE_BYTES))
        except torch_pickle.Refused as e:
            raise _refused(path, str(e)) from e
        level, state, ignored = _state_dict(path, tree)
        tensors = {key: archive.tensor(view) for key, view in state.items()}
        return Saved(tensors, ignored, level)


def _refused(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is not a plain file of tensors: {why}",
        "it was refused and nothing in it was executed",
        f"save it again {RESAVE}",
    )


def _state_dict(path: Path, tree) -> tuple[str, dict[str, View], tuple[str, ...]]:
    """(its level, {key: view}, the names of everything else) of the state dict in a saved object.

    A trainer's file has single tensors beside the weights (a step, a random state), and other
    dicts of tensors: of all dicts the one at the likeliest level is taken that has at least half as
    many tensors as the largest.
    """
    if isinstance(tree, View):
        raise CheckpointError(
            f"{path} holds one tensor without a name",
            "a checkpoint is a dict of tensors",
            "give a checkpoint",
        )
    if isinstance(tree, Opaque):
        raise _refused(path, f"it holds a {tree.text}, which is not part of a tensor")
    found = dict(_dicts(tree))
    counts = {level: sum(isinstance(v, View) for v in d.values()) for level, d in found.items()}
    most = max(counts.values(), default=0)
    large = [
        level
        for level, count in counts.items()
        if count and (count == most or (level and 2 * count >= most))
    ]
    known = [level for level in large if set(level) <= set(LEVELS)]
    if not large:
        raise _nothing(path, tree)
    if not known and len(large) > 1:
        names = ", ".join(".".join(level) for level in large)
        raise CheckpointError(
            f"{path} holds several sets of tensors: {names}",
            "nothing says which of them is the model",
            "save one of them alone with torch.save",
        )
    level = min(known or large, key=lambda level: [LEVELS.index(k) for k in level if k in LEVELS])
    state = found[level]
    odd = next(
        (
            x
            for key, value in state.items()
            for x in (key, value)
            if isinstance(x, Opaque) and not str(key).endswith(EXTRA)
        ),
        None,
    )
    if odd is not None:
        raise _refused(path, f"it names {odd.text}, which is not part of a tensor")
    ignored = [str(k) for k, v in state.items() if not isinstance(v, View)]
    for depth in range(len(level)):
        beside = found[level[:depth]]
        ignored += [
            _name(k) for k, v in beside.items() if k != level[depth] and not isinstance(v, PLAIN)
        ]
    views = {str(k): v for k, v in state.items() if isinstance(v, View)}
    return ".".join(level), views, tuple(ignored)


def _dicts(tree) -> Iterator[tuple[tuple[str, ...], dict]]:
    """(its level, dict) of a saved object's dicts, each once, `DEPTH` levels deep at most."""
    seen: set[int] = set()
    waiting: deque = deque([((), tree)] if isinstance(tree, dict) else [])
    while waiting:
        level, here = waiting.popleft()
        if id(here) in seen:
            continue
        seen.add(id(here))
        yield level, here
        if len(level) < DEPTH:
            waiting += [
                ((*level, key), value)
                for key, value in here.items()
                if isinstance(key, str) and isinstance(value, dict)
            ]


def _nothing(path: Path, tree) -> CheckpointError:
    """The error of a file without tensors, which names what it would have called."""
    values = list(tree.values()) if isinstance(tree, dict) else tree
    odd = [x for x in values if isinstance(x, Opaque)] if isinstance(values, list) else []
    if odd:
        return _refused(path, f"it names {odd[0].text}, which is not part of a tensor")
    names = ", ".join(map(_name, list(tree)[:8])) if isinstance(tree, dict) else ""
    seen = names or ("an empty dict" if isinstance(tree, dict) else type(tree).__name__)
    return CheckpointError(
        f"{path} holds no dict of tensors",
        f"found: {seen}",
        f"weights are looked for at the top and under {', '.join(LEVELS)}",
    )


def _name(key) -> str:
    """A key for a message."""
    return key.text if isinstance(key, Opaque) else str(key)[: torch_pickle.NAME_LENGTH]


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


class _Archive:
    """Entries of an open file by their place, each checked once.

    Their checksums are verified where the file has any: torch writes zeros for all if it is told
    to save without.
    """

    def __init__(self, f, path: Path, root: str, entries: dict[str, zipfile.ZipInfo]):
        self.f, self.path, self.root, self.entries = f, path, root, entries
        self.size = path.stat().st_size
        self.summed = any(info.CRC for info in entries.values())
        self.starts: dict[str, int] = {}
        self.read: dict[str, Entry] = {}  # those that hold tensors

    def start(self, info: zipfile.ZipInfo) -> int:
        """Where an entry's bytes begin: behind its local header, whose length only the header
        itself tells."""
        if info.filename not in self.starts:
            self.f.seek(info.header_offset)
            header = self.f.read(LOCAL_HEADER.size)
            if len(header) < LOCAL_HEADER.size or header[:4] != b"PK\3\4":
                raise CheckpointError(
                    f"{self.path} is damaged",
                    f"entry {info.filename!r} has no header where the directory says",
                    "download it again",
                )
            _, _, name, extra = LOCAL_HEADER.unpack(header)
            self.starts[info.filename] = info.header_offset + LOCAL_HEADER.size + name + extra
        return self.starts[info.filename]

    def bytes(self, info: zipfile.ZipInfo, limit: int) -> bytes:
        """A small entry, verified."""
        if info.file_size > limit:
            raise CheckpointError(
                f"{self.path}: entry {info.filename!r} has {info.file_size} bytes",
                f"at most {limit} are expected",
                "do not trust this file",
            )
        self.f.seek(self.start(info))
        data = self.f.read(info.file_size)
        if len(data) < info.file_size:
            raise CheckpointError(
                f"{self.path} is truncated",
                f"entry {info.filename!r} ends early",
                "download it again",
            )
        if self.summed and zlib.crc32(data) != info.CRC:
            raise damaged_entry(self.path, info.filename)
        return data

    def tensor(self, v: View) -> Tensor:
        """A view as a tensor of the file."""
        name = f"{self.root}data/{v.storage.key}"
        if name not in self.entries:
            raise CheckpointError(
                f"{self.path} is damaged", f"its entry {name!r} is missing", "download it again"
            )
        info = self.entries[name]
        start = self.start(info)
        needed = v.storage.size * v.storage.dtype.itemsize
        if needed > info.file_size or start + info.file_size > self.size:
            raise CheckpointError(
                f"{self.path} is damaged",
                f"storage {v.storage.key!r} should have {needed} bytes and has {info.file_size}",
                "download it again",
            )
        if self.summed and name not in self.read:
            self.read[name] = Entry(self.path, name, start, info.file_size, info.CRC)
        return Tensor(
            self.path,
            start + v.offset * v.dtype.itemsize,
            v.dtype,
            v.shape,
            v.strides,
            self.read.get(name),
        )
