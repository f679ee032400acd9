"""Which size a video gets, and how an image is brought to that size. Arithmetic and Pillow only:
usable before jax is imported."""

from __future__ import annotations

import math
import re

import numpy as np
from PIL import Image

from tdjax.config import VIDEO_SIZES, VideoSize
from tdjax.config.values import settled, shown
from tdjax.errors import UsageError
from tdjax.files import near

FITS = ("crop", "pad", "stretch", "adaptive")
TRAINED = ("480p", "720p")
MULTIPLE = 16  # 8 of the VAE, 2 of the patches
DEFAULT_ASPECT = "16:9"


def adaptive_size(image_size: tuple[int, int], area: int) -> tuple[int, int]:
    """(width, height) in multiples of 16 with the image's proportions and about the given area; a
    flat image can round to 0.

    Rounds half to even, as thu-ml/TurboDiffusion turbodiffusion/inference/wan2.2_i2v_infer.py does.
    """
    width, height = image_size
    aspect = height / width
    return (
        round(math.sqrt(area / aspect) / MULTIPLE) * MULTIPLE,
        round(math.sqrt(area * aspect) / MULTIPLE) * MULTIPLE,
    )


def nearest_aspect(resolution: str, ratio: float) -> str:
    """The aspect ratio of a resolution's table whose size is proportioned most like width / height
    = ratio."""
    table = VIDEO_SIZES[resolution]
    return min(table, key=lambda name: abs(math.log(table[name][0] / table[name][1] / ratio)))


def choose_size(
    *,
    resolution: str | None = None,
    aspect_ratio: str | None = None,
    width: int | None = None,
    height: int | None = None,
    num_frames: int = 81,
    image_size: tuple[int, int] | None = None,
    fit: str = "crop",
) -> VideoSize:
    """The size of a clip from what the user gave. image_size is (width, height) of the conditioning
    image, if there is one.

    width and height decide if given; else the table of `resolution` (default 480p) by
    `aspect_ratio`. Without an aspect ratio an image gets the nearest of the table, and text gets
    16:9. With fit="adaptive" that size only gives the area, and the image its proportions; the area
    is then the one of 16:9, whatever the image, as in the published script.
    """
    _check_fit(fit, image_size)
    width, height = settled("width", width, "int | None"), settled("height", height, "int | None")
    resolution = settled("resolution", resolution, "str | None")
    aspect_ratio = settled("aspect_ratio", aspect_ratio, "str | None")
    if (width is None) != (height is None):
        given, missing = ("width", "height") if height is None else ("height", "width")
        raise UsageError(
            f"{given} is {width or height}, but {missing} is not given",
            "width and height are given together or not at all",
            f"add {missing}, or use a resolution ({', '.join(TRAINED)}) and an aspect ratio",
        )
    if width is not None and aspect_ratio is not None:
        raise UsageError(
            f"aspect_ratio {aspect_ratio} stands beside width {width} and height {height}",
            "width and height already fix the proportions",
            "leave aspect_ratio away, or give a resolution in place of width and height",
        )
    base = (
        (width, height)
        if width is not None
        else _table_size(resolution or TRAINED[0], aspect_ratio, image_size, fit)
    )
    if fit == "adaptive":
        base = _checked_adaptive(image_size, base)
    return VideoSize(frames=num_frames, width=base[0], height=base[1])


def _check_fit(fit: str, image_size: tuple[int, int] | None) -> None:
    if not isinstance(fit, str) or fit not in FITS:
        raise UsageError(
            f"fit is {shown(fit)}",
            f"allowed: {', '.join(FITS)}",
            f"nearest: {near(fit, FITS, cutoff=0)[0]}",
        )
    if fit == "adaptive" and image_size is None:
        raise UsageError(
            "fit is adaptive, but there is no image",
            "an adaptive size takes its proportions from the image",
            "use an aspect ratio",
        )


def _table_size(
    resolution: str, aspect_ratio: str | None, image_size: tuple[int, int] | None, fit: str
) -> tuple[int, int]:
    """(width, height) of the table."""
    if resolution not in VIDEO_SIZES:
        raise UsageError(
            f"resolution is {shown(resolution)}",
            f"allowed: {', '.join(VIDEO_SIZES)}",
            f"nearest: {_nearest_resolution(resolution)}",
        )
    table = VIDEO_SIZES[resolution]
    if aspect_ratio is None:
        aspect_ratio = (
            DEFAULT_ASPECT
            if image_size is None or fit == "adaptive"
            else nearest_aspect(resolution, image_size[0] / image_size[1])
        )
    if aspect_ratio not in table:
        ratio = _parse_ratio(aspect_ratio)
        by_name = near(aspect_ratio, table, cutoff=0)[0]
        nearest = nearest_aspect(resolution, ratio) if ratio else by_name
        raise UsageError(
            f"aspect_ratio is {shown(aspect_ratio)}",
            f"allowed at {resolution}: {', '.join(table)} (width:height)",
            f"nearest: {nearest}",
        )
    return table[aspect_ratio]


def _checked_adaptive(image_size: tuple[int, int], base: tuple[int, int]) -> tuple[int, int]:
    size = adaptive_size(image_size, math.prod(base))
    if min(size) < MULTIPLE:
        raise UsageError(
            f"the image is {image_size[0]}x{image_size[1]}: an adaptive size of {base[0]}x{base[1]}"
            f" in area would be {size[0]}x{size[1]}",
            f"each side must be at least {MULTIPLE} pixels",
            "crop the image to less extreme proportions, or use fit crop or pad",
        )
    return size


def _nearest_resolution(text: str) -> str:
    """By number of lines where the text holds a number ("1080p" -> "720p"), else by spelling."""
    digits = re.search(r"[0-9]{1,9}", text)
    if not digits:
        return near(text, VIDEO_SIZES, cutoff=0)[0]
    return min(TRAINED, key=lambda name: abs(int(name[:-1]) - int(digits[0])))


def _parse_ratio(text: str) -> float | None:
    """ "16:9", "16x9", "16/9", "1.78" -> width / height, or None."""
    number = r"([0-9]{1,9}(?:\.[0-9]{1,9})?)"
    match = re.fullmatch(rf"\s*{number}(?:\s*[:x/]\s*{number})?\s*", text)
    if not match:
        return None
    top, bottom = float(match[1]), float(match[2] or 1)
    return top / bottom if top and bottom else None


def size_notes(size: VideoSize, resolution: str | None = None) -> list[str]:
    """Lines worth telling a user about a legal size: an older row of the table, or a size the
    models were not trained at."""
    notes = []
    if resolution in VIDEO_SIZES and resolution not in TRAINED:
        notes.append(
            f'resolution "{resolution}" is {size.width}x{size.height}; "480p" and "720p" are the'
            " trained sizes, and other ones"
        )
    trained = [pair for name in TRAINED for pair in VIDEO_SIZES[name].values()]
    if (size.width, size.height) not in trained:
        away = lambda pair: math.hypot(
            math.log(pair[0] / size.width), math.log(pair[1] / size.height)
        )
        width, height = min(trained, key=away)
        notes.append(
            f"{size.width}x{size.height} is not a size the published models were trained at"
            f" (nearest {width}x{height}): quality can differ, and it compiles once more"
        )
    return notes


def fit_image(
    image: np.ndarray, size: VideoSize, fit: str = "crop"
) -> np.ndarray:  # uint8 [H W 3] -> uint8 [height width 3]
    """An image brought to the size of a clip, by Pillow's antialiased bilinear filter (the
    published script's filter too).

    crop:     scaled until it covers the frame, the middle is kept.
    pad:      scaled until it fits inside, black beside it.
    stretch:  each side by itself; adaptive too, since the size then has the image's proportions
              already.
    """
    _check_fit(fit, image.shape[1::-1])
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
        raise ValueError(f"fit_image takes uint8 [H W 3], got {image.dtype} {image.shape}")
    source, target = Image.fromarray(image), (size.width, size.height)
    scales = [t / s for t, s in zip(target, source.size, strict=True)]
    if fit == "crop":
        kept = [t / max(scales) for t in target]
        left, top = ((s - k) / 2 for s, k in zip(source.size, kept, strict=True))
        return np.asarray(
            source.resize(
                target, Image.Resampling.BILINEAR, box=(left, top, left + kept[0], top + kept[1])
            )
        )
    if fit == "pad":
        inside = tuple(max(1, round(s * min(scales))) for s in source.size)
        canvas = Image.new("RGB", target)
        canvas.paste(
            source.resize(inside, Image.Resampling.BILINEAR),
            tuple((t - i) // 2 for t, i in zip(target, inside, strict=True)),
        )
        return np.asarray(canvas)
    return np.asarray(source.resize(target, Image.Resampling.BILINEAR))
