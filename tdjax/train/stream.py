"""Batches in a fixed order: the endless stream over a source of samples, and the thread that reads
ahead.

The order of samples is a function of the seed and of nothing else (not of the number of hosts, nor
of what was read before), so a place in it is three numbers: they are saved with a checkpoint, and
training goes on at the very next sample.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from tdjax.errors import UsageError
from tdjax.parallel.sharding import spec
from tdjax.train.shards import DataError
from tdjax.train.state import Batch


class Source(Protocol):
    """What batches are made of: samples in units (shards), which are shuffled first."""

    units: int
    fingerprint: str  # another one where a saved position would mean other samples

    def entries(self, unit: int) -> Sequence[Any]:
        """Returns the samples of a unit, unread."""
        ...

    def size(self, unit: int) -> str:
        """Returns the name of the size of a unit's samples: those of one size make a batch."""
        ...

    def read(self, entry) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray | None]:
        """Returns (latents f32[t h w c], text [s d], image [t h w 20] or None, features [257 1280]
        or None)."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Position:
    """A place in a stream: `offset` samples into a group of units of an epoch."""

    epoch: int = 0
    group: int = 0
    offset: int = 0


# -- order -----------------------------------------------------------------------------------------


def permutation(count: int, *seed: int) -> np.ndarray:
    """Returns an order of range(count) that depends on the seed alone. Raw bits are sorted, since
    numpy keeps those (and not its shuffles) the same in every version."""
    bits = np.random.PCG64(np.random.SeedSequence(seed)).random_raw(count)
    return np.argsort(bits, kind="stable")


class Stream:
    """Batches without end. Units are shuffled in every epoch, then the samples of each `mix` units
    that follow each other. Where units have several sizes, each batch is of one of them: batches
    are shuffled then, and the samples of a group that fill none are left out in that epoch.

    batch: samples of all hosts together. rows: those of every batch that this host reads; None for
           all.
    max_skipped: samples that may be damaged; in the place of one stands the next of its batch.
                 note: called with a line about each.
    """

    def __init__(
        self,
        source: Source,
        *,
        batch: int,
        seed: int = 0,
        mix: int = 4,
        max_skipped: int = 0,
        note: Callable[[str], None] = lambda text: None,
        rows: Sequence[int] | None = None,
    ):
        self.source = source
        self.size = batch
        self.seed = seed
        self.mix = mix
        self.max_skipped = max_skipped
        self.note = note
        self.damaged: set[Any] = set()
        self.sizes = sorted({source.size(unit) for unit in range(source.units)})
        self.rows = range(batch) if rows is None else rows
        self._order = functools.lru_cache(maxsize=2)(self._ordered)

    def _ordered(self, epoch: int, group: int) -> list:
        """The entries of one group in the order of their turn."""
        units = permutation(self.source.units, self.seed, epoch)
        if len(self.sizes) > 1:
            return self._batches(units, epoch, group)
        units = units[group * self.mix : (group + 1) * self.mix]
        entries = [entry for unit in units for entry in self.source.entries(int(unit))]
        return [entries[i] for i in permutation(len(entries), self.seed, epoch, group)]

    def _batches(self, units: np.ndarray, epoch: int, group: int) -> list:
        """The same where units have several sizes: whole batches of one size each. The units of
        each size are spread over all groups."""
        batches = []
        for number, size in enumerate(self.sizes):
            own = [int(unit) for unit in units if self.source.size(int(unit)) == size]
            begin, end = (len(own) * i // self.groups for i in (group, group + 1))
            entries = [entry for unit in own[begin:end] for entry in self.source.entries(unit)]
            order = permutation(len(entries), self.seed, epoch, group, number)
            whole = len(entries) // self.size * self.size
            for i in range(0, whole, self.size):
                batches.append([entries[j] for j in order[i : i + self.size]])
        turns = permutation(len(batches), self.seed, epoch, group)
        return [entry for i in turns for entry in batches[i]]

    @property
    def groups(self) -> int:
        """Into how many groups the units of an epoch are divided."""
        return math.ceil(self.source.units / self.mix)

    def _following(self, position: Position, count: int) -> tuple[list, Position]:
        """The next entries, and the place behind them."""
        out: list = []
        groups, first = self.groups, position.epoch
        while True:
            if len(self.sizes) > 1 and position.epoch > first + 1:
                names = ", ".join(map(repr, self.sizes))
                raise UsageError(
                    f"data.batch is {self.size}",
                    f"no size of {names} has so many samples in a group of shards",
                    "use a smaller data.batch, or a greater data.mix",
                )
            entries = self._order(position.epoch, position.group)
            taken = entries[position.offset : position.offset + count - len(out)]
            out += taken
            position = dataclasses.replace(position, offset=position.offset + len(taken))
            if len(out) == count:
                return out, position
            if position.group + 1 < groups:
                position = Position(epoch=position.epoch, group=position.group + 1)
            else:
                position = Position(epoch=position.epoch + 1)

    def batch(self, position: Position) -> tuple[Batch, Position]:
        """Returns this host's rows of the batch at a place, as numpy arrays, and the place behind
        the whole batch. Raises DataError for more samples than may be damaged."""
        entries, position = self._following(position, self.size)
        samples = zip(*(self._read(entries, i) for i in self.rows), strict=True)
        stack = lambda arrays: None if arrays[0] is None else np.stack(arrays)
        return Batch(*map(stack, samples)), position

    def _read(self, entries: list, row: int):
        """The sample of a row; in place of a damaged one the next of the batch, so that the other
        rows stay what they are, on whatever host."""
        for i in range(len(entries)):
            entry = entries[(row + i) % len(entries)]
            try:
                return self.source.read(entry)
            except DataError as error:
                self._skip(entry, error)
        raise DataError(
            f"none of the {len(entries)} samples of a batch can be read",
            "each was skipped",
            "check the shards",
        )

    def _skip(self, entry, error: DataError) -> None:
        """Counts a damaged sample, once however often its turn comes. Raises DataError beyond the
        limit."""
        if entry in self.damaged:
            return
        self.damaged.add(entry)
        if len(self.damaged) > self.max_skipped:
            if not self.max_skipped:
                raise error
            raise DataError(
                f"{len(self.damaged)} samples cannot be read",
                f"data.max_skipped is {self.max_skipped}; the last: {error.what}, {error.why}",
                "check the shards, or give a greater data.max_skipped",
            ) from error
        self.note(f"skipped ({len(self.damaged)} so far): {error.what}, {error.why}")

    def saved(self, position: Position) -> dict[str, Any]:
        """Returns a place as JSON values."""
        return {
            **dataclasses.asdict(position),
            "seed": self.seed,
            "mix": self.mix,
            "data": self.source.fingerprint,
        }

    def restored(self, saved: dict[str, Any]) -> Position:
        """Returns the place that `saved` gave; the beginning if the seed is another one. Raises
        UsageError if the place would mean other samples now."""
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


# -- reading ahead ---------------------------------------------------------------------------------


def rows_here(size: int, mesh: Mesh | None) -> list[int]:
    """Returns which of a batch's `size` samples the devices of this process hold, rising: all of
    them where it is alone."""
    if mesh is None:
        return list(range(size))
    here = _over(mesh, (size,)).addressable_devices_indices_map((size,)).values()
    return sorted({row for (part,) in here for row in range(size)[part]})


def on_device(batch: Batch, mesh: Mesh | None = None, size: int | None = None) -> Batch:
    """Returns a batch on the device, over the mesh's data axes where there is one.

    size: samples of the whole batch, of which each process gives those of `rows_here`; None where
          they are all here.
    """
    if mesh is None:
        return jax.device_put(batch)
    count = len(batch.latents) if size is None else size
    place = {row: i for i, row in enumerate(rows_here(count, mesh))}

    def over_devices(rows):
        def part(index):
            wanted = [place[row] for row in range(count)[index[0]]]
            return rows[wanted[0] : wanted[-1] + 1]

        shape = (count, *rows.shape[1:])
        return jax.make_array_from_callback(shape, _over(mesh, shape), part)

    return jax.tree.map(over_devices, batch)


def _over(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """How an array of samples lies: divided by samples."""
    return NamedSharding(mesh, spec(shape, ("batch",), dict(mesh.shape)))


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
        self.stream = stream
        self.position = position
        self.place = place
        self.ready: queue.Queue = queue.Queue(maxsize=depth)
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._run, name="tdjax data", daemon=True)

    def _run(self) -> None:
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
        """Returns the next batch, on the device, and the place behind it. Raises what reading it
        raised."""
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
