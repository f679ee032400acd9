"""Clips to shards: decoded by threads while the device encodes, one complete file after another."""

from __future__ import annotations

import collections
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from tdjax.errors import UsageError
from tdjax.files import claimed, write_text, written
from tdjax.media.clips import frames_at
from tdjax.media.image import read_image
from tdjax.media.resolution import fit_image
from tdjax.progress import Stages
from tdjax.train import made
from tdjax.train.encode.encoders import Encoders
from tdjax.train.encode.plan import Clip, Shard, Skipped

FORMAT = 1
COLUMNS, MOST, SIDE = 8, 64, 160  # of the contact sheet: columns, pictures, pixels of the long side
T = TypeVar("T")
R = TypeVar("R")


class Writing:
    """The shards of one process, written where they are not there.

    settings: what all of them were made with, as JSON values: shards of other settings are refused.
    image:    whether samples get the latents of their first frame.
    """

    def __init__(
        self,
        folder: Path,
        encoders: Encoders,
        settings: dict[str, Any],
        skipped: Skipped,
        stages: Stages,
        *,
        fps: float,
        image: bool,
        threads: int,
    ):
        self.folder = folder
        self.encoders = encoders
        self.settings = settings
        self.skipped = skipped
        self.stages = stages
        self.fps = fps
        self.image = image
        self.threads = threads
        self.planned = len(skipped.broken)  # those that were found damaged before
        self.seconds: list[float] = []  # of each clip that was encoded
        self.pictures: list[np.ndarray] = []

    def run(self, shards: list[Shard]) -> Iterator[Path]:
        """Yields the shards that are complete, those that were there too. Raises UsageError for one
        that is there and was made otherwise, before any is written."""
        there = [s for s in shards if made.finished(self.folder / s.name, self._about(s))]
        for shard in there:
            yield self.folder / shard.name
        if there:
            self.stages.note(f"{len(there)} of {len(shards)} shards are there already")
        for shard in shards:
            if shard in there:
                continue
            path = self.folder / shard.name
            with claimed([path]) as mine:
                if not mine:
                    self.stages.note(f"{path} is being made by another process: left to it")
                    continue
                with self.stages(shard.name):
                    self._write(shard, path)
            if path.exists():
                yield path

    def _about(self, shard: Shard) -> dict[str, Any]:
        return {"format": FORMAT, **self.settings, "clips": shard.identity()}

    def _write(self, shard: Shard, path: Path) -> None:
        begun = time.monotonic()
        done: list[str] = []
        before = len(self.skipped.broken)
        about = lambda: {
            **self._about(shard),
            "samples": len(done),
            "seconds": round(time.monotonic() - begun, 2),
            "from": done,
            "damaged": [list(each) for each in self.skipped.broken[before:]],
        }
        made.write(path, self._samples(shard, done), shard.first, about)

    def _samples(self, shard: Shard, done: list[str]) -> Iterator[tuple]:
        """(latents, text, caption) of the clips of a shard; and the latents of the first frame,
        where they are wanted."""
        captions = list(dict.fromkeys(str(clip.item.text) for clip in shard.clips))
        embeds = dict(zip(captions, self.encoders.embed(captions), strict=True))
        read = lambda clip: _frames_of(clip, self.fps)
        begun = time.monotonic()
        for clip, frames in zip(shard.clips, ahead(read, shard.clips, self.threads), strict=True):
            if isinstance(frames, str):
                self.skipped.add(_named(clip), frames)
                continue
            latents = [self.encoders.latents(frames, clip.size)]
            if self.image:
                latents.append(self.encoders.image_latents(frames[0], clip.size))
            if not all(np.isfinite(each).all() for each in latents):
                self.skipped.add(_named(clip), "its latents are not finite")
                continue
            self.seconds.append(time.monotonic() - begun)
            if len(self.pictures) < MOST:
                self.pictures.append(frames[0])
            done.append(_named(clip))
            yield latents[0], embeds[clip.item.text], clip.item.text, *latents[1:]
            begun = time.monotonic()

    @property
    def seconds_per_clip(self) -> float:
        """The median of this run: the first clip waits for its program."""
        return statistics.median(self.seconds) if self.seconds else 0.0

    def report(self, name: str, shards: list[Shard]) -> list[Path]:
        """Writes what is in these shards, earlier runs included: numbers, what was skipped and why;
        and a sheet of first frames of this run. Returns the files."""
        file, sheet = self.folder / f"{name}.json", self.folder / f"{name}.png"
        found = [about for shard in shards if (about := made.sidecar(self.folder / shard.name))]
        planned = [list(each) for each in self.skipped.broken[: self.planned]]
        numbers = {
            "clips": sum(about["samples"] for about in found),
            "shards": len(found),
            "seconds": round(sum(about["seconds"] for about in found), 2),
            "seconds_per_clip": round(self.seconds_per_clip, 4),
            "left_out": self.skipped.left_out,
            "damaged": planned + [each for about in found for each in about["damaged"]],
        }
        write_text(file, json.dumps({**numbers, **self.settings}, indent=1) + "\n")
        if not self.pictures:
            return [file]
        with written(sheet, overwrite=True) as part:
            contact_sheet(self.pictures).save(part)
        return [file, sheet]


def _named(clip: Clip) -> str:
    """A clip for people: its video, and the frame that it begins with."""
    return f"{clip.item.name}@{clip.start}" if clip.start else clip.item.name


def _frames_of(clip: Clip, fps: float) -> np.ndarray | str:
    """The frames of a clip, uint8 [T H W 3], at its size; or what is wrong with its video."""
    try:
        if clip.item.is_image:
            return fit_image(read_image(clip.item.path), clip.size)[None]
        times = [(clip.start + i) / fps for i in range(clip.size.frames)]
        return np.stack([fit_image(f, clip.size) for f in frames_at(clip.item.path, times)])
    except UsageError as error:
        return error.why


def ahead(function: Callable[[T], R], items: Iterable[T], threads: int) -> Iterator[R]:
    """Yields function(item) in order, made by so many threads, one result ahead for each."""
    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        waiting: collections.deque[Future[R]] = collections.deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def contact_sheet(pictures: list[np.ndarray]) -> Image.Image:
    """Returns small pictures in rows, of uint8 [H W 3] in any sizes."""
    small = [Image.fromarray(picture) for picture in pictures]
    for picture in small:
        picture.thumbnail((SIDE, SIDE))
    rows = -(-len(small) // COLUMNS)
    sheet = Image.new("RGB", (min(len(small), COLUMNS) * SIDE, rows * SIDE), "white")
    for i, picture in enumerate(small):
        sheet.paste(picture, (i % COLUMNS * SIDE, i // COLUMNS * SIDE))
    return sheet
