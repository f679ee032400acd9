"""The shards that official training reads: tar files of latents, prompt embeddings and prompts,
without torch or webdataset.

One sample is three members whose names share a key: KEY.latent.pt [c t h w], KEY.embed.pt [s d],
KEY.prompt.txt. For image-to-video there are more: KEY.image.pt [c t h w], latents of the first
frame, and for Wan2.1 KEY.clip.pt [257 1280], its CLIP features.
Layout: NVlabs/rcm rcm/datasets/build_synthetic_dataset.py (writer), webdataset.py (reader). `.pth`
and `.npy` are read too.
"""

from __future__ import annotations

import dataclasses
import io
import math
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from einops import rearrange

from tdjax.checkpoints.published import torch_pickle
from tdjax.config.parsing import npy_array
from tdjax.errors import CheckpointError
from tdjax.files import written

BF16 = np.dtype(ml_dtypes.bfloat16)
_FIELDS = ("latent", "embed", "image", "clip")
_SUFFIXES = ("pt", "pth", "npy")
DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    torch_pickle.Refused,
    ValueError,
    KeyError,
    EOFError,
    NotImplementedError,
    RuntimeError,
)


class DataError(CheckpointError):
    """A shard or one of its members is missing, damaged, hostile, or not of the shape that training
    expects."""


@dataclasses.dataclass(frozen=True)
class Member:
    """A file inside a shard: `size` bytes from `start`."""

    shard: Path
    name: str
    start: int
    size: int

    def __str__(self) -> str:
        return f"{self.shard}: {self.name}"

    def bytes(self) -> bytes:
        """Returns the contents. Raises DataError where the shard ends early."""
        with self.shard.open("rb") as f:
            f.seek(self.start)
            data = f.read(self.size)
        if len(data) < self.size:
            raise DataError(
                f"{self} ends early",
                f"{len(data)} of {self.size} bytes",
                "download the shard again",
            )
        return data

    def array(self) -> np.ndarray:
        """Returns the one array of the member. Raises DataError with the member's name; nothing in
        it is executed."""
        try:
            return decode(self.name, self.bytes())
        except DAMAGE as e:
            raise DataError(
                f"{self} cannot be read",
                f"{type(e).__name__}: {e}",
                "leave the sample out, or write the shard again",
            ) from e


@dataclasses.dataclass(frozen=True)
class Entry:
    """One sample: where its latents (None where there is a prompt alone), its prompt embedding and,
    for image-to-video, the latents of its first frame and the frame's CLIP features lie."""

    latent: Member | None
    embed: Member
    image: Member | None = None
    clip: Member | None = None


def index(shard: Path) -> tuple[Entry, ...]:
    """Returns the samples of a shard in the order of its members; only headers are read. Raises
    DataError naming what is wrong."""
    found: dict[str, dict[str, Member]] = {}
    try:
        size = shard.stat().st_size
        with tarfile.open(shard, "r:") as tar:
            for info in tar:
                field, key = _field_of(info.name)
                if field is None or info.isdir():
                    continue
                member = Member(shard, info.name, info.offset_data, info.size)
                if not info.isreg() or info.issparse():
                    raise DataError(
                        f"{member} is no plain file",
                        "a link or a device in a shard",
                        "do not trust this shard",
                    )
                if not 0 <= info.size <= size - info.offset_data:
                    raise tarfile.ReadError(f"{info.name} ends behind the end of the file")
                if field in found.setdefault(key, {}):
                    raise DataError(
                        f"{member} is a second {field}",
                        f"the first is {found[key][field].name}",
                        "write the shard again",
                    )
                found[key][field] = member
            # The library takes a header that is damaged for the end of the archive.
            with shard.open("rb") as rest:
                rest.seek(tar.offset)
                if any(block.strip(b"\0") for block in iter(lambda: rest.read(2**20), b"")):
                    raise tarfile.ReadError(f"the header at byte {tar.offset} is damaged")
    except (tarfile.TarError, OSError, ValueError, OverflowError) as e:
        raise DataError(
            f"{shard} cannot be read",
            f"{e}; a shard is an uncompressed tar file",
            "download it again",
        ) from e
    prompts_alone = not any("latent" in members for members in found.values())
    needed = ("embed",) if prompts_alone else ("latent", "embed")
    for key, members in found.items():
        missing = [field for field in needed if field not in members]
        if missing:
            name = next(iter(members.values())).name
            raise DataError(
                f"{shard}: {name} has no {key}.{missing[0]}.pt beside it",
                "a sample needs both",
                "write the shard again",
            )
    if not found:
        raise DataError(
            f"{shard} holds no sample",
            "members are named KEY.latent.pt and KEY.embed.pt",
            "check the file",
        )
    return tuple(Entry(**{"latent": None, **members}) for members in found.values())


def _field_of(name: str) -> tuple[str | None, str]:
    """ "a/000000123.latent.pt" -> ("latent", "a/000000123"); the key ends at the first dot of the
    base name."""
    folder, slash, base = name.rpartition("/")
    stem, _, rest = base.partition(".")
    field, _, suffix = rest.partition(".")
    return (field if field in _FIELDS and suffix in _SUFFIXES else None), folder + slash + stem


# -- arrays ----------------------------------------------------------------------------------------


def decode(name: str, data: bytes) -> np.ndarray:
    """Returns a float array from the bytes of a .npy file or of a torch file that holds one tensor.

    Raises one of DAMAGE for anything else, and for NaN or infinity.
    """
    array = _npy_array(data) if name.endswith(".npy") else _torch_array(data)
    if array.dtype not in (BF16, np.float16, np.float32, np.float64):
        raise ValueError(f"it holds {array.dtype} {list(array.shape)}, not floats")
    if not np.isfinite(array).all():
        raise ValueError("it holds NaN or infinity")
    return array


def _npy_array(data: bytes) -> np.ndarray:
    array = npy_array(data)
    return array.view(BF16) if array.dtype == np.dtype("V2") else array  # how numpy writes bfloat16


def _torch_array(data: bytes) -> np.ndarray:
    """The tensor of a `torch.save` archive in memory, by the same restricted pickle machine that
    reads checkpoints."""
    with zipfile.ZipFile(io.BytesIO(data)) as z:
        pickles = [name for name in z.namelist() if f"/{name}".endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError("it is a zip archive without data.pkl, not a torch file")
        root = pickles[0].removesuffix("data.pkl")
        if f"{root}byteorder" in z.namelist() and _stored(z, f"{root}byteorder") != b"little":
            raise ValueError("it was saved on a big-endian machine")
        view = torch_pickle.load(_stored(z, pickles[0]))
        if isinstance(view, torch_pickle.Opaque):
            raise ValueError(f"it names {view.text}, which is not part of a tensor")
        if not isinstance(view, torch_pickle.View):
            raise ValueError(f"it holds a {type(view).__name__}, not one tensor")
        values = _stored(z, f"{root}data/{view.storage.key}")
    if len(values) < view.storage.size * view.storage.dtype.itemsize:
        raise ValueError(f"its storage has {len(values)} bytes for {view.storage.size} elements")
    flat = np.frombuffer(values, view.dtype, count=len(values) // view.dtype.itemsize)
    strides = [stride * view.dtype.itemsize for stride in view.strides]
    return np.lib.stride_tricks.as_strided(
        flat[view.offset :], view.shape, strides, writeable=False
    )


def _stored(z: zipfile.ZipFile, name: str) -> bytes:
    """An entry that takes as much room in the archive as in memory; its checksum is compared."""
    if z.getinfo(name).compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"entry {name!r} is compressed")
    return z.read(name)


# -- writing ---------------------------------------------------------------------------------------


def write_shard(
    path: str | Path,
    samples: Iterable[tuple[Any, ...]],
    first: int = 0,
    overwrite: bool = False,
) -> Path:
    """Writes samples (latents [t h w c], text [s d], prompt) in the official layout, the file
    complete or not at all. Returns its path.

    Latents are None where there are prompts alone. A fourth entry of a sample is the latents
    [t h w c] of its first frame followed by grey ones, the condition of image-to-video;
    KEY.image.pt. A fifth one is the frame's CLIP features [257 1280], which Wan2.1 reads;
    KEY.clip.pt.
    first: number of the first sample; keys have nine digits. Tensors are bfloat16, as torch.load
    reads them.
    """
    with (
        written(Path(path), overwrite) as part,
        tarfile.open(part, "w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for key, (latents, text, prompt, *of_image) in enumerate(samples, first):
            members = {} if latents is None else {"latent.pt": _channels_first(latents)}
            members |= {
                "embed.pt": torch_bytes(np.asarray(text).astype(BF16)),
                "prompt.txt": prompt.encode(),
            }
            if of_image:
                members["image.pt"] = _channels_first(of_image[0])
            if len(of_image) > 1:
                members["clip.pt"] = torch_bytes(np.asarray(of_image[1]).astype(BF16))
            for suffix, data in members.items():
                info = tarfile.TarInfo(f"{key:09}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return Path(path)


def _channels_first(latents: np.ndarray) -> bytes:  # [t h w c]
    return torch_bytes(rearrange(np.asarray(latents), "t h w c -> c t h w").astype(BF16))


def torch_bytes(array: np.ndarray) -> bytes:
    """Returns a bfloat16 array as `torch.save` would write it: a pickle of protocol 2 that rebuilds
    one tensor, and its storage."""
    entries = {
        "data.pkl": _tensor_pickle(array.shape),
        "byteorder": b"little",
        "data/0": np.ascontiguousarray(array).tobytes(),
        "version": b"3\n",
    }
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as z:
        for entry, data in entries.items():
            # An entry without a date: the same samples give the same bytes.
            z.writestr(zipfile.ZipInfo(f"archive/{entry}"), data)
    return out.getvalue()


def _tensor_pickle(shape: tuple[int, ...]) -> bytes:
    """The pickle of a contiguous bfloat16 tensor whose storage is entry 0 of the archive."""
    integer = lambda value: b"J" + struct.pack("<i", value)
    text = lambda value: b"X" + struct.pack("<I", len(value)) + value
    name = lambda module, attribute: b"c" + module + b"\n" + attribute + b"\n"
    group = lambda *items: b"(" + b"".join(items) + b"t"
    storage = group(
        text(b"storage"),
        name(b"torch", b"BFloat16Storage"),
        text(b"0"),
        text(b"cpu"),
        integer(math.prod(shape)),
    )
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    arguments = group(
        storage + b"Q",  # by the storage's persistent id
        integer(0),  # offset
        group(*map(integer, shape)),
        group(*map(integer, strides)),
        b"\x89",  # needs no gradient
        name(b"collections", b"OrderedDict") + b")R",  # hooks
    )
    return b"\x80\x02" + name(b"torch._utils", b"_rebuild_tensor_v2") + arguments + b"R."
