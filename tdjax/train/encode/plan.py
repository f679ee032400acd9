"""Which clips are cut from which videos, and in which shard each goes: the same for the same files
and settings, on every machine. Imports no jax."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tdjax.config import VideoSize
from tdjax.errors import UsageError
from tdjax.media.clips import VideoFacts, probe
from tdjax.media.image import read_image
from tdjax.train.encode.items import Item
from tdjax.train.shards import DataError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How clips are cut.

    sizes:   (width, height) that clips may have; a video goes to the one most like it.
    frames:  lengths that clips may have, rising; a clip has the greatest for which its video lasts.
    fps:     frames a second, to which videos are resampled.
    stride:  frames from the beginning of a clip to that of the next; None: clips do not overlap.
    most:    clips of one video; 0 for all.
    upscale: also take videos that are smaller than their clips would be.
    samples: in a shard, at most.
    """

    sizes: tuple[tuple[int, int], ...]
    frames: tuple[int, ...]
    fps: float = 16
    stride: int | None = None
    most: int = 0
    upscale: bool = False
    samples: int = 256

    def __post_init__(self):
        for width, height in self.sizes:
            for frames in self.frames:
                VideoSize(frames=frames, width=width, height=height)  # says what is wrong
        least = {"stride": self.stride, "shard_size": self.samples}
        for name, value in least.items():
            if value is not None and value < 1:
                raise UsageError(f"`{name}` is {value}", "at least 1 is needed", "leave it away")
        if self.most < 0:
            raise UsageError(f"`max_clips` is {self.most}", "0 is all of them", "leave it away")
        if not 1 <= self.fps <= 240:
            raise UsageError(f"`fps` is {self.fps:g}", "allowed: 1 to 240", "Wan was trained at 16")


@dataclasses.dataclass(frozen=True)
class Clip:
    """A piece of a video. start: its first frame, counted at the frame rate of the clips. bytes: of
    the video's file."""

    item: Item
    start: int
    size: VideoSize
    bytes: int

    def facts(self) -> list[Any]:
        """Returns what tells this clip from any other, as JSON values."""
        return [self.item.name, self.bytes, self.start, self.item.text]


@dataclasses.dataclass(frozen=True)
class Shard:
    """Clips of one size that go into one file. first: number of the first of them."""

    size: VideoSize
    number: int
    first: int
    clips: tuple[Clip, ...]

    @property
    def name(self) -> str:
        """Its path below the folder of all shards: those of one size are in a folder."""
        size = self.size
        return f"{size.width}x{size.height}-{size.frames}/shard_{self.number:06}.tar"

    def identity(self) -> str:
        """Returns a hash of what its clips are."""
        facts = json.dumps([clip.facts() for clip in self.clips])
        return hashlib.sha256(facts.encode()).hexdigest()


class Skipped:
    """Videos and clips that are not in the shards, each with its reason.

    limit: files that may be damaged before all of it ends.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.left_out: dict[str, list[str]] = {}  # by the settings: {why: names}
        self.broken: list[tuple[str, str]] = []

    def leave_out(self, name: str, why: str) -> None:
        """Counts what the settings do not take."""
        self.left_out.setdefault(why, []).append(name)

    def add(self, name: str, why: str) -> None:
        """Counts what is damaged. Raises DataError from the limit on."""
        self.broken.append((name, why))
        if len(self.broken) > self.limit:
            shown = "; ".join(f"{name}: {why}" for name, why in self.broken[-3:])
            raise DataError(
                f"{len(self.broken)} videos or captions cannot be read",
                f"max_skipped is {self.limit}; the last ones: {shown}",
                "check the files, or give a greater max_skipped",
            )

    def lines(self) -> list[str]:
        """Returns what was skipped and why, for people."""
        out = [f"left out: {len(names)}, {why}" for why, names in self.left_out.items()]
        if self.broken:
            out.append(f"damaged: {len(self.broken)}, the first {': '.join(self.broken[0])}")
        return out


def make_plan(items: list[Item], settings: Settings, skipped: Skipped, threads: int) -> list[Shard]:
    """Returns all shards in their order. Files are opened, by threads, and what cannot be taken
    goes to `skipped`. Raises DataError beyond its limit, and UsageError where nothing is left."""
    clips: dict[VideoSize, list[Clip]] = {}
    for item, facts in _probed(items, skipped, threads):
        for clip in _cut(item, facts, settings, skipped):
            clips.setdefault(clip.size, []).append(clip)
    if not clips:
        raise UsageError(
            f"none of {len(items)} videos gives a clip",
            "; ".join(skipped.lines()),
            "give other sizes, fewer frames, or captions",
        )
    order = sorted(clips, key=lambda size: (size.width, size.height, size.frames))
    return [shard for size in order for shard in _shards(size, clips[size], settings.samples)]


def _shards(size: VideoSize, clips: list[Clip], samples: int) -> Iterator[Shard]:
    for first in range(0, len(clips), samples):
        yield Shard(size, first // samples, first, tuple(clips[first : first + samples]))


def _probed(items: list[Item], skipped: Skipped, threads: int) -> Iterator[tuple[Item, VideoFacts]]:
    """Items with captions that can be opened, in order."""
    with_text = []
    for item in items:
        if item.text is not None:
            with_text.append(item)
        elif item.trouble:
            skipped.add(item.name, item.trouble)
        else:
            skipped.leave_out(item.name, "no caption")
    with ThreadPoolExecutor(threads, thread_name_prefix="probe") as pool:
        for item, facts in zip(with_text, pool.map(_facts, with_text), strict=True):
            if isinstance(facts, str):
                skipped.add(item.name, facts)
            else:
                yield item, facts


def _facts(item: Item) -> VideoFacts | str:
    """The facts of an item's file, or what is wrong with it."""
    try:
        if not item.path.is_file():
            return "it does not exist"
        if item.is_image:
            height, width = read_image(item.path).shape[:2]
            return VideoFacts(width, height, 0.0, item.path.stat().st_size)
        return probe(item.path)
    except UsageError as error:
        return error.why


def _cut(item: Item, facts: VideoFacts, settings: Settings, skipped: Skipped) -> Iterable[Clip]:
    """The clips of one file. An image is a clip of one frame."""
    ratio = lambda size: abs(math.log(size[0] / size[1] * facts.height / facts.width))
    width, height = min(settings.sizes, key=ratio)
    if not settings.upscale and (facts.width < width or facts.height < height):
        skipped.leave_out(item.name, f"smaller than {width}x{height}")
        return
    if item.is_image:
        yield Clip(item, 0, VideoSize(frames=1, width=width, height=height), facts.bytes)
        return
    there = math.ceil(facts.seconds * settings.fps - 1e-3)  # frames are shown until the end
    fitting = [frames for frames in settings.frames if frames <= there]
    if not fitting:
        seconds = settings.frames[0] / settings.fps
        skipped.leave_out(item.name, f"shorter than {settings.frames[0]} frames, {seconds:.2f} s")
        return
    size = VideoSize(frames=fitting[-1], width=width, height=height)
    starts = range(0, there - size.frames + 1, settings.stride or size.frames)
    for start in starts[: settings.most or None]:
        yield Clip(item, start, size, facts.bytes)
