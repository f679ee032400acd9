"""Clients that are told when their video has ended: a POST to an address that the operator allows,
signed as Standard Webhooks are (standardwebhooks.com), which OpenAI's clients check.

Each event is delivered at least once, under one id: what was sent as the process died is sent
again.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import hmac
import json
import os
import re
import secrets
import ssl
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult, urlsplit

from tdjax.config.values import shown
from tdjax.errors import UsageError
from tdjax.files import near
from tdjax.progress import say
from tdjax.server.limits import DAY

if TYPE_CHECKING:
    from tdjax.server.store import Job, Store

AT_ONCE = 8
SECONDS = 10.0  # that one delivery may take
# Until the next try: as long again as has passed since the job ended, within these.
SOONEST, LATEST = 5.0, 3600.0
LOOK = 5.0  # seconds until what is due is looked for again
ADDRESS = 2000  # characters
GONE = 410  # the status of an address that is to be told no more
MARK = "whsec_"  # before the base64 of a secret


def checked_address(given: Any, allowed: tuple[str, ...]) -> str:
    """Returns the address that a request names, if it is among those that are allowed, or below one
    of them that ends in a slash. Raises UsageError."""
    if not allowed:
        raise UsageError(
            "a webhook was asked for",
            "this server calls no addresses",
            "ask GET /v1/videos/ID, or start it with --webhooks",
        )
    if not isinstance(given, str) or not re.fullmatch(rf"[!-~]{{1,{ADDRESS}}}", given):
        why = f"an address of at most {ADDRESS} printable characters is needed"
        raise UsageError(f"webhook is {shown(given)}", why, f"for example {allowed[0]}")
    try:
        parts = urlsplit(given)
        plain = _origin(parts)
    except ValueError:  # a port that is none
        plain = None
    if plain is not None:
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        # What a server may read as another folder is not below this one.
        strange = re.search(r"(^|/)\.{1,2}(/|\?|$)|%2e|%2f|%5c|\\|//", parts.path, re.I)
        for each in map(urlsplit, allowed):
            below = each.path.endswith("/") and path.startswith(each.path) and not strange
            if plain == _origin(each) and (path == each.path or below):
                return given
    raise UsageError(
        f"webhook is {shown(given)}",
        f"this server calls what begins with {', '.join(allowed)}",
        f"nearest: {near(given, allowed, cutoff=0.0)[0]}",
    )


def _origin(parts: SplitResult) -> tuple[str, str | None, int | None] | None:
    """Scheme, host and port; None where there is no host, or a user or fragment beside it."""
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return None
    if "@" in parts.netloc or parts.fragment:
        return None
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}[parts.scheme]


def allowed_addresses(given: list[str]) -> tuple[str, ...]:
    """Returns the addresses of the command line; a host alone allows all of its own. Raises
    UsageError."""
    out = []
    for each in given:
        try:
            parts = urlsplit(each)
            usable = _origin(parts) is not None and not parts.query
        except ValueError:
            usable = False
        if not usable or not re.fullmatch("[!-~]+", each):
            raise UsageError(
                f"--webhooks {each}",
                "http:// or https://, a host and perhaps a path is needed",
                "for example https://example.org/videos/",
            )
        out.append(each if parts.path else f"{each}/")
    return tuple(out)


def read_secret(file: Path) -> bytes:
    """Returns the secret of a file, which is drawn and written where there is none. Raises
    UsageError."""
    drawn = MARK + base64.b64encode(secrets.token_bytes(32)).decode()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            opened = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        except FileExistsError:
            return _key(file.read_text(encoding="ascii").strip())
        with open(opened, "w", encoding="ascii") as out:
            out.write(drawn + "\n")
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{file} cannot be the secret of webhooks",
            str(error),
            f"{MARK} and the base64 of 24 bytes or more; a new file has one drawn",
        ) from error
    return _key(drawn)


def _key(text: str) -> bytes:
    """The bytes of a secret. Raises ValueError."""
    key = base64.b64decode(text.removeprefix(MARK), validate=True)
    if not text.startswith(MARK) or len(key) < 24:
        raise ValueError("it is no secret of webhooks")
    return key


class Webhooks:
    """Tells of jobs of a store that have ended. allowed: see `checked_address`."""

    def __init__(self, jobs: Store, allowed: tuple[str, ...], secret: bytes):
        self.store, self.allowed, self.secret = jobs, allowed, secret
        self.wake = asyncio.Event()

    async def run(self) -> None:
        """Delivers what is due, until this is cancelled. No fault here ends anything else."""
        while True:
            self.wake.clear()
            try:
                jobs = self.store.take_hooks(AT_ONCE, 2 * SECONDS)
                await asyncio.gather(*map(self._tell, jobs))
            except Exception as error:  # such as a full disk
                jobs = []
                _note(f"webhooks are put off: {error!r}")
            if len(jobs) < AT_ONCE:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.wake.wait(), LOOK)

    async def _tell(self, job: Job) -> None:
        """One try."""
        address = job.request["webhook"]
        try:
            checked_address(address, self.allowed)  # what is allowed may have changed
            status = await asyncio.wait_for(post(address, *self.message(job)), SECONDS)
            why = f"it answers {status}"
        except UsageError:
            status = GONE
        except (OSError, ValueError, TimeoutError) as error:
            status, why = 0, str(error) or type(error).__name__
        since = max(0.0, time.time() - (job.completed_at or 0.0))
        if 200 <= status < 300:
            self.store.put_off_hook(job.id, None)
        elif status == GONE or since > DAY:
            _note(f"the webhook of {job.id} is given up")
            self.store.put_off_hook(job.id, None)
        else:
            pause = min(max(since, SOONEST), LATEST)
            _note(f"the webhook of {job.id} is tried again in {pause:.0f} s: {why}")
            self.store.put_off_hook(job.id, pause)

    def message(self, job: Job) -> tuple[dict[str, str], bytes]:
        """Returns (headers, body) of the event that a job has ended."""
        id = f"evt_{job.id.removeprefix('video_')}"
        body = json.dumps(
            {
                "id": id,
                "object": "event",
                "type": f"video.{job.status}",
                "created_at": int(job.completed_at or 0),
                "data": {"id": job.id},
            }
        ).encode()
        now = int(time.time())
        signed = hmac.new(self.secret, f"{id}.{now}.".encode() + body, hashlib.sha256).digest()
        return {
            "webhook-id": id,
            "webhook-timestamp": str(now),
            "webhook-signature": f"v1,{base64.b64encode(signed).decode()}",
        }, body


async def post(address: str, headers: dict[str, str], body: bytes) -> int:
    """Returns the status that an address answers with. Nothing else is read of its answer, and no
    redirect is followed. Raises OSError and ValueError."""
    parts = urlsplit(address)
    origin = _origin(parts)
    assert origin is not None
    scheme, host, port = origin
    context = ssl.create_default_context() if scheme == "https" else None
    reader, writer = await asyncio.open_connection(host, port, ssl=context, limit=4096)
    try:
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        all_headers = {
            "Host": parts.netloc,
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            "User-Agent": "tdjax",
            "Connection": "close",
            **headers,
        }
        head = "".join(f"{name}: {value}\r\n" for name, value in all_headers.items())
        writer.write(f"POST {target} HTTP/1.1\r\n{head}\r\n".encode() + body)
        await writer.drain()
        line = await reader.readline()
    finally:
        writer.transport.abort()
    match = re.match(rb"HTTP/1\.[01] ([0-9]{3})[ \r]", line)
    if match is None:
        raise ValueError("it does not answer with HTTP")
    return int(match[1])


def _note(text: str) -> None:
    say(f"tdjax: {text}")
