"""Batches in a fixed order: sources of samples, the endless stream over them, and the thread that
reads ahead.

The order of samples is a function of the seed and of nothing else (not of the number of hosts, nor
of what was read before), so a place in it is three numbers: they are saved with a checkpoint, and
training goes on at the very next sample.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import queue
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from einops import rearrange
from jax.sharding import Mesh, NamedSharding

from tdjax.errors import UsageError
from tdjax.parallel.sharding import spec
from tdjax.text.embeds import load_embeds
from tdjax.train.shards import BF16, DAMAGE, DataError, Entry, decode, index
from tdjax.train.state import Batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Position:
    """A place in a stream: `offset` samples into a group of units of an epoch."""

    epoch: int = 0
    group: int = 0
    offset: int = 0


# Sources
# -----------------------------------------------------------------------------------------------------------------
# A source has `units` (what is shuffled first: shards), `entries(unit)` (its samples),
# `read(entry)` -> (latents f32 [t h w c], text [s d], image or None), and `fingerprint`, which
# changes when a saved position would mean other samples.


class ShardSource:
    """A folder of `shard*.tar` files. Latents are cut to their first `frames`; text stays
    bfloat16."""

    def __init__(self, folder: str | Path, *, frames: int, channels: int, text_dim: int):
        self.folder = Path(folder)
        self.files = sorted(self.folder.glob("shard*.tar"))
        if not self.files:
            there = (
                sorted(p.name for p in self.folder.glob("*"))[:8] if self.folder.is_dir() else []
            )
            why = (
                f"it holds {', '.join(there) or 'nothing'}"
                if self.folder.is_dir()
                else "it is not a folder"
            )
            raise DataError(
                f"{self.folder} has no shards",
                why,
                "a data set is a folder of shard_000000.tar, shard_000001.tar, ...",
            )
        self.frames = frames
        first = self.entries(0)[0]
        latent, embed = first.latent.array(), first.embed.array()
        self.latent_shape = (
            channels,
            None,
            *latent.shape[2:],
        )  # of what is stored; any number of frames from `frames` on
        self.text_shape = (embed.shape[0] if embed.ndim else 0, text_dim)

    @property
    def units(self) -> int:
        return len(self.files)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of the names and sizes of all shards."""
        return hashlib.sha256(
            "".join(f"{p.name} {p.stat().st_size}\n" for p in self.files).encode()
        ).hexdigest()[:16]

    def entries(self, unit: int) -> Sequence[Entry]:
        return index(self.files[unit])

    def read(self, entry: Entry):
        latent = fitting(entry.latent.array(), self.latent_shape, entry.latent)
        if latent.shape[1] < self.frames:
            raise DataError(
                f"{entry.latent} has {latent.shape[1]} latent frames",
                f"{self.frames} are asked for; longer ones are cut",
                "set data.frames to the smallest number",
            )
        text = fitting(entry.embed.array(), self.text_shape, entry.embed)
        return (
            np.ascontiguousarray(
                rearrange(latent[:, : self.frames], "c t h w -> t h w c"), np.float32
            ),
            text.astype(BF16),
            None,
        )


def fitting(array: np.ndarray, shape: tuple[int | None, ...], member) -> np.ndarray:
    """The array if it has this shape, where None is any size."""
    if array.ndim != len(shape) or any(
        n not in (None, m) for n, m in zip(shape, array.shape, strict=True)
    ):
        raise DataError(
            f"{member} has shape {list(array.shape)}",
            f"expected {['any' if n is None else n for n in shape]}: the model's width, and the"
            " size of the first sample",
            "samples of one data set have one size",
        )
    return array


class ArraySource:
    """Samples in memory: latents f32 [n t h w c], text [n s d], image [n t h w 20] or None."""

    units = 1

    def __init__(self, latents: np.ndarray, text: np.ndarray, image: np.ndarray | None = None):
        arrays = [a for a in (latents, text, image) if a is not None]
        if len({len(a) for a in arrays}) != 1 or not len(latents):
            raise UsageError(
                f"arrays of {[len(a) for a in arrays]} samples",
                "latents, text and image hold the same samples, at least one",
            )
        self.latents, self.text, self.image = latents, text, image

    @functools.cached_property
    def fingerprint(self) -> str:
        arrays = [a for a in (self.latents, self.text, self.image) if a is not None]
        return hashlib.sha256(
            repr([(a.shape, str(a.dtype), a.reshape(-1)[:64].tobytes()) for a in arrays]).encode()
        ).hexdigest()[:16]

    def entries(self, unit: int) -> Sequence[int]:
        return range(len(self.latents))

    def read(self, entry: int):
        return (
            np.asarray(self.latents[entry], np.float32),
            self.text[entry],
            None if self.image is None else self.image[entry],
        )


def read_embedding(path: str | Path) -> np.ndarray:
    """[s d] of one prompt: `umT5_wan_negative_emb.pt` as published, .npy, or what
    --save_prompt_embeds wrote."""
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


# Order
# -------------------------------------------------------------------------------------------------------------------


def permutation(count: int, *seed: int) -> np.ndarray:
    """An order of range(count) that depends on the seed alone. Raw bits are sorted, since numpy
    keeps those (and not its shuffles) the same in every version."""
    return np.argsort(
        np.random.PCG64(np.random.SeedSequence(seed)).random_raw(count), kind="stable"
    )


class Stream:
    """Batches without end. Units are shuffled in every epoch, then the samples of each `mix` units
    that follow each other.

    batch: samples of all hosts together. host: (index, count); a host reads its rows of every
           batch.
    """

    def __init__(
        self, source, *, batch: int, seed: int = 0, mix: int = 4, host: tuple[int, int] = (0, 1)
    ):
        if batch % host[1]:
            raise UsageError(
                f"data.batch is {batch}",
                f"{host[1]} hosts take equal parts of a batch",
                f"use a multiple of {host[1]}",
            )
        self.source, self.size, self.seed, self.mix = source, batch, seed, mix
        part = batch // host[1]
        self.rows = range(host[0] * part, (host[0] + 1) * part)
        self.order = functools.lru_cache(maxsize=2)(self.ordered)

    def ordered(self, epoch: int, group: int) -> list:
        """The entries of one group in the order of their turn."""
        units = permutation(self.source.units, self.seed, epoch)[
            group * self.mix : (group + 1) * self.mix
        ]
        entries = [entry for unit in units for entry in self.source.entries(int(unit))]
        return [entries[i] for i in permutation(len(entries), self.seed, epoch, group)]

    def following(self, position: Position, count: int) -> tuple[list, Position]:
        """The next entries, and the place behind them."""
        out: list = []
        while True:
            entries = self.order(position.epoch, position.group)
            taken = entries[position.offset : position.offset + count - len(out)]
            out += taken
            position = dataclasses.replace(position, offset=position.offset + len(taken))
            if len(out) == count:
                return out, position
            last = position.group + 1 == math.ceil(self.source.units / self.mix)
            position = (
                Position(epoch=position.epoch + 1)
                if last
                else Position(epoch=position.epoch, group=position.group + 1)
            )

    def batch(self, position: Position) -> tuple[Batch, Position]:
        """This host's rows of the batch at a place, as numpy arrays, and the place behind the whole
        batch."""
        entries, position = self.following(position, self.size)
        latents, text, image = zip(*(self.source.read(entries[i]) for i in self.rows), strict=True)
        stack = lambda arrays: None if arrays[0] is None else np.stack(arrays)
        return Batch(latents=stack(latents), text=stack(text), image=stack(image)), position

    def saved(self, position: Position) -> dict[str, Any]:
        """A place as JSON values."""
        return {
            **dataclasses.asdict(position),
            "seed": self.seed,
            "mix": self.mix,
            "data": self.source.fingerprint,
        }

    def restored(self, saved: dict[str, Any]) -> Position:
        """The place that `saved` gave; the beginning if the seed is another one. UsageError if it
        would mean other samples now."""
        now = self.saved(Position())
        if saved.get("seed") != now["seed"]:
            return Position()
        changed = [
            f"{name} was {saved.get(name)}, is {now[name]}"
            for name in ("mix", "data")
            if saved.get(name) != now[name]
        ]
        if changed:
            raise UsageError(
                "the data is not what the checkpoint was trained on",
                f"{'; '.join(changed)} (data: a hash of the shards' names and sizes)",
                "give the same data.path and data.mix, or another data.seed: the data then begins"
                " anew",
            )
        return Position(**{f.name: saved[f.name] for f in dataclasses.fields(Position)})


# Reading ahead
# -----------------------------------------------------------------------------------------------------------


def on_device(batch: Batch, mesh: Mesh | None = None) -> Batch:
    """Samples over the mesh's data axes; each host gives its own rows."""
    if mesh is None:
        return jax.device_put(batch)
    count = jax.process_count()
    rows = lambda x: NamedSharding(
        mesh, spec((len(x) * count, *x.shape[1:]), ("batch",), dict(mesh.shape))
    )
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(rows(x), x), batch)


class ReadAhead:
    """Batches of a stream from a place on, read by one thread, `depth` of them ahead, and put on
    the device when they are asked for.

    The thread leaves the device alone: beside its work cuDNN may not be able to prepare a first
    step (`tdjax.pipeline.kernel_check.wait_for_threads`).

    with ReadAhead(stream, position, place) as batches:
        batch, position = batches.next()
    """

    def __init__(
        self,
        stream: Stream,
        position: Position,
        place: Callable[[Batch], Batch] = on_device,
        depth: int = 2,
    ):
        self.stream, self.position, self.place = stream, position, place
        self.ready: queue.Queue = queue.Queue(maxsize=depth)
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self.run, name="tdjax data", daemon=True)

    def run(self) -> None:
        """The thread: until it is stopped, or an error, which is handed on in the place of a
        batch."""
        position = self.position
        while not self.stopped.is_set():
            try:
                item = self.stream.batch(position)
                position = item[1]
            except Exception as error:  # noqa: BLE001  (raised again by next)
                item = error
            self.ready.put(item)
            if isinstance(item, Exception):
                return

    def next(self) -> tuple[Batch, Position]:
        """The next batch and the place behind it."""
        item = self.ready.get()
        if isinstance(item, Exception):
            raise item
        batch, position = item
        return self.place(batch), position

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.stopped.set()
        while self.thread.is_alive():  # it may stand before a full queue
            while not self.ready.empty():
                self.ready.get_nowait()
            self.thread.join(0.01)
