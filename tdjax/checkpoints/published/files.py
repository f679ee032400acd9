"""What a path holds: {key: Tensor} of a .pth, a .safetensors, a shard index or a folder, keys
without wrappers' prefixes. What a file is, its first bytes tell, not its name."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tdjax.checkpoints.filenames import is_weights
from tdjax.checkpoints.published.read_safetensors import read_index, read_safetensors
from tdjax.checkpoints.published.read_torch import read_torch
from tdjax.checkpoints.published.tensor import Tensor
from tdjax.errors import CheckpointError

# what wrappers put in front
LEADING = (
    "model.diffusion_model.",
    "net.",
    "module.",
    "model.",
    "diffusion_model.",
    "_orig_mod.",
    "generator.",
    "generator_ema.",
)
# keys that mark a file and hold no weight: kijai's ComfyUI files, NVIDIA's TransformerEngine
MARKS = re.compile(r"model_type\..*|(.*\.)?_extra_state")
TORCH = (".pth", ".pt", ".bin", ".ckpt")  # endings of torch files
INDICES = (".safetensors.index.json", ".bin.index.json")
KEY_LENGTH = 512  # characters; those of published files end at 100
INNER = ("_checkpoint_wrapped_module.", "_fsdp_wrapped_module.", "_orig_mod.")  # and in between

LEGACY = (  # magic number of torch.save before torch 1.6
    b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
)
OTHERS = (
    (
        b"version https://git-lfs",
        "a git-lfs pointer, not the file itself",
        "git cloned without the large files",
        "git lfs pull, or download it",
    ),
    (
        b"<!doctype",
        "a web page",
        "the download saved an error page",
        "download it again, with a token if the model is gated",
    ),
    (
        b"<html",
        "a web page",
        "the download saved an error page",
        "download it again, with a token if the model is gated",
    ),
    (
        b"\x93NUMPY",
        "a numpy array",
        "a checkpoint holds named tensors",
        "give a .pth or .safetensors file",
    ),
    (b"\x89HDF", "an HDF5 file", "HDF5 is not read", "give a .pth or .safetensors file"),
)


@dataclasses.dataclass(frozen=True)
class Source:
    """A checkpoint's tensors under clean keys.

    files: what was read, for sizes and hashes. stripped: how often each wrapper's prefix was
           removed from a key.
    ignored: entries that are not tensors. marks: keys that mark the file and hold no weight.
    metadata: the text fields of safetensors files.
    level: under which keys of a torch file the weights were, such as "model".
    """

    path: Path
    files: tuple[Path, ...]
    tensors: dict[str, Tensor]
    stripped: dict[str, int]
    ignored: tuple[str, ...] = ()
    metadata: dict[str, str] = dataclasses.field(default_factory=dict)
    marks: tuple[str, ...] = ()
    level: str = ""

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values())

    def sha256(self, progress: Callable[[int], None] | None = None) -> str:
        """SHA-256 of the file; of the lines "<sha256>  <name>" in order of names where there are
        several."""
        digests = {file.name: _file_sha256(file, progress) for file in self.files}
        if len(digests) == 1:
            return next(iter(digests.values()))
        return hashlib.sha256(
            "".join(f"{d}  {n}\n" for n, d in sorted(digests.items())).encode()
        ).hexdigest()


def _file_sha256(file: Path, progress: Callable[[int], None] | None = None) -> str:
    """progress(n) is called after every n bytes."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(2**24))
    with file.open("rb", buffering=0) as f:
        while n := f.readinto(buffer):
            digest.update(buffer[:n])
            if progress:
                progress(n)
    return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class _Read:
    """One file, or several, as they are: a Source before its keys are cleaned."""

    tensors: dict[str, Tensor]
    ignored: tuple[str, ...] = ()
    metadata: dict[str, str] = dataclasses.field(default_factory=dict)
    level: str = ""


def open_source(path) -> Source:
    """Keys, shapes and dtypes of a published file or folder; no tensor data is read."""
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist", *_nearby(path))
    if path.is_dir():
        return _open_folder(path)
    if path.name.endswith(INDICES):
        return _open_index(path, path)
    return _clean(path, (path,), _read_file(path))


def _nearby(path: Path) -> tuple[str, str]:
    """Why and what to do, for a path that is not there."""
    if not path.parent.is_dir():
        return f"neither does the folder {path.parent}", "check the path"
    names = sorted(
        p.name
        for p in path.parent.iterdir()
        if is_weights(p.name) or p.name.endswith(INDICES) or p.is_dir()
    )
    return f"the folder {path.parent} does", f"it holds: {', '.join(names[:12]) or 'nothing'}"


def _read_file(path: Path) -> _Read:
    """One file; the kind is told by its first bytes, not by its name."""
    with path.open("rb") as f:
        head = f.read(64)
    for magic, what, why, fix in OTHERS:
        if head.lower().startswith(magic.lower()):  # pages write their first tag in either case
            raise CheckpointError(f"{path} is {what}", why, fix)
    if head.startswith(b"GGUF"):
        from tdjax.checkpoints.published import read_gguf  # its library is slow to import

        tensors, metadata = read_gguf.read_gguf(path)
        read_gguf.check_network(path, metadata)
        return _Read(tensors)
    if head.startswith(b"PK"):
        saved = read_torch(path)
        return _Read(saved.tensors, saved.ignored, level=saved.level)
    if head.startswith(LEGACY):
        raise CheckpointError(
            f"{path} is in the format of torch before 1.6",
            "only the zip format is read",
            "save it again: torch.save(torch.load(f, weights_only=True), g)",
        )
    if (
        head[:1] == b"\x80"
        and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")
        and b"{" not in head[8:9]
    ):
        raise CheckpointError(
            f"{path} is a bare pickle",
            "pickles are programs and are not executed",
            "save the tensors with torch.save or safetensors",
        )
    if head[8:9] == b"{":
        tensors, metadata = read_safetensors(path)
        return _Read(tensors, metadata=metadata)
    what = "empty" if not head else "neither a torch zip file, a safetensors file nor a GGUF file"
    raise CheckpointError(
        f"{path} is {what}",
        f"it begins with {head[:16]!r}",
        "give a .pth, .safetensors or .gguf file, or download it again",
    )


def _open_folder(path: Path) -> Source:
    """A folder of one model: a shard index, or its .safetensors files, or its torch files, or its
    .gguf file."""
    indices = [p for ending in INDICES for p in sorted(path.glob(f"*{ending}"))]
    kinds = ((".safetensors", ".sft"), TORCH, (".gguf",))
    found = (sorted(f for ending in kind for f in path.glob(f"*{ending}")) for kind in kinds)
    files = next(filter(None, found), [])
    if any(p.name.endswith(INDICES[0]) for p in indices):  # beside copies in the other format
        indices = [p for p in indices if p.name.endswith(INDICES[0])]
    if len(indices) == 1:
        return _open_index(indices[0], path)
    if len(indices) > 1:
        raise CheckpointError(
            f"{path} holds {len(indices)} shard indices",
            ", ".join(p.name for p in indices),
            "name one of them",
        )
    _refuse_trainers(path)
    if not files:
        parts = sorted(p.name for p in path.iterdir() if p.is_dir())
        raise CheckpointError(
            f"{path} holds no .safetensors, .pth or .gguf file",
            f"its folders: {', '.join(parts) or 'none'}",
            "name the file or the component's folder",
        )
    if len(files) == 1:
        return _clean(path, (files[0],), _read_file(files[0]))
    if any("-of-" in f.name for f in files):
        return _open_shards(path, files)
    raise CheckpointError(
        f"{path} holds {len(files)} files", ", ".join(f.name for f in files[:8]), "name one of them"
    )


def _refuse_trainers(path: Path) -> None:
    """Checkpoints that a trainer spread over its processes are named, with what joins them."""
    if (path / ".metadata").is_file() or any(path.glob("*.distcp")):
        raise CheckpointError(
            f"{path} is a checkpoint of torch.distributed",
            "each process wrote its own part of every tensor",
            "join them, with torch: python -m torch.distributed.checkpoint.format_utils"
            f" dcp_to_torch {path} FILE.pth",
        )
    marks = ("zero_to_fp32.py", "*_model_states.pt", "*/*_model_states.pt", "*/*_optim_states.pt")
    if any(found for mark in marks for found in path.glob(mark)):
        raise CheckpointError(
            f"{path} is a checkpoint of DeepSpeed",
            "its weights lie in parts of its processes",
            "join them with the script that DeepSpeed put there: python zero_to_fp32.py . FOLDER",
        )


def _open_index(index: Path, path: Path) -> Source:
    """The shards that an index lists; every key must be in the shard that the index names."""
    table = read_index(index)
    shards = {name: _read_file(index.parent / name) for name in sorted(set(table.values()))}
    for name, read in shards.items():
        listed = {key for key, shard in table.items() if shard == name}
        if listed != read.tensors.keys():
            odd = sorted(listed ^ read.tensors.keys())
            raise CheckpointError(
                f"{index} and {name} differ in {len(odd)} keys",
                ", ".join(odd[:5]),
                "download it again",
            )
    return _joined(path, {index.parent / name: read for name, read in shards.items()})


def _open_shards(path: Path, files: list[Path]) -> Source:
    """Shards without an index: complete by their own numbering (name-00001-of-00004)."""
    count = {f.stem.rpartition("-of-")[2] for f in files}
    if count != {f"{len(files):0{len(next(iter(count)))}d}"}:
        raise CheckpointError(
            f"{path} holds {len(files)} shards of {' or '.join(sorted(count))}",
            "some are missing",
            "download the rest",
        )
    return _joined(path, {file: _read_file(file) for file in files})


def _joined(path: Path, shards: dict[Path, _Read]) -> Source:
    """Several files as one; no key may be in two of them."""
    tensors: dict[str, Tensor] = {}
    ignored: tuple[str, ...] = ()
    metadata: dict[str, str] = {}
    for file, read in shards.items():
        twice = sorted(tensors.keys() & read.tensors.keys())
        if twice:
            raise CheckpointError(
                f"{file} repeats {len(twice)} keys of another shard",
                ", ".join(twice[:5]),
                "download it again",
            )
        tensors |= read.tensors
        metadata |= read.metadata
        ignored += read.ignored
    return _clean(path, tuple(shards), _Read(tensors, ignored, metadata))


def _clean(path: Path, files: tuple[Path, ...], read: _Read) -> Source:
    """Strip wrappers' prefixes, counting them. Two keys must not become one."""
    out: dict[str, Tensor] = {}
    stripped: Counter[str] = Counter()
    marks = []
    for key, tensor in read.tensors.items():
        if len(key) > KEY_LENGTH:
            raise CheckpointError(
                f"{path} holds a tensor whose name has {len(key)} characters",
                f"it begins with {key[:40]!r}; at most {KEY_LENGTH} are read",
                "the file is damaged, or of another network",
            )
        short, removed = without_wrappers(key)
        stripped.update(removed)
        if MARKS.fullmatch(short):
            marks.append(key)
            continue
        if short in out:
            raise CheckpointError(
                f"{path} holds {short!r} under two prefixes",
                "its keys mix wrapped and plain names",
                "keep one set of weights in the file",
            )
        out[short] = tensor
    return Source(
        path,
        files,
        out,
        dict(stripped),
        read.ignored,
        read.metadata,
        marks=tuple(marks),
        level=read.level,
    )


def without_wrappers(key: str) -> tuple[str, list[str]]:
    """Returns (`key` without the prefixes of wrappers, those prefixes)."""
    removed = []
    for inner in INNER:
        if inner in key:
            removed.append(inner)
            key = key.replace(inner, "")
    again = True
    while again:
        again = False
        for prefix in LEADING:
            if key.startswith(prefix):
                removed.append(prefix)
                key, again = key.removeprefix(prefix), True
    return key, removed
