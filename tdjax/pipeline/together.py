"""A call of a pipeline whose devices are those of several processes: what these agree on before it
begins, and how one of them ends it in all.

Every process makes the same call. Programs that exchange something wait for each other, so that
what they are and their order must not depend on what one process sees alone: its memory, a
terminal, a callback.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable

import jax
import numpy as np

from tdjax.errors import Cancelled, UsageError
from tdjax.parallel import hosts
from tdjax.pipeline.request import Request
from tdjax.progress import Listener, cancelled

_UNKNOWN = np.iinfo(np.int64).max  # bytes of a device that does not report its memory


def agreed(request: Request, shown: bool, limit: int | None) -> tuple[Request, int | None]:
    """Returns (a request with its steps in single calls, and shown, where one process asks for
    that; the least bytes that JAX may use on a device of any).

    shown: whether this process shows steps. limit: bytes of its first device, None where that does
    not say. Raises UsageError in all processes where they were asked for different videos.
    """
    asked = [request.single_steps or shown, request.on_preview is not None]
    limits = np.array([_UNKNOWN if limit is None else limit])
    own = np.concatenate([_digest(request), np.array(asked, np.uint8), limits.view(np.uint8)])
    rows = hosts.gathered(own)
    digests, flags, bounds = np.split(rows, [len(own) - len(asked) - 8, len(own) - 8], axis=1)
    if (digests != digests[0]).any():
        raise UsageError(
            "the processes were asked for different videos",
            "all of them make each video together",
            "give every process the same arguments, prompt and seed among them",
        )
    single, previews = flags.any(0)
    if single and request.on_step is None:
        request = dataclasses.replace(request, on_step=_nothing)
    if previews and request.on_preview is None:
        request = dataclasses.replace(request, on_preview=_nothing)
    least = int(np.ascontiguousarray(bounds).view(np.int64).min())
    return request, None if least == _UNKNOWN else least


def _nothing(*_) -> None:
    pass


def _digest(request: Request) -> np.ndarray:
    """uint8[32] of all that a request's bits depend on."""
    key = None if request.key is None else np.asarray(jax.random.key_data(request.key)).tolist()
    what = [
        *(request.prompts, request.negative_prompt, request.seed, key, request.num_samples),
        *(str(request.size), str(request.sampler), request.fit, request.digests()),
        *(request.output_type, request.check),
    ]
    return np.frombuffer(hashlib.sha256(json.dumps(what).encode()).digest(), np.uint8)


class Listeners(Listener):
    """Those of all processes: a call that one of them ends, ends in all, after the next step."""

    def __init__(self, request: Request):
        super().__init__(request.on_stage, request.on_step, request.cancel, request.on_preview)
        self.asked = False

    def stage(self, name: str) -> None:
        """As of `Listener`; what ends the call is heeded after a step."""
        self._heard(lambda: Listener.stage(self, name))

    def preview(self, step: int, frames) -> None:
        """As of `Listener`; what ends the call is heeded after a step."""
        self._heard(lambda: Listener.preview(self, step, frames))

    def check(self, where: str) -> None:
        """As of `Listener`; what ends the call is heeded after a step."""
        self._heard(lambda: Listener.check(self, where))

    def step(self, step: int, steps: int) -> None:
        """Tells that a step is done. Raises Cancelled in all processes where one has asked."""
        self._heard(lambda: Listener.step(self, step, steps))
        if hosts.gathered(np.uint8(self.asked)).any():
            raise cancelled(f"after step {step} of {steps}")

    def _heard(self, tell: Callable[[], None]) -> None:
        try:
            tell()
        except Cancelled:
            self.asked = True
