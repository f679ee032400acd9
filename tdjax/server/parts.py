"""Answers with a file of an object store, or the part of it that a client asks for (RFC 9110, 14):
players ask for parts."""

from __future__ import annotations

import re
from collections.abc import Mapping

from starlette.responses import Response, StreamingResponse

from tdjax.server.storage import Storage


def part_of(
    storage: Storage, name: str, size: int, headers: Mapping[str, str], media_type: str
) -> Response:
    """Returns the answer to a request for a file of so many bytes, which is read while it is sent.
    headers: of the request."""
    tag = f'"{name}"'  # a name means one content
    given = {"Accept-Ranges": "bytes", "ETag": tag}
    asked = headers.get("range") if headers.get("if-range", tag) == tag else None
    part = asked_part(asked, size)
    begin, end = part or (0, size)
    if begin >= end:
        return Response(status_code=416, headers=given | {"Content-Range": f"bytes */{size}"})
    if part is not None:
        given["Content-Range"] = f"bytes {begin}-{end - 1}/{size}"
    given["Content-Length"] = str(end - begin)
    content = storage.read(name, begin, end)
    return StreamingResponse(content, 200 if part is None else 206, given, media_type)


def asked_part(asked: str | None, size: int) -> tuple[int, int] | None:
    """Returns (begin, end) of a Range header in a file of so many bytes, with nothing between them
    where the file does not reach so far; None, for all of it, where there is none, or another kind,
    or several parts."""
    match = re.fullmatch(r"bytes=([0-9]{0,18})-([0-9]{0,18})", (asked or "").strip())
    if match is None or not (match[1] or match[2]):
        return None
    if not match[1]:  # the last bytes
        return max(0, size - int(match[2])), size
    begin, last = int(match[1]), int(match[2] or size)
    return None if last < begin and match[2] else (begin, min(last + 1, size))
