"""A named real shape of an op: its arguments, and what the hardware must at least do for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class Workload:
    """`make(key)` gives the op's array arguments; flops are executed ones, bytes those that must
    cross device memory once."""

    make: Callable
    flops: float
    bytes: float
