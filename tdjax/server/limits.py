"""What a server allows, as one frozen value."""

from __future__ import annotations

import dataclasses

from tdjax.config.values import settle
from tdjax.errors import UsageError

GIB = 2**30
DAY = 86400.0  # seconds
SEARCH = 200  # characters that prompts are searched for


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What one request, one key and the queue may have.

    queue:  jobs that wait, of all keys; jobs: that wait or run, of one key.
    frames: of a clip; pixels: of a frame; steps: of the sampler. sizes: WIDTHxHEIGHT, or
            WIDTHxHEIGHTxFRAMES, and no others; none: all.
    loras:  names that a request may give; webhooks: addresses that it may name, see
            `webhooks.checked_address`.
    body:   bytes of a request; image_pixels: of an image that is sent; body_seconds: until a
            request has arrived.
    job_seconds: until a job that runs is given up, with its worker. attempts: how often a job is
            begun, where the process that ran it dies each time.
    lease:  seconds after which a server of many that says nothing is taken for dead.
    keep_seconds, keep_bytes: of finished videos; the oldest go first.
    """

    queue: int = 200
    jobs: int = 100
    frames: int = 161
    pixels: int = 1280 * 720
    steps: int = 60
    sizes: tuple[str, ...] = ()
    loras: tuple[str, ...] = ()
    webhooks: tuple[str, ...] = ()
    body: int = 20 * 2**20
    image_pixels: int = 24_000_000
    body_seconds: float = 30.0
    job_seconds: float = 3600.0
    attempts: int = 3
    lease: float = 30.0
    keep_seconds: float = 7 * DAY
    keep_bytes: int = 20 * GIB

    def __post_init__(self):
        settle(self)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list | tuple):
                object.__setattr__(self, field.name, tuple(value))
            elif not value > 0:
                raise UsageError(
                    f"`{field.name}` is {value}", "a limit is a number above zero", "leave it away"
                )
