"""What a client asks for: fields and an image, and the checked request of the pipeline that they
become. Nothing of it names a file of this machine.

`python -m tdjax.server.asking` does so in a process of its own, for requests with an image: a
picture that makes its decoder fail, or take much memory, harms nothing else.
"""

from __future__ import annotations

import asyncio
import dataclasses
import io
import json
import re
import secrets
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

from tdjax import cli

if __name__ == "__main__":
    cli.heed_signals()

import numpy as np
from PIL import Image, UnidentifiedImageError

from tdjax.config import SamplerConfig, VideoSize, check_fps
from tdjax.config.values import parse_real, real, shown, text, whole
from tdjax.errors import TdjaxError, UsageError
from tdjax.files import near, written
from tdjax.media.image import as_image
from tdjax.pipeline.request import ModelInfo, make_request
from tdjax.server.limits import Limits
from tdjax.server.loras import checked_loras
from tdjax.server.webhooks import checked_address

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
    "lora": list,
    "previews": bool,
    "webhook": str,
}
LAST_IMAGE = "last_image"
IMAGE = "input_reference"
FORMATS = {
    "mp4": "video/mp4",
    "webm": "video/webm",
    "mkv": "video/x-matroska",
    "gif": "image/gif",
}
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP")
PROMPT = 10_000  # characters
DECODING = 30.0  # seconds that an image may take
UNWRITABLE = 3  # the exit code of a decoder that cannot write
NAMES = {"image": IMAGE, "width": "size", "height": "size"}  # as clients know the arguments


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """A checked request. arguments: of the pipeline's call, as JSON values, with `model` and
    `format`. shape: see `store.Job`."""

    arguments: dict[str, Any]
    shape: str


# The image
# --------------------------------------------------------------------------------------------------


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
    if LAST_IMAGE in fields:
        raise no_last_image(model)
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
    if not prompt.strip():
        raise UsageError("the prompt is empty", "a video is made of a text", "describe it")
    for name, words in (("prompt", prompt), ("negative_prompt", given.get("negative_prompt", ""))):
        _check_words(name, text(name, words))
    given.pop("model", None)
    loras = checked_loras(given.pop("lora", []), limits.loras)
    previews = given.pop("previews", False)
    if not isinstance(previews, bool):
        why = "true or false is needed"
        raise UsageError(f"previews is {shown(previews)}", why, "use true to see each step")
    webhook = given.pop("webhook", None)
    if webhook is not None:
        webhook = checked_address(webhook, limits.webhooks)
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
    names = (f"{size.width}x{size.height}", f"{size.width}x{size.height}x{size.frames}")
    if limits.sizes and not set(names) & set(limits.sizes):
        raise UsageError(
            f"the size is {names[1]}",
            f"this server makes: {', '.join(limits.sizes)}",
            f"nearest: {near(names[1], limits.sizes, cutoff=0.0)[0]}",
        )
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
    shape = f"{size}, {steps} steps"
    if loras:
        settled["lora"] = [list(pair) for pair in loras]  # as JSON has it
        shape += f", {loras}"
    if previews:
        settled["previews"] = True
    if webhook is not None:
        settled["webhook"] = webhook
    return Asked(arguments=settled, shape=shape)


def no_last_image(model: ModelInfo) -> UsageError:
    """The error of a request with a last image, which no model that is served here takes."""
    takes = f"one image, the first: {IMAGE}" if model.task == "i2v" else "no image"
    return UsageError(
        f"{LAST_IMAGE} was given", f"{model.name} takes {takes}", f"leave {LAST_IMAGE} away"
    )


def _check_words(name: str, words: str) -> None:
    if len(words) > PROMPT:
        why = f"{PROMPT} are allowed"
        raise UsageError(f"the {name} has {len(words)} characters", why, "say it in fewer")
    if "\0" in words:
        raise UsageError(f"the {name} holds a zero character", "it is no text", "leave it away")
    if any("\ud800" <= character <= "\udfff" for character in words):
        raise UsageError(
            f"the {name} holds half a character", "it is not Unicode", "encode it anew"
        )


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


def model_of(info: dict[str, Any]) -> ModelInfo:
    """Returns what a worker tells of its model as the value that requests are checked with."""
    sampler = info["sampler"]
    return ModelInfo(
        **{
            **info,
            "size": VideoSize(**info["size"]),
            "sampler": SamplerConfig(**{**sampler, "mid_t": tuple(sampler["mid_t"])}),
            "prompts": tuple(info["prompts"]),
        }
    )


# A process of its own
# --------------------------------------------------------------------------------------------------


async def asked_apart(
    fields: dict[str, Any], data: bytes, model: ModelInfo, limits: Limits, target: Path
) -> Asked:
    """As `asked`, for the bytes of an image, which becomes a PNG file. Raises UsageError."""
    process = await asyncio.create_subprocess_exec(
        *[sys.executable, "-m", "tdjax.server.asking"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    order = {"fields": fields, "target": str(target)}
    order |= {"model": dataclasses.asdict(model), "limits": dataclasses.asdict(limits)}
    try:
        sent = process.communicate(json.dumps(order).encode() + b"\n" + data)
        out, _ = await asyncio.wait_for(sent, DECODING)
    except TimeoutError:
        out = b""
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode == UNWRITABLE:
        raise OSError(f"{target} cannot be written")
    if not out:
        raise UsageError(
            f"{IMAGE} cannot be decoded",
            f"what decodes it failed, or took over {DECODING:g} seconds",
            "save it as PNG again",
        )
    answer = json.loads(out)
    if "error" in answer:
        raise UsageError(*answer["error"])
    return Asked(**answer)


def _main() -> int:
    """Reads an order and the bytes of an image, and writes what is asked for, or the error."""
    order = json.loads(sys.stdin.buffer.readline())
    limits = Limits(**order["limits"])
    try:
        image = decoded_image(sys.stdin.buffer.read(), limits.image_pixels)
        what = asked(order["fields"], image, model_of(order["model"]), limits)
        with written(Path(order["target"]), overwrite=True) as part:
            Image.fromarray(image).save(part, compress_level=1)  # quick to write
    except UsageError as error:
        print(json.dumps({"error": [error.what, error.why, error.fix]}))
    except OSError:
        return UNWRITABLE
    else:
        print(json.dumps(dataclasses.asdict(what)))
    return 0


if __name__ == "__main__":
    cli.run(_main)
