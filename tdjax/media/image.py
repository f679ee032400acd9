"""Images as arrays: from files, bytes, Pillow images and arrays, the same pixels by every way."""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from tdjax.config.values import path as checked_path
from tdjax.errors import UsageError

# Photographs of phones: the container's mark, then the brand.
_HEIF = (b"ftypheic", b"ftypheix", b"ftyphevc", b"ftypheim", b"ftypmif1", b"ftypmsf1")


def as_image(image) -> np.ndarray:
    """Returns uint8 [H W 3] of a path, the bytes of a file, a Pillow image, or an array: uint8
    [H W 3], [H W 4] with transparency, [H W] or [H W 1] in grey. Raises UsageError."""
    if isinstance(image, str | os.PathLike):
        return read_image(image)
    if isinstance(image, bytes | bytearray | memoryview):
        return _decoded(bytes(image), "image")
    if isinstance(image, Image.Image):
        return _read(lambda: _rgb(image), "the image")
    try:
        array = np.asarray(image)
    except (ValueError, RuntimeError):  # a list of unequal rows; an array that was deleted
        array = np.array(None)
    grey = array.ndim == 2 or (array.ndim == 3 and array.shape[-1] == 1)
    color = array.ndim == 3 and array.shape[-1] in (3, 4)
    if array.dtype != np.uint8 or array.size == 0 or not (grey or color):
        raise UsageError(
            f"the image is an array of {array.dtype} {array.shape}",
            "allowed: a path, bytes of a file, a PIL image, or uint8 [H W 3]",
            "convert it to 8-bit RGB",
        )
    return _rgb(Image.fromarray(array[..., 0] if grey and array.ndim == 3 else array))


def read_image(path: str | os.PathLike[str]) -> np.ndarray:
    """Returns an image file as RGB, uint8 [H W 3]: turned as its EXIF orientation says, laid on
    white where it is transparent, the first frame if it is animated. Raises UsageError."""
    if "://" in str(path):
        raise UsageError(
            f"image {path} is an address",
            "nothing is fetched from the web but weights from the hub",
            "download it, and give the file",
        )
    path = Path(checked_path("`image`", path)).expanduser()
    if path.is_dir() or not path.exists():  # a pipe will do
        raise UsageError(
            f"image {path} {'is a folder' if path.is_dir() else 'does not exist'}",
            "a file was expected",
            "check `image`",
        )
    return _decoded(path.read_bytes(), f"image {path}")


def _decoded(data: bytes, name: str) -> np.ndarray:
    """The bytes of an image file as RGB."""

    def read() -> np.ndarray:
        with Image.open(io.BytesIO(data)) as image:
            return _rgb(image)

    try:
        return _read(read, name)
    except UnidentifiedImageError as error:
        if data[4:12] in _HEIF:
            raise UsageError(
                f"{name} is not an image that can be read: it is HEIC",
                "Pillow does not read what phones write so, whatever the file's suffix",
                "save it as JPEG",
            ) from error
        raise UsageError(
            f"{name} is not an image",
            "its content is of no format that Pillow reads",
            "use PNG, JPEG or WebP",
        ) from error


def _read(read: Callable[[], np.ndarray], name: str) -> np.ndarray:
    """What a function makes of an image by Pillow. Raises UsageError for what cannot be read but
    UnidentifiedImageError as it is."""
    try:
        with warnings.catch_warnings():
            # Pillow warns of photographs from 90 megapixels on, and refuses from 180 on; and of
            # EXIF that makes no sense.
            warnings.simplefilter("ignore")
            return read()
    except UnidentifiedImageError:
        raise
    except Image.DecompressionBombError as error:
        raise UsageError(
            f"{name} is too large",
            str(error),
            "make it smaller first: the video has 1280x720 pixels at most",
        ) from error
    # what Pillow raises for files cut short or damaged
    except (OSError, SyntaxError, ValueError) as error:
        raise UsageError(
            f"{name} cannot be read",
            f"it is cut short or damaged: {error}",
            "save or download it again",
        ) from error


def _rgb(image: Image.Image) -> np.ndarray:
    """A Pillow image of any mode as uint8 [H W 3]. Raises ValueError for one without pixels."""
    image.load()
    if not image.width or not image.height:
        raise ValueError(f"it has {image.width}x{image.height} pixels")
    with contextlib.suppress(OSError, SyntaxError, TypeError, ValueError):  # EXIF without sense
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":  # convert() would clip them at 255
        image = Image.fromarray(_eight_bits(np.asarray(image), image.mode))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB"))


def _eight_bits(values: np.ndarray, mode: str) -> np.ndarray:
    """Grey values [H W] of 16 or 32 bits as uint8. 16 bits are 0..65535; wider numbers, which say
    nothing of their range, are 0..1, 0..255 or 0..65535, by the largest that is there."""
    values = np.nan_to_num(values.astype(np.float64))
    top = values.max()
    if mode == "F" and top <= 1:
        values = np.round(values * 255)
    elif mode.startswith("I;16") or top > 255:
        values = np.floor(values / 256)
    return values.clip(0, 255).astype(np.uint8)
