"""`.gguf` files: typed metadata, tensors in blocks that are dequantised as they are read.

Layout: ggml-org/ggml docs/gguf.md; how Wan is kept in it: city96/ComfyUI-GGUF. The header is read
here, every length checked against the file; the `gguf` package decodes the blocks.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import ml_dtypes
import numpy as np

from tdjax.checkpoints.published.tensor import Tensor
from tdjax.config.values import shown
from tdjax.errors import CheckpointError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
AGAIN = "download it again"
SHAPE = "comfy.gguf.orig_shape."  # metadata: the shape of a tensor of more axes than ggml has
WORDS = "tokenizer.ggml."  # metadata: the tokenizer
BYTE = 6  # type of a piece that is one byte
AXES = 8
SCALARS = {  # struct code by type number
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
STRING, ARRAY = 8, 9
PLAIN = {  # types whose values lie as they are
    gguf.GGMLQuantizationType.F32: np.dtype(np.float32),
    gguf.GGMLQuantizationType.F16: np.dtype(np.float16),
    gguf.GGMLQuantizationType.BF16: np.dtype(ml_dtypes.bfloat16),
    gguf.GGMLQuantizationType.F64: np.dtype(np.float64),
}
BLOCKS = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
READ = {**PLAIN, **{gguf.GGMLQuantizationType[name]: None for name in BLOCKS}}
NETWORKS = ("wan", "t5", "t5encoder")  # what general.architecture may be


@dataclasses.dataclass(frozen=True)
class BlockTensor:
    """A tensor in blocks of quantised values: float32 where it is read."""

    file: Path
    start: int
    kind: gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    dtype: np.dtype = np.dtype(np.float32)

    @property
    def nbytes(self) -> int:
        return _bytes(self.kind, self.shape)

    def read(self) -> np.ndarray:
        raw = Tensor(self.file, self.start, np.dtype(np.uint8), (self.nbytes,)).read()
        values = gguf.quants.dequantize(
            raw.reshape(-1, gguf.GGML_QUANT_SIZES[self.kind][1]), self.kind
        )
        return values.reshape(self.shape).astype(np.float32, copy=False)


class _Header:
    """A reader that never goes past the end of its file."""

    def __init__(self, file: BinaryIO, path: Path, size: int):
        self.file, self.path, self.size = file, path, size

    def take(self, count: int) -> bytes:
        if count > self.size - self.file.tell():
            raise self.error("it ends inside its header")
        return self.file.read(count)

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(code)))[0]

    def text(self) -> str:
        try:
            return self.take(self.number("Q")).decode()
        except UnicodeDecodeError as error:
            raise self.error(f"a name in its header is not text: {error}") from error

    def count(self, least: int) -> int:
        """A number of entries, each of at least so many bytes."""
        found = self.number("Q")
        if found * least > self.size - self.file.tell():
            raise self.error(f"its header promises {found} entries")
        return found

    def value(self, kind: int) -> Any:
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            raise self.error(f"its metadata has type {kind}")
        inner = self.number("I")
        if inner in SCALARS:
            dtype = np.dtype(f"<{SCALARS[inner]}")
            return np.frombuffer(self.take(self.count(dtype.itemsize) * dtype.itemsize), dtype)
        if inner != STRING:
            raise self.error(f"its metadata has a list of type {inner}")
        return [self.text() for _ in range(self.count(8))]

    def error(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is a damaged GGUF file", why, AGAIN)


def read_gguf(path: Path) -> tuple[dict[str, Tensor | BlockTensor], dict[str, Any]]:
    """Returns ({key: tensor}, metadata: {name: number, text, array or list of texts}).

    Raises CheckpointError for damaged files, and for types of blocks that are not read, with those
    that are.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        header = _Header(file, path, size)
        if header.take(4) != MAGIC or header.number("I") not in VERSIONS:
            raise CheckpointError(
                f"{path} is a GGUF file of another version",
                f"versions read: {', '.join(map(str, VERSIONS))}",
                "convert it again with a current tool",
            )
        count, pairs = header.count(24), header.count(12)
        metadata = {}
        for _ in range(pairs):
            name = header.text()
            metadata[name] = header.value(header.number("I"))
        entries = [_entry(header) for _ in range(count)]
        step = metadata.get("general.alignment", 32)
        if type(step) is not int or step < 1 or step & (step - 1):
            raise header.error(f"its alignment is {step!r}")
        start = -(-file.tell() // step) * step
    out: dict[str, Tensor | BlockTensor] = {}
    for name, shape, kind, offset in entries:
        if name in out:
            raise header.error(f"tensor {name!r} is there twice")
        out[name] = _tensor(path, name, shape, kind, start + offset, size, metadata)
    return out, metadata


def vocabulary(path: Path) -> dict[str, Any]:
    """Returns the unigram model inside a file of umT5, as fields of
    `tdjax.text.sentencepiece.Spiece`. Raises CheckpointError where there is none."""
    _, metadata = read_gguf(path)
    about = {k.removeprefix(WORDS): v for k, v in metadata.items() if k.startswith(WORDS)}
    tokens, scores, kinds = (about.get(k) for k in ("tokens", "scores", "token_type"))
    charsmap = about.get("precompiled_charsmap", np.empty(0, np.uint8))
    why = None
    if about.get("model") != "t5":
        why = f"its tokenizer is {shown(about.get('model'))}; a unigram model (t5) is needed"
    elif (
        not isinstance(tokens, list)
        or not (_is_list(scores, "f") and _is_list(kinds, "iu") and _is_list(charsmap, "iu"))
        or not len(tokens) == len(scores) == len(kinds)
    ):
        why = "its tokens, their scores and their types do not belong together"
    if why is not None:
        raise CheckpointError(f"{path} holds no tokenizer of umT5", why, "give tokenizer_path")
    return {
        "pieces": list(zip(tokens, map(float, scores), map(int, kinds), strict=True)),
        "model_type": 1,
        "byte_fallback": bool((kinds == BYTE).any()),
        "space_suffix": False,
        "charsmap": charsmap.astype(np.uint8).tobytes(),
        "dummy_prefix": about.get("add_space_prefix") is not False,
        "remove_extra_spaces": about.get("remove_extra_whitespaces") is not False,
        "escape_spaces": True,
    }


def _is_list(value: Any, kinds: str) -> bool:
    """Whether metadata is a list of numbers of these kinds, as numpy calls them."""
    return isinstance(value, np.ndarray) and value.dtype.kind in kinds


def _entry(header: _Header) -> tuple[str, tuple[int, ...], int, int]:
    """(name, shape, type, offset) of one tensor; ggml writes the shape backwards."""
    name = header.text()
    axes = header.number("I")
    if axes > AXES:
        raise header.error(f"tensor {name!r} has {axes} axes")
    shape = tuple(header.number("Q") for _ in range(axes))[::-1]
    return name, shape, header.number("I"), header.number("Q")


def _tensor(
    path: Path,
    name: str,
    shape: tuple[int, ...],
    number: int,
    start: int,
    size: int,
    metadata: dict[str, Any],
) -> Tensor | BlockTensor:
    """One tensor where it lies in the file."""
    if number not in READ:
        known = {kind.value: kind.name for kind in gguf.GGMLQuantizationType}
        raise CheckpointError(
            f"{path}: tensor {name!r} is of type {known.get(number, number)}",
            f"read are {', '.join(kind.name for kind in READ)}",
            "give a file of one of these, such as Q8_0 or Q4_K_M",
        )
    kind = gguf.GGMLQuantizationType(number)
    per_block = gguf.GGML_QUANT_SIZES[kind][0]
    row = shape[-1] if shape else 1
    if row % per_block:
        raise CheckpointError(
            f"{path}: tensor {name!r} has rows of {row}",
            f"{kind.name} has blocks of {per_block}",
            AGAIN,
        )
    if start + _bytes(kind, shape) > size:
        raise CheckpointError(
            f"{path} is truncated", f"tensor {name!r} ends behind the end of the file", AGAIN
        )
    whole = metadata.get(f"{SHAPE}{name}")
    if whole is not None:
        given = tuple(map(int, whole[: AXES + 1])) if _is_list(whole, "iu") else ()
        if math.prod(given) != math.prod(shape) or len(given) > AXES or min(given, default=0) < 0:
            raise CheckpointError(
                f"{path}: tensor {name!r} has shape {list(shape)}",
                f"its metadata says {shown(np.asarray(whole).tolist())}",
                AGAIN,
            )
        shape = given
    if kind in PLAIN:
        return Tensor(path, start, PLAIN[kind], shape)
    return BlockTensor(path, start, kind, shape)


def _bytes(kind: gguf.GGMLQuantizationType, shape: tuple[int, ...]) -> int:
    per_block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    return math.prod(shape) // per_block * block_bytes


def check_network(path: Path, metadata: dict[str, Any]) -> None:
    """Raises CheckpointError for a file that says that it is another network."""
    name = metadata.get("general.architecture")
    if name is not None and name not in NETWORKS:
        raise CheckpointError(
            f"{path} is a GGUF file of the network {name!r}",
            f"read are those of {', '.join(NETWORKS)}",
            "give the file of a Wan transformer or of umT5",
        )
