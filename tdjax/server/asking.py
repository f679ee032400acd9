"""What a client asks for: a body within bounds, its fields, its image, and the checked request of
the pipeline that they become. Nothing of it names a file of this machine, and no address is
fetched."""

from __future__ import annotations

import asyncio
import base64
import binascii
import dataclasses
import io
import re
import secrets
import warnings
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from tdjax import cli
from tdjax.config import check_fps
from tdjax.errors import TdjaxError, UsageError
from tdjax.files import near
from tdjax.media.image import as_image
from tdjax.pipeline.request import ModelInfo, make_request
from tdjax.server.limits import Limits
from tdjax.values import parse_real, parse_whole, real, shown, text, whole
from tdjax.values.parsing import json_object

# {field of a request: the type of a field of a form}
FIELDS = {
    "prompt": str,
    "model": str,
    "seconds": float,
    "size": str,
    "resolution": str,
    "aspect_ratio": str,
    "num_frames": int,
    "fps": int,
    "seed": int,
    "num_steps": int,
    "guidance_scale": float,
    "negative_prompt": str,
    "fit": str,
    "format": str,
}
IMAGE = "input_reference"
ALIASES = {"output_format": "format", "num_inference_steps": "num_steps", "image": IMAGE}
FORMATS = {
    "mp4": "video/mp4",
    "webm": "video/webm",
    "mkv": "video/x-matroska",
    "gif": "image/gif",
}
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP")
PROMPT = 10_000  # characters
FORM_FIELD = 64 * 2**10  # bytes of a form's field that is no file
NAMES = {"image": IMAGE, "width": "size", "height": "size"}  # as clients know the arguments


class Unfit(TdjaxError):
    """A request that is refused for its form. status: of HTTP."""

    def __init__(self, status: int, what: str, why: str, fix: str):
        super().__init__(what, why, fix)
        self.status = status


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """A checked request. arguments: of the pipeline's call, as JSON values, with `format`. image:
    uint8 [H W 3]. shape: see `store.Job`."""

    arguments: dict[str, Any]
    image: np.ndarray | None
    shape: str


# The body
# --------------------------------------------------------------------------------------------------


async def read_body(request: Request, limits: Limits) -> bytes:
    """Returns the body. Raises Unfit where it is longer, or takes longer, than it may."""
    declared = request.headers.get("content-length", "0")
    if not re.fullmatch(r"[0-9]{1,18}", declared) or int(declared) > limits.body:
        raise _too_large(limits)
    try:
        return await asyncio.wait_for(_chunks(request, limits), limits.body_seconds)
    except TimeoutError as error:
        raise Unfit(
            408,
            "the request did not arrive in time",
            f"{limits.body_seconds:g} seconds are allowed",
            "send a smaller image",
        ) from error
    except ClientDisconnect as error:
        raise Unfit(400, "the request is incomplete", "the client went away", "send it") from error


async def _chunks(request: Request, limits: Limits) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limits.body:
            raise _too_large(limits)
    return bytes(body)


def _too_large(limits: Limits) -> Unfit:
    return Unfit(
        413,
        "the request is too large",
        f"a body may have {limits.body} bytes",
        "send a smaller image",
    )


async def fields_of(request: Request, body: bytes) -> tuple[dict[str, Any], bytes | None]:
    """Returns (fields, bytes of the image) of a JSON body or a form. Raises Unfit."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        try:
            fields = json_object(body, unique=True)
        except ValueError as error:
            raise Unfit(400, "the body is not a JSON object", str(error), "send one") from error
        fields = _own_names(fields)
        return fields, _inline_image(fields.pop(IMAGE, None))
    if kind == "multipart/form-data":
        return await _form(request, body)
    raise Unfit(
        415,
        f"the content type is {shown(kind)}",
        "allowed: application/json, multipart/form-data",
        'for example curl -H "Content-Type: application/json"',
    )


async def _form(request: Request, body: bytes) -> tuple[dict[str, Any], bytes | None]:
    async def stream():
        yield body

    parser = MultiPartParser(
        request.headers, stream(), max_files=1, max_fields=32, max_part_size=FORM_FIELD
    )
    try:
        form = await parser.parse()
    except (MultiPartException, ValueError, KeyError) as error:
        why = str(getattr(error, "message", None) or error)
        raise Unfit(400, "the form cannot be read", why, "send multipart/form-data") from error
    try:
        if len(set(form)) != len(form.multi_items()):
            raise Unfit(400, "a field is there twice", "each is given once", "send it once")
        given = _own_names(dict(form))
        file = given.pop(IMAGE, None)
        for name, value in given.items():
            if isinstance(value, UploadFile):
                raise Unfit(400, f"{name} is a file", f"the image is {IMAGE}", f"name it {IMAGE}")
        image = await file.read() if isinstance(file, UploadFile) else _inline_image(file)
        return {name: _typed(name, value) for name, value in given.items()}, image
    finally:
        await form.close()


def _own_names(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields by the names that they have here. Raises Unfit for one that is given twice."""
    out: dict[str, Any] = {}
    for name, value in fields.items():
        own = ALIASES.get(name, name)
        if own in out:
            raise Unfit(400, f"{own} and {name} were both given", "they are the same", "give one")
        out[own] = value
    return out


def _typed(name: str, value: str) -> Any:
    """A form's field as the type that JSON would have. Raises UsageError."""
    kind = FIELDS.get(name, str)
    if kind is str:
        return value
    try:
        return parse_whole(value) if kind is int else parse_real(value)
    except ValueError as error:
        wanted = "a whole number" if kind is int else "a number"
        raise UsageError(
            f"{name} is {shown(value)}", f"{wanted} is needed", "written in digits 0 to 9"
        ) from error


# The image
# --------------------------------------------------------------------------------------------------


def _inline_image(given: Any) -> bytes | None:
    """The bytes of an image that is written into JSON: {"image_url": "data:image/png;base64,..."},
    or that text alone. Raises UsageError for addresses, which are not fetched."""
    if isinstance(given, dict) and set(given) == {"image_url"}:
        given = given["image_url"]
    if given is None:
        return None
    head, comma, data = given.partition(",") if isinstance(given, str) else ("", "", "")
    if not comma or not re.fullmatch(r"data:image/[a-z]{1,10};base64", head):
        raise UsageError(
            f"{IMAGE} is {shown(given)}",
            "an image is sent with the request; no address is fetched",
            f'send a form with a file, or {{"{IMAGE}": "data:image/png;base64,..."}}',
        )
    try:
        return base64.b64decode(data, validate=True)
    except binascii.Error as error:
        raise UsageError(f"{IMAGE} is not base64", str(error), "encode it again") from error


def decoded_image(data: bytes, limit: int) -> np.ndarray:
    """Returns uint8 [H W 3] of the bytes of an image, whose size is looked at before its pixels
    are. Raises UsageError. limit: pixels."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
                width, height = image.size
                several = getattr(image, "n_frames", 1) > 1
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise UsageError(
            f"{IMAGE} is not an image that is taken",
            f"allowed: {', '.join(IMAGE_FORMATS)}",
            "save it as one of them",
        ) from error
    except Image.DecompressionBombError:
        width, height, several = limit, 2, False
    if width * height > limit:
        raise UsageError(
            f"{IMAGE} has {width}x{height} pixels",
            f"{limit} pixels are allowed",
            "make it smaller first: a video has 1280x720 at most",
        )
    if several:
        raise UsageError(f"{IMAGE} is animated", "one picture is needed", "send one frame of it")
    return as_image(data)


# The request
# --------------------------------------------------------------------------------------------------


def asked(
    fields: dict[str, Any], image: np.ndarray | None, model: ModelInfo, limits: Limits
) -> Asked:
    """Returns the request that fields and an image are. Raises UsageError."""
    unknown = sorted(set(fields) - set(FIELDS))
    if unknown:
        nearest = near(unknown[0], [*FIELDS, IMAGE])
        raise UsageError(
            f"unknown field {shown(unknown[0])}",
            f"allowed: {', '.join([*FIELDS, IMAGE])}",
            f"did you mean {nearest[0]}?" if nearest else "leave it away",
        )
    given = {name: value for name, value in fields.items() if value is not None}
    prompt = text("prompt", given.pop("prompt", None))
    if not prompt.strip() or len(prompt) > PROMPT:
        raise UsageError(
            f"the prompt has {len(prompt)} characters", f"1 to {PROMPT} are allowed", "describe it"
        )
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise UsageError("the prompt holds half a character", "it is not Unicode", "encode it anew")
    given.pop("model", None)
    form = given.pop("format", "mp4")
    if not isinstance(form, str) or form not in FORMATS:
        nearest = near(str(form), FORMATS, cutoff=0.0)[0]
        raise UsageError(
            f"format is {shown(form)}", f"allowed: {', '.join(FORMATS)}", f"nearest: {nearest}"
        )
    arguments = {**given, **_size(given), **_frames(given)}
    for name in ("size", "seconds"):
        arguments.pop(name, None)
    arguments.setdefault("seed", secrets.randbelow(2**31))
    request = make_request(prompt, arguments | {"image": image}, model)
    size, steps = request.size, request.sampler.num_steps
    _check("num_frames", size.frames, limits.frames)
    _check("the size in pixels", size.width * size.height, limits.pixels)
    _check("num_steps", steps, limits.steps)
    settled = {
        "model": model.name,
        "prompt": prompt,
        "width": size.width,
        "height": size.height,
        "num_frames": size.frames,
        "num_steps": steps,
        "seed": request.seed,
        "fps": request.fps,
        "format": form,
    }
    for name in ("guidance_scale", "negative_prompt"):
        if name in given:
            settled[name] = given[name]
    if image is not None and request.fit != "adaptive":  # whose size is settled by now
        settled["fit"] = request.fit
    elif image is not None:
        settled["fit"] = "stretch"
    return Asked(arguments=settled, image=image, shape=f"{size}, {steps} steps")


def _check(name: str, value: int, limit: int) -> None:
    if value > limit:
        why = f"this server allows {limit}"
        raise UsageError(f"{name} is {value}", why, f"use {limit} or less")


def _size(given: dict[str, Any]) -> dict[str, Any]:
    """Width and height of "832x480"."""
    if "size" not in given:
        return {}
    match = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", str(given["size"]))
    if match is None:
        raise UsageError(
            f"size is {shown(given['size'])}",
            "it is WIDTHxHEIGHT in pixels",
            "for example 832x480; or give resolution and aspect_ratio",
        )
    return {"width": int(match[1]), "height": int(match[2])}


def _frames(given: dict[str, Any]) -> dict[str, Any]:
    """The number of frames of a length in seconds, which OpenAI's clients send as text."""
    if "seconds" not in given:
        return {}
    if "num_frames" in given:
        raise UsageError("seconds and num_frames", "both give the length", "give one of them")
    seconds = given["seconds"]
    if isinstance(seconds, str):
        try:
            seconds = parse_real(seconds)
        except ValueError as error:
            why = "a number is needed"
            raise UsageError(f"seconds is {shown(seconds)}", why, "use 5") from error
    seconds, fps = real("seconds", seconds), whole("fps", given.get("fps", 16))
    check_fps(fps)
    if not 0 < seconds < 1000:
        raise UsageError(f"seconds is {seconds}", "a length above zero is needed", "use 5")
    return {"num_frames": max(1, round(seconds * fps / 4) * 4 + 1)}


def spelled(error: TdjaxError) -> str:
    """The message of an error with the names that clients know."""
    return cli.spelled(str(error), NAMES)
