"""What a path holds: {key: Tensor} of a .pth, a .safetensors, a shard index or a folder, keys
without wrappers' prefixes."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tdjax.checkpoints.published.read_safetensors import read_index, read_safetensors
from tdjax.checkpoints.published.read_torch import read_torch
from tdjax.checkpoints.published.tensor import Tensor
from tdjax.errors import CheckpointError

LEVELS = (
    "state_dict",
    "model",
    "module",
    "model_state_dict",
    "ema",
    "generator",
)  # keys under which trainers put the weights
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
        b"<!DOCTYPE",
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
    """

    path: Path
    files: tuple[Path, ...]
    tensors: dict[str, Tensor]
    stripped: dict[str, int]
    ignored: tuple[str, ...] = ()
    metadata: dict[str, str] = dataclasses.field(default_factory=dict)
    marks: tuple[str, ...] = ()

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


def open_source(path) -> Source:
    """Keys, shapes and dtypes of a published file or folder; no tensor data is read."""
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist", *_nearby(path))
    if path.is_dir():
        return _open_folder(path)
    if path.name.endswith(".index.json"):
        tensors, files, metadata = read_index(path)
        return _clean(path, tuple(files), tensors, (), metadata)
    return _open_file(path)


def _nearby(path: Path) -> tuple[str, str]:
    """Why and what to do, for a path that is not there."""
    if not path.parent.is_dir():
        return f"neither does the folder {path.parent}", "check the path"
    names = sorted(
        p.name
        for p in path.parent.iterdir()
        if p.suffix in (".pth", ".safetensors", ".json") or p.is_dir()
    )
    return f"the folder {path.parent} does", f"it holds: {', '.join(names[:12]) or 'nothing'}"


def _open_file(path: Path) -> Source:
    """One file; the kind is told by its first bytes, not by its name."""
    with path.open("rb") as f:
        head = f.read(64)
    for magic, what, why, fix in OTHERS:
        if head.startswith(magic):
            raise CheckpointError(f"{path} is {what}", why, fix)
    if head.startswith(b"GGUF"):
        from tdjax.checkpoints.published import read_gguf  # its library is slow to import

        tensors, metadata = read_gguf.read_gguf(path)
        read_gguf.check_network(path, metadata)
        return _clean(path, (path,), tensors, (), {})
    if head.startswith(b"PK"):
        tensors, ignored = state_dict(path, read_torch(path))
        return _clean(path, (path,), tensors, ignored, {})
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
        return _clean(path, (path,), tensors, (), metadata)
    what = "empty" if not head else "neither a torch zip file, a safetensors file nor a GGUF file"
    raise CheckpointError(
        f"{path} is {what}",
        f"it begins with {head[:16]!r}",
        "give a .pth, .safetensors or .gguf file, or download it again",
    )


def _open_folder(path: Path) -> Source:
    """A folder of one model: a shard index, or its .safetensors files, or its one torch file."""
    indices = sorted(path.glob("*.safetensors.index.json"))
    if len(indices) == 1:
        return dataclasses.replace(open_source(indices[0]), path=path)
    files = sorted(path.glob("*.safetensors")) or sorted(
        [*path.glob("*.pth"), *path.glob("*.pt"), *path.glob("*.bin")]
    )
    if len(indices) > 1:
        raise CheckpointError(
            f"{path} holds {len(indices)} shard indices",
            ", ".join(p.name for p in indices),
            "name one of them",
        )
    if not files:
        parts = sorted(p.name for p in path.iterdir() if p.is_dir())
        raise CheckpointError(
            f"{path} holds no .safetensors or .pth file",
            f"its folders: {', '.join(parts) or 'none'}",
            "name the file or the component's folder",
        )
    if len(files) == 1:
        return dataclasses.replace(_open_file(files[0]), path=path)
    if any("-of-" in f.name for f in files):
        return _open_shards(path, files)
    raise CheckpointError(
        f"{path} holds {len(files)} files", ", ".join(f.name for f in files[:8]), "name one of them"
    )


def _open_shards(path: Path, files: list[Path]) -> Source:
    """Shards without an index: complete by their own numbering (name-00001-of-00004), no key
    twice."""
    count = {f.stem.rpartition("-of-")[2] for f in files}
    if count != {f"{len(files):0{len(next(iter(count)))}d}"}:
        raise CheckpointError(
            f"{path} holds {len(files)} shards of {' or '.join(sorted(count))}",
            "some are missing",
            "download the rest",
        )
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for file in files:
        part, facts = read_safetensors(file)
        twice = sorted(tensors.keys() & part.keys())
        if twice:
            raise CheckpointError(
                f"{file} repeats {len(twice)} keys of another shard",
                ", ".join(twice[:5]),
                "download it again",
            )
        tensors, metadata = tensors | part, metadata | facts
    return _clean(path, tuple(files), tensors, (), metadata)


def state_dict(path: Path, tree) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors of a saved object and the names of its other entries, one or two known levels
    down if need be."""
    if isinstance(tree, Tensor):
        raise CheckpointError(
            f"{path} holds one tensor without a name",
            "a checkpoint is a dict of tensors",
            "give a checkpoint",
        )
    for _ in range(3):
        if not isinstance(tree, dict):
            break
        tensors = {str(k): v for k, v in tree.items() if isinstance(v, Tensor)}
        if tensors:
            return tensors, tuple(str(k) for k, v in tree.items() if not isinstance(v, Tensor))
        below = [level for level in LEVELS if isinstance(tree.get(level), dict)]
        if not below:
            break
        tree = tree[below[0]]
    seen = ", ".join(map(str, list(tree)[:8])) if isinstance(tree, dict) else type(tree).__name__
    raise CheckpointError(
        f"{path} holds no dict of tensors",
        f"found: {seen or 'an empty dict'}",
        f"weights are looked for at the top and under {', '.join(LEVELS)}",
    )


def _clean(path: Path, files, tensors: dict[str, Tensor], ignored, metadata) -> Source:
    """Strip wrappers' prefixes, counting them. Two keys must not become one."""
    out: dict[str, Tensor] = {}
    stripped: Counter[str] = Counter()
    marks = []
    for key, tensor in tensors.items():
        short = _strip(key, stripped)
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
    return Source(path, tuple(files), out, dict(stripped), tuple(ignored), metadata, tuple(marks))


def _strip(key: str, stripped: Counter) -> str:
    """`key` without any of the known prefixes."""
    for inner in INNER:
        if inner in key:
            stripped[inner] += 1
            key = key.replace(inner, "")
    again = True
    while again:
        again = False
        for prefix in LEADING:
            if key.startswith(prefix):
                stripped[prefix] += 1
                key, again = key.removeprefix(prefix), True
    return key
