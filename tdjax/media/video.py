"""Video files: frames in, one complete file out; and back again. Knows arrays and files, nothing of
models."""

from __future__ import annotations

import dataclasses
import os
import queue
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace
from einops import rearrange
from PIL import Image, PngImagePlugin

from tdjax.errors import UsageError
from tdjax.files import refuse_existing, written
from tdjax.media.image import read_image

BT709 = 1  # the code of this colour matrix, of its primaries and of its transfer curve in ffmpeg
FRAME_NAME = re.compile(r"\d{5}\.png")
CRF = 17
GIF_FPS = 50  # players show frames of less than two hundredths of a second for ten
NICENESS = 10  # of a thread that writes beside one that makes frames
FOLDER = ""  # a path without a suffix is a folder of numbered PNG files


@dataclasses.dataclass(frozen=True)
class Codec:
    """How a suffix is encoded. crf_max is None where the codec is lossless."""

    encoder: str
    pixels: str
    crf_max: int | None = None
    options: tuple[tuple[str, str], ...] = ()
    container: tuple[tuple[str, str], ...] = ()


CODECS = {
    ".mp4": Codec(
        "libx264",
        "yuv420p",
        51,
        # A frame for each thread, as x264 does by itself: av asks for slices, of which a frame of
        # 480 rows has few, and which cost bytes.
        options=(("x264-params", "sliced-threads=0"),),
        container=(("movflags", "faststart"),),
    ),
    ".webm": Codec(
        "libvpx-vp9",
        "yuv420p",
        63,
        options=(("b", "0"), ("deadline", "good"), ("cpu-used", "4"), ("row-mt", "1")),
    ),
    ".mkv": Codec("ffv1", "bgr0", options=(("level", "3"), ("slicecrc", "1"))),
}
SUFFIXES = (*CODECS, ".gif", ".png", ".npy", FOLDER)


def write(
    path: str | Path,
    frames: np.ndarray | Iterable[np.ndarray],  # uint8 [T H W 3], or chunks of it in order
    *,
    fps: float = 16,
    crf: int = CRF,
    metadata: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a video; the suffix chooses the form. The name appears only when the file is complete.

    .mp4 (h264), .webm (vp9), .mkv (ffv1, lossless), .gif (loops), .png (one frame), .npy, no
    suffix: folder of PNG files. frames may be an iterator of chunks: each is encoded while the
            caller's device makes the next one.
    crf is the quality of h264 and vp9 (lower is better); metadata is text for the file's comment
    (.npy has none). Odd sides gain one repeated row or column in .mp4 and .webm, whose colours are
    stored for 2x2 pixels.
    """
    path = Path(path)
    check_target(path, fps, crf, overwrite)
    images = _each_frame([frames] if isinstance(frames, np.ndarray) else frames)
    with written(path, overwrite, owned=is_frames) as part:
        if path.suffix in CODECS:
            encode(part, images, CODECS[path.suffix], fps, crf, metadata)
        elif path.suffix == ".gif":
            _write_gif(part, images, fps, metadata)
        elif path.suffix == ".npy":
            np.save(part, np.stack(list(images)))
        elif path.suffix == ".png":
            _save_single(part, images, metadata)
        else:
            part.mkdir()
            for i, image in enumerate(images):
                _save_png(part / f"{i:05d}.png", image, metadata if i == 0 else None)
    return path


def enlarged(frames: np.ndarray, factor: int) -> np.ndarray:
    """Returns uint8 [... H W 3] with every pixel as a square of factor x factor."""
    if factor == 1:
        return frames
    return frames.repeat(factor, axis=-3).repeat(factor, axis=-2)


class Writer:
    """`write` in a thread of its own: `put` each chunk as it is made, then `close`; or `cancel`,
    which leaves nothing.

    On Linux it gives way, with the threads of its encoder, to who makes the frames: a device should
    not wait for its next program because a file is compressed.

    Errors of the thread, of whatever kind, are raised by the next call.
    """

    def __init__(self, path: str | Path, **options):
        self.chunks: queue.SimpleQueue = queue.SimpleQueue()
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self.run, args=(Path(path), options), daemon=True)
        self.thread.start()

    def run(self, path: Path, options: dict) -> None:
        try:
            if sys.platform == "linux":  # where threads have priorities of their own
                own = os.PRIO_PROCESS, threading.get_native_id()
                os.setpriority(*own, max(NICENESS, os.getpriority(*own)))
            write(path, self.arriving(), **options)
        except BaseException as error:
            self.error = error

    def arriving(self) -> Iterator[np.ndarray]:
        while (chunk := self.chunks.get()) is not None:
            if isinstance(chunk, BaseException):
                raise chunk
            yield chunk

    def put(self, frames: np.ndarray) -> None:  # uint8 [t H W 3], not to be changed afterwards
        if self.error is not None:
            raise self.error
        self.chunks.put(frames)

    def close(self) -> None:
        """Wait until the file is complete."""
        self.chunks.put(None)
        self.thread.join()
        if self.error is not None:
            raise self.error

    def cancel(self) -> None:
        self.chunks.put(InterruptedError("cancelled"))
        self.thread.join()


def check_target(path: Path, fps: float, crf: int, overwrite: bool) -> None:
    """Everything that can be refused before any frame exists; long runs call it first."""
    check_settings(path, fps, crf)
    refuse_existing(path, overwrite, owned=is_frames)


def check_settings(path: Path, fps: float, crf: int) -> None:
    """Raises UsageError unless files of this suffix can be written, and with these settings."""
    if path.suffix not in SUFFIXES:
        allowed = ", ".join(s for s in SUFFIXES if s)
        raise UsageError(
            f"{path.name} has the suffix {path.suffix!r}",
            f"allowed: {allowed}, or none for a folder of PNG files",
            "use .mp4",
        )
    if not 0 < fps <= 1000:
        raise UsageError(
            f"fps is {fps}", "it must be positive and at most 1000", "the models were trained at 16"
        )
    codec = CODECS.get(path.suffix)
    if codec is None:
        return
    if codec.crf_max is not None and not 0 <= crf <= codec.crf_max:
        raise UsageError(
            f"crf is {crf}",
            f"{path.suffix} takes 0 (best) to {codec.crf_max}",
            "17 is visually lossless, 23 is smaller",
        )
    try:
        av.codec.Codec(codec.encoder, "w")
    except ValueError as error:  # av's UnknownCodecError is one
        raise UsageError(
            f"cannot write {path.suffix}: the encoder {codec.encoder} is missing",
            "the ffmpeg libraries of the installed `av` package were built without it",
            "reinstall av from PyPI, or write .gif, .npy or a folder of PNG files",
        ) from error


def target_notes(path: Path, fps: float, crf: int = CRF) -> list[str]:
    """Returns lines about settings that a file cannot have, or that players do not take."""
    codec = CODECS.get(path.suffix)
    lines = []
    if path.suffix == ".gif" and fps > GIF_FPS:
        lines.append(
            f"a .gif shows {GIF_FPS} frames a second at most: some of {fps:g} are left out, and the"
            " speed stays"
        )
    if crf != CRF and (codec is None or codec.crf_max is None):
        kind = path.suffix or "PNG"
        lines.append(f"`crf` has no effect: {kind} has no such quality")
    if path.suffix == ".mp4" and crf == 0:
        lines.append(
            "`crf` 0 is lossless h264, which browsers and phones do not play; 1 is the best that"
            " they do"
        )
    return lines


def is_frames(folder: Path) -> bool:
    """Whether a folder is one of frames as `write` makes it: numbered PNG files, nothing else."""
    names = [p.name for p in folder.iterdir()]
    return not folder.suffix and all(FRAME_NAME.fullmatch(name) for name in names)


def _each_frame(chunks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Chunks [t H W 3] -> frames [H W 3], all checked to be uint8 of one size; at least one."""
    size, count = None, 0
    for chunk in chunks:
        chunk = np.asarray(chunk)
        if chunk.dtype != np.uint8 or chunk.ndim != 4 or chunk.shape[-1] != 3:
            raise ValueError(f"frames must be uint8 [T H W 3], got {chunk.dtype} {chunk.shape}")
        size = size or chunk.shape[1:]
        if chunk.shape[1:] != size:
            raise ValueError(f"a chunk has frames of {chunk.shape[1:]}, earlier ones {size}")
        count += len(chunk)
        yield from chunk
    if count == 0:
        raise ValueError("there are no frames to write")


def _even(image: np.ndarray) -> np.ndarray:  # [H W 3] -> both sides even
    return np.pad(image, [(0, n % 2) for n in image.shape[:2]] + [(0, 0)], mode="edge")


def encode(
    part: Path,
    images: Iterator[np.ndarray],
    codec: Codec,
    fps: float,
    crf: int,
    metadata: str | None,
) -> None:
    rate = Fraction(fps).limit_denominator(1001)
    with av.open(str(part), "w", options=dict(codec.container)) as container:
        if metadata is not None:
            container.metadata["comment"] = metadata
        stream = None
        for i, image in enumerate(images):
            image = _even(image) if codec.pixels == "yuv420p" else np.ascontiguousarray(image)
            stream = stream or _open_stream(container, image.shape, codec, rate, crf)
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            if codec.pixels == "yuv420p":
                frame = frame.reformat(
                    format=codec.pixels,
                    dst_colorspace=Colorspace.ITU709,
                    dst_color_range=ColorRange.MPEG,
                )
            frame.pts, frame.time_base = i, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _open_stream(container, shape: tuple[int, ...], codec: Codec, rate: Fraction, crf: int):
    stream = container.add_stream(codec.encoder, rate=rate, options=dict(codec.options))
    stream.height, stream.width = shape[:2]
    stream.pix_fmt = codec.pixels
    if codec.crf_max is not None:
        stream.codec_context.options = {**dict(codec.options), "crf": str(crf)}
    if codec.pixels == "yuv420p":  # said in the file, or players guess the matrix from the size
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = BT709
        context.color_range = ColorRange.MPEG
    return stream


def _write_gif(part: Path, images: Iterator[np.ndarray], fps: float, metadata: str | None) -> None:
    """One palette for all frames and an ordered dither, which stands still where the picture does.
    Loops for ever."""
    clip = np.stack(list(images))
    kept, durations = _gif_times(len(clip), fps)
    clip = clip[kept]
    sample = rearrange(clip[:: max(1, len(clip) // 8), ::2, ::2], "t h w c -> (t h) w c")
    palette = Image.fromarray(sample).quantize(256)
    step = 3.5 * np.std(
        sample - np.asarray(palette.convert("RGB"), np.float32)
    )  # sqrt(12): of uniform levels, their distance
    rows, columns = (-(-n // 8) for n in clip.shape[1:3])
    offset = (step * np.tile(_bayer(8), (rows, columns)))[: clip.shape[1], : clip.shape[2], None]
    dithered = (np.clip(np.round(image + offset), 0, 255).astype(np.uint8) for image in clip)
    pages = [
        Image.fromarray(image).quantize(palette=palette, dither=Image.Dither.NONE)
        for image in dithered
    ]
    comment = {} if metadata is None else {"comment": metadata.encode()}
    pages[0].save(
        part, save_all=True, append_images=pages[1:], duration=durations, loop=0, **comment
    )


def _gif_times(count: int, fps: float) -> tuple[list[int], list[int]]:
    """(frames that are shown, milliseconds of each): whole hundredths of a second, two or more,
    whose rounding does not add up."""
    least = 100 // GIF_FPS
    begins = [round(i * 100 / fps) for i in range(count + 1)]
    kept = [0]
    for i in range(1, count):
        if begins[i] - begins[kept[-1]] >= least:
            kept.append(i)
    ends = [begins[i] for i in kept[1:]] + [begins[-1]]
    pairs = zip(kept, ends, strict=True)
    return kept, [10 * max(least, end - begins[i]) for i, end in pairs]


def _bayer(size: int) -> np.ndarray:  # [size size] in -0.5..0.5; size is a power of two
    """Thresholds of ordered dithering, spread as evenly as possible (Bayer 1973)."""
    matrix = np.zeros((1, 1))
    while len(matrix) < size:
        matrix = np.block([[4 * matrix, 4 * matrix + 2], [4 * matrix + 3, 4 * matrix + 1]])
    return (matrix + 0.5) / size**2 - 0.5


def _save_png(path: Path, image: np.ndarray, metadata: str | None = None) -> None:
    info = PngImagePlugin.PngInfo()
    if metadata is not None:
        info.add_itxt("Comment", metadata)
    Image.fromarray(image).save(path, pnginfo=info, compress_level=4)


def _save_single(part: Path, images: Iterator[np.ndarray], metadata: str | None) -> None:
    image = next(images)
    if next(images, None) is not None:
        name = part.stem
        raise UsageError(
            f"{part.name} is one image, but there are several frames",
            "a .png file holds one",
            f"use {name} (a folder) or {name}.mp4",
        )
    _save_png(part, image, metadata)


def comment_of(path: Path) -> str | None:
    """Returns the comment that `write` put into a video file; None where there is none."""
    try:
        with av.open(str(path)) as container:
            # Matroska has its names in capitals.
            return container.metadata.get("comment") or container.metadata.get("COMMENT")
    except (av.error.FFmpegError, OSError, ValueError):
        return None


def read_video(path: str | Path) -> np.ndarray:  # uint8 [T H W 3]
    """All frames of anything `write` makes, and of most video files."""
    path = Path(path)
    if path.is_dir():
        files = sorted(path.glob("*.png"))
        if not files:
            raise UsageError(
                f"{path} has no PNG files", "a folder of frames was expected", "check the path"
            )
        return np.stack([read_image(file) for file in files])
    if not path.is_file():
        raise UsageError(
            f"video {path} does not exist",
            "a file or a folder of PNG files was expected",
            "check the path",
        )
    if path.suffix == ".npy":
        return np.load(path)
    if path.suffix == ".png":
        return read_image(path)[None]
    try:
        with av.open(str(path)) as container:
            return np.stack([frame.to_ndarray() for frame in _as_rgb(container)])
    except (av.error.FFmpegError, IndexError, ValueError) as error:
        raise UsageError(
            f"{path} cannot be read as a video", str(error), "check the file with another player"
        ) from error


def _as_rgb(container) -> Iterator[av.VideoFrame]:
    """All frames of a file in rgb24."""
    convert = to_rgb(container.streams.video[0])
    return map(convert, container.decode(video=0))


def to_rgb(stream) -> Callable[[av.VideoFrame], av.VideoFrame]:
    """Returns what makes rgb24 of the decoded frames of a stream, rounded properly: the library's
    default conversion is darker by about one step of 255."""
    graph: av.filter.Graph | None = None

    def convert(frame: av.VideoFrame) -> av.VideoFrame:
        nonlocal graph
        if graph is None:
            graph = av.filter.Graph()
            scale = graph.add("scale", "flags=bilinear+accurate_rnd+full_chroma_int")
            chain = [
                graph.add_buffer(template=stream),
                scale,
                graph.add("format", "rgb24"),
                graph.add("buffersink"),
            ]
            for a, b in zip(chain, chain[1:], strict=False):
                a.link_to(b)
            graph.configure()
        graph.push(frame)
        return graph.pull()

    return convert
