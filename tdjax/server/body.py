"""The body of a request, read within bounds, as fields and the bytes of an image."""

from __future__ import annotations

import asyncio
import base64
import re
from collections.abc import Mapping
from typing import Any

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from tdjax.config.parsing import json_object, json_value
from tdjax.config.values import parse_real, parse_whole, shown
from tdjax.errors import TdjaxError, UsageError
from tdjax.server.asking import FIELDS, IMAGE, LAST_IMAGE
from tdjax.server.limits import Limits
from tdjax.server.loras import EXAMPLE

ALIASES = {"output_format": "format", "num_inference_steps": "num_steps", "image": IMAGE}
FORM_FIELD = 64 * 2**10  # bytes of a form's field that is no file
MARKS = 20_000  # commas and brackets in JSON, of which parsing makes Python's objects


class Refusal(TdjaxError):
    """A request that is refused, here for its form. status, headers: of the answer."""

    status = 400
    headers: Mapping[str, str] = {}


class TooLate(Refusal):
    """A request that took longer to arrive than it may."""

    status = 408
    headers = {"Connection": "close"}  # what has not been read of it is not read


class TooLarge(Refusal):
    """A request of more bytes than it may have."""

    status = 413
    headers = {"Connection": "close"}  # the same


class WrongKind(Refusal):
    """A request whose body is neither JSON nor a form."""

    status = 415


async def read_body(request: Request, limits: Limits) -> bytes:
    """Returns the body. Raises Refusal where it is longer, or takes longer, than it may."""
    declared = request.headers.get("content-length", "0")
    if not re.fullmatch(r"[0-9]{1,18}", declared) or int(declared) > limits.body:
        raise _too_large(limits)
    try:
        return await asyncio.wait_for(_chunks(request, limits), limits.body_seconds)
    except TimeoutError as error:
        raise TooLate(
            "the request did not arrive in time",
            f"{limits.body_seconds:g} seconds are allowed",
            "send a smaller image",
        ) from error
    except ClientDisconnect as error:
        raise Refusal("the request is incomplete", "the client went away", "send it") from error


async def _chunks(request: Request, limits: Limits) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limits.body:
            raise _too_large(limits)
    return bytes(body)


def _too_large(limits: Limits) -> Refusal:
    return TooLarge(
        "the request is too large",
        f"a body may have {limits.body} bytes",
        "send a smaller image",
    )


async def fields_of(request: Request, body: bytes) -> tuple[dict[str, Any], bytes | None]:
    """Returns (fields, bytes of the image) of a JSON body or a form. Raises Refusal."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        marks = sum(body.count(mark) for mark in (b",", b"[", b"{"))
        if marks > MARKS:
            why = f"it has {marks} commas and brackets, and {MARKS} are allowed"
            raise Refusal("the body has too many values", why, "leave them away")
        try:
            fields = json_object(body, unique=True)
        except ValueError as error:
            raise Refusal("the body is not a JSON object", str(error), "send one") from error
        fields = _own_names(fields)
        return fields, _inline_image(fields.pop(IMAGE, None))
    if kind == "multipart/form-data":
        return await _form(request, body)
    raise WrongKind(
        f"the content type is {shown(kind)}",
        "allowed: application/json, multipart/form-data",
        'for example curl -H "Content-Type: application/json"',
    )


async def _form(request: Request, body: bytes) -> tuple[dict[str, Any], bytes | None]:
    async def stream():
        yield body

    parser = MultiPartParser(
        request.headers, stream(), max_files=2, max_fields=32, max_part_size=FORM_FIELD
    )
    try:
        form = await parser.parse()
    except (MultiPartException, ValueError, KeyError) as error:
        why = str(getattr(error, "message", None) or error)
        raise Refusal("the form cannot be read", why, "send multipart/form-data") from error
    try:
        if len(set(form)) != len(form.multi_items()):
            raise Refusal("a field is there twice", "each is given once", "send it once")
        given = _own_names(dict(form))
        file = given.pop(IMAGE, None)
        for name, value in given.items():
            if isinstance(value, UploadFile) and name == LAST_IMAGE:
                given[name] = value.filename  # which is refused where the model is known
            elif isinstance(value, UploadFile):
                raise Refusal(f"{name} is a file", f"the image is {IMAGE}", f"name it {IMAGE}")
        image = await file.read() if isinstance(file, UploadFile) else _inline_image(file)
        return {name: _typed(name, value) for name, value in given.items()}, image
    finally:
        await form.close()


def _own_names(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields by the names that they have here. Raises Refusal for one that is given twice."""
    out: dict[str, Any] = {}
    for name, value in fields.items():
        own = ALIASES.get(name, name)
        if own in out:
            raise Refusal(f"{own} and {name} were both given", "they are the same", "give one")
        out[own] = value
    return out


def _typed(name: str, value: str) -> Any:
    """A form's field as the type that JSON would have. Raises UsageError."""
    kind = FIELDS.get(name, str)
    if kind is str:
        return value
    if kind is bool:
        return {"true": True, "false": False}.get(value, value)
    if kind is list:
        try:
            return json_value(value, unique=True)
        except ValueError as error:
            raise UsageError(
                f"{name} is {shown(value)}", f"it is not JSON: {error}", f"for example {EXAMPLE}"
            ) from error
    try:
        return parse_whole(value) if kind is int else parse_real(value)
    except ValueError as error:
        wanted = "a whole number" if kind is int else "a number"
        why, fix = f"{wanted} is needed", "written in digits 0 to 9"
        raise UsageError(f"{name} is {shown(value)}", why, fix) from error


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
    except ValueError as error:
        raise UsageError(f"{IMAGE} is not base64", str(error), "encode it again") from error
