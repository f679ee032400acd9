"""Clips of video files: what a file says of itself, and its frames at given times. Knows files and
arrays, nothing of models."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import av
import numpy as np

from tdjax.errors import UsageError
from tdjax.media.video import to_rgb

SLACK = 1e-3  # seconds by which a file may have rounded the time of a frame


@dataclasses.dataclass(frozen=True)
class VideoFacts:
    """What a video file says of itself: its size as it is shown, in pixels, its length, and the
    file's size."""

    width: int
    height: int
    seconds: float
    bytes: int


def probe(path: Path) -> VideoFacts:
    """Returns the facts of a video file; its first frame is decoded. Raises UsageError for a file
    that is no video, or is damaged."""
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            frame = next(container.decode(stream))
            seconds = _seconds(container, stream)
            size = (frame.width, frame.height)
            width, height = size[::-1] if _quarters(frame) % 2 else size
    except (av.error.FFmpegError, OSError, IndexError, StopIteration, ValueError) as error:
        raise _unreadable(path, error) from error
    return VideoFacts(width, height, seconds, path.stat().st_size)


def frames_at(path: Path, times: Sequence[float]) -> Iterator[np.ndarray]:
    """Yields the frames that are shown at some times, uint8 [H W 3], turned as the file says; the
    same array again where one frame is shown at several of them.

    times: seconds after the first frame, rising; what is before them is not decoded, but for what
           the first of them needs.
    Raises UsageError where the video ends before the last of them, or is damaged.
    """
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            convert, last = to_rgb(stream), None
            for frame in _shown(container, stream, times):
                if frame is not last:
                    array, last = np.rot90(convert(frame).to_ndarray(), _quarters(frame)), frame
                yield array
    except UsageError:
        raise
    except (av.error.FFmpegError, OSError, IndexError, ValueError) as error:
        raise _unreadable(path, error) from error


def _shown(container, stream, times: Sequence[float]) -> Iterator[av.VideoFrame]:
    """The decoded frame that is on the screen at each of the times."""
    begin, base = stream.start_time or 0, stream.time_base
    if times[0] > 0:
        container.seek(begin + int(times[0] / base), stream=stream)
    shown: av.VideoFrame | None = None
    done, end = 0, 0.0
    for frame in container.decode(stream):
        if frame.pts is None:
            raise ValueError("a frame has no time")
        now = float((frame.pts - begin) * base)
        while shown is not None and done < len(times) and times[done] < now - SLACK:
            yield shown
            done += 1
        if done == len(times):
            return
        shown, end = frame, now + _duration(frame, stream)
    while shown is not None and done < len(times) and times[done] < end - SLACK:
        yield shown
        done += 1
    if done < len(times):
        raise ValueError(f"it ends after {end:.2f} s; its header says more")


def _duration(frame: av.VideoFrame, stream) -> float:
    """Seconds for which a frame is shown, by the rate of the stream."""
    if stream.average_rate:
        return float(1 / stream.average_rate)
    return float((frame.duration or 0) * stream.time_base)


def _seconds(container, stream) -> float:
    """The length of a stream, or of its file where the stream does not say it."""
    if stream.duration is not None:
        return float(stream.duration * stream.time_base)
    if container.duration is None:
        raise ValueError("it does not say how long it is")
    return container.duration / av.time_base


def _quarters(frame: av.VideoFrame) -> int:
    """By how many quarters of a turn, counter-clockwise, a frame is turned to be shown: phones hold
    pictures as the sensor lies."""
    return round(frame.rotation / 90) % 4


def _unreadable(path: Path, error: Exception) -> UsageError:
    return UsageError(
        f"{path} cannot be read as a video",
        str(error) or "it holds no frames",
        "check the file with another player",
    )
