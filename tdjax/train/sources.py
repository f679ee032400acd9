"""Samples from a folder of shards, and one prompt's embedding."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from einops import rearrange

from tdjax.config import CLIP_TOKENS
from tdjax.errors import UsageError
from tdjax.text.embeds import load_embeds
from tdjax.train.shards import BF16, DAMAGE, DataError, Entry, decode, index
from tdjax.train.storage import is_remote, open_storage


class ShardSource:
    """A folder of `shard*.tar` files, or of folders of them, each with samples of one size. Latents
    are cut to their first `frames`; text stays bfloat16.

    folder: or an address, such as s3://bucket/shards, whose shards are copied to `cache`, where
            the last `keep` of them stay.
    blank: (h, w) of latents of zeros where shards hold prompts alone; None where latents are read.
    condition: channels beside the noisy latents of an image-to-video network; 0 for none.
    features: width of the CLIP features that the network reads; None for none.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        frames: int,
        channels: int,
        text_dim: int,
        condition: int = 0,
        features: int | None = None,
        blank: tuple[int, int] | None = None,
        cache: Path = Path("shards"),
        keep: int = 24,
    ):
        self.folder = folder
        self.storage = open_storage(folder, cache, keep)
        if not self.storage.names:
            raise DataError(
                f"{folder} has no shards",
                _instead(folder),
                "a data set is a folder of shard_000000.tar, shard_000001.tar, ...",
            )
        self.frames = frames
        self.condition = condition
        self.features = features
        # The first shard of each size.
        self.firsts = {self.size(unit): unit for unit in reversed(range(self.units))}
        embed = self.first(0).embed.array()
        self.text_shape = (embed.shape[0] if embed.ndim else 0, text_dim)
        # As stored [c t h w]; any number of frames from that of a batch on.
        self.latent_shapes: dict[str, tuple[int | None, ...]] = {}
        self.lengths: dict[str, int] = {}
        for size, unit in self.firsts.items():
            stored = self.first(unit).latent
            latent = self._blank(channels, blank) if stored is None else stored.array()
            self.latent_shapes[size] = (channels, None, *latent.shape[2:])
            shorter = len(self.firsts) > 1 and latent.ndim == 4
            self.lengths[size] = min(frames, latent.shape[1]) if shorter else frames

    @property
    def units(self) -> int:
        """How many shards there are."""
        return len(self.storage.names)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of the names and sizes of all shards."""
        each = zip(self.storage.names, self.storage.sizes, strict=True)
        listing = "".join(f"{name} {size}\n" for name, size in each)
        return hashlib.sha256(listing.encode()).hexdigest()[:16]

    def size(self, unit: int) -> str:
        """Returns the name of the size that the samples of a shard have: its folder."""
        return self.storage.names[unit].rpartition("/")[0]

    def first(self, unit: int) -> Entry:
        """Returns the first sample of a shard. Raises DataError for a bad shard."""
        return self.entries(unit)[0]

    def entries(self, unit: int) -> Sequence[Entry]:
        """Returns the samples of a shard. Raises DataError for a bad one, and for one that cannot
        be fetched."""
        try:
            return index(self.storage.fetch(unit))
        except UsageError as error:
            raise DataError(error.what, error.why, error.fix) from error

    def read(
        self, entry: Entry
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray | None]:
        """Returns (latents f32[t h w c], text bf16[s d], image f32[t h w condition] or None,
        features f32[257 features] or None). Raises DataError for a sample of another shape, and for
        one without what the network reads."""
        folder = entry.embed.shard.parent.relative_to(self.storage.folder).as_posix()
        size = "" if folder == "." else folder
        shape, frames = self.latent_shapes[size], self.lengths[size]
        if entry.latent is None:
            latent = self._blank(shape[0], shape[2:])
        else:
            latent = _fitting(entry.latent.array(), shape, entry.latent)
        if latent.shape[1] < frames:
            raise DataError(
                f"{entry.latent} has {latent.shape[1]} latent frames",
                f"{frames} are asked for; longer ones are cut",
                "set data.frames to the smallest number",
            )
        text = _fitting(entry.embed.array(), self.text_shape, entry.embed)
        image = self._image(entry, latent, frames)
        return _cut(latent, frames), text.astype(BF16), image, self._features(entry)

    def _blank(self, channels: int, shape: tuple[int, int] | None) -> np.ndarray:
        """Latents [c t h w] for prompts alone."""
        if shape is None:
            raise DataError(
                f"{self.folder} holds prompts without latents",
                "only rCM without a consistency term reads none, at the size that data.size gives",
                "give loss.consistency=none loss.warmup=0 data.size=832x480, or other shards",
            )
        return np.zeros((channels, self.frames, *shape), np.float32)

    def _image(self, entry: Entry, latent: np.ndarray, frames: int) -> np.ndarray | None:
        """What an image-to-video network reads beside the noisy latents: 1 in the first latent
        frame, 0 in the others, and latents of the first frame followed by grey ones."""
        if not self.condition:
            return None
        if entry.image is None:
            raise DataError(
                f"{entry.embed} has no latents of its first frame beside it",
                "an image-to-video network reads them",
                "write shards with python -m tdjax.train.encode --image_latents",
            )
        shape = (latent.shape[0], *latent.shape[1:])
        image = _cut(_fitting(entry.image.array(), shape, entry.image), frames)
        mask = np.zeros((*image.shape[:3], self.condition - image.shape[3]), np.float32)
        mask[0] = 1
        return np.concatenate([mask, image], axis=-1)

    def _features(self, entry: Entry) -> np.ndarray | None:
        """What the image branch of Wan2.1 image-to-video reads: CLIP's view of the first frame."""
        if self.features is None:
            return None
        shape = CLIP_TOKENS, self.features
        if entry.clip is None:
            key = entry.embed.name.rpartition(".embed.")[0]
            raise DataError(
                f"{entry.embed} has no CLIP features beside it",
                f"a Wan2.1 image-to-video network reads {key}.clip.pt, {list(shape)}: the first"
                " frame, as the last but one layer of CLIP ViT-H/14 gives it",
                "add them to the shards (docs/training.md, Data); there is no CLIP encoder here",
            )
        return _fitting(entry.clip.array(), shape, entry.clip).astype(np.float32)


def _instead(folder: str | Path) -> str:
    """What there is in place of shards."""
    if is_remote(folder):
        return "nothing there is called shard*.tar"
    if not Path(folder).is_dir():
        return "it is not a folder"
    there = sorted(path.name for path in Path(folder).glob("*"))[:8]
    return f"it holds {', '.join(there) or 'nothing'}"


def _cut(array: np.ndarray, frames: int) -> np.ndarray:  # [c t h w] -> f32 [frames h w c]
    return np.ascontiguousarray(rearrange(array[:, :frames], "c t h w -> t h w c"), np.float32)


def _fitting(array: np.ndarray, shape: tuple[int | None, ...], member) -> np.ndarray:
    """The array if it has this shape, where None is any size."""
    fits = array.ndim == len(shape)
    if not fits or any(n not in (None, m) for n, m in zip(shape, array.shape, strict=True)):
        raise DataError(
            f"{member} has shape {list(array.shape)}",
            f"expected {['any' if n is None else n for n in shape]}: the model's width, and the"
            " size of the first sample",
            "samples of one data set have one size",
        )
    return array


def read_embedding(path: str | Path) -> np.ndarray:
    """Returns the embedding [s d] of one prompt: of `umT5_wan_negative_emb.pt` as published, of
    .npy, or of what --save_prompt_embeds wrote. Raises DataError for another file."""
    path = Path(path)
    if path.suffix == ".safetensors":
        array = load_embeds(path)
    else:
        try:
            array = decode(path.name, path.read_bytes())
        except (OSError, *DAMAGE) as e:
            raise DataError(
                f"{path} holds no prompt embedding",
                str(e),
                "give umT5_wan_negative_emb.pt, .npy or .safetensors",
            ) from e
    array = array[0] if array.ndim == 3 and len(array) == 1 else array
    if array.ndim != 2:
        raise DataError(
            f"{path} has shape {list(array.shape)}",
            "one prompt's embedding is [tokens width]",
            "give one prompt",
        )
    return array
