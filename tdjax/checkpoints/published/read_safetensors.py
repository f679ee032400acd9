"""`.safetensors` files: eight bytes of header length, a JSON header, the tensors' bytes without
gaps; and shard indices.

Format: huggingface/safetensors README.md.
"""

from __future__ import annotations

import math
from pathlib import Path

from tdjax.checkpoints.published.tensor import DTYPES, Tensor
from tdjax.config.parsing import json_object
from tdjax.errors import CheckpointError

HEADER_BYTES = 100 * 2**20  # the limit of the format's own library
AGAIN = "download it again"


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """({key: Tensor}, the file's text metadata). Raises CheckpointError naming the file when
    anything does not add up."""
    size = path.stat().st_size
    with path.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if size < 8 or length > min(size - 8, HEADER_BYTES):
            raise CheckpointError(
                f"{path} is truncated or not a safetensors file",
                f"{size} bytes, of which a header of {length}",
                AGAIN,
            )
        raw = f.read(length)
    try:
        header = json_object(raw, unique=True)
    except ValueError as e:
        raise CheckpointError(
            f"{path} has a damaged header", f"{type(e).__name__}: {str(e)[:200]}", AGAIN
        ) from e
    metadata = header.pop("__metadata__", None)
    spans, out = [], {}
    for key, entry in header.items():
        dtype, shape, begin, end = _fields(path, key, entry)
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise CheckpointError(
                f"{path}: tensor {key!r} has {end - begin} bytes",
                f"shape {shape} of {dtype} needs another number",
                AGAIN,
            )
        spans.append((begin, end, key))
        out[key] = Tensor(path, 8 + length + begin, dtype, shape)
    _check_spans(path, spans, size - 8 - length)
    metadata = metadata if isinstance(metadata, dict) else {}
    return out, {k: v for k, v in metadata.items() if isinstance(v, str)}


def _fields(path: Path, key: str, entry) -> tuple:
    """(dtype, shape, begin, end) of one header entry."""
    number = lambda n: type(n) is int and 0 <= n < 2**63
    try:
        name, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        good = (
            isinstance(name, str)
            and isinstance(shape, list)
            and len(shape) <= 64
            and all(map(number, [*shape, begin, end]))
        )
    except (KeyError, TypeError, ValueError):
        good = False
    if not good:
        raise CheckpointError(
            f"{path}: the header entry of {key!r} is malformed", str(entry)[:200], AGAIN
        )
    if name not in DTYPES:
        raise CheckpointError(
            f"{path}: tensor {key!r} has dtype {name}",
            f"read are: {', '.join(DTYPES)}",
            "give bf16, fp16, fp32 or int8 weights",
        )
    return DTYPES[name], tuple(shape), begin, end


def _check_spans(path: Path, spans: list, total: int) -> None:
    """Tensors lie one behind the other and fill the file."""
    at = 0
    for begin, end, key in sorted(spans):
        if begin != at:
            raise CheckpointError(
                f"{path}: tensor {key!r} begins at {begin}, expected {at}",
                "tensors overlap or leave a gap",
                AGAIN,
            )
        at = end
    if at != total:
        what = "truncated" if at > total else "longer than its header says"
        raise CheckpointError(
            f"{path} is {what}",
            f"the header lists {at} bytes of tensors, the file has {total}",
            AGAIN,
        )


def read_index(path: Path) -> dict[str, str]:
    """{key: name of the file beside the index that holds it} of an index.json, whose files are all
    there."""
    try:
        table = json_object(path.read_bytes(), unique=True)["weight_map"]
        if not isinstance(table, dict) or not all(isinstance(v, str) for v in table.values()):
            raise ValueError("weight_map is not a table of file names")
    except (ValueError, KeyError, OSError) as e:
        raise CheckpointError(
            f"{path} is not a shard index", f"{type(e).__name__}: {str(e)[:200]}", AGAIN
        ) from e
    shards = sorted(set(table.values()))
    for shard in shards:
        if Path(shard).name != shard or shard in (".", "..") or "\\" in shard or "\0" in shard:
            raise CheckpointError(
                f"{path} names the shard {shard[:100]!r}",
                "shards lie beside their index",
                "do not trust this file",
            )
    here = {p.name for p in path.parent.iterdir() if p.is_file()}
    missing = [s[:100] for s in shards if s not in here]
    if missing:
        raise CheckpointError(
            f"{path.parent} lacks {len(missing)} of {len(shards)} shards",
            ", ".join(missing[:8]),
            "download the rest",
        )
    return table
