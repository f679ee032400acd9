"""Real shapes: those of sparse attention, and dense attention over the same tokens."""

from __future__ import annotations

from functools import partial

from pallas_kernels.sparse_attention.workloads import SHAPES, SPARSE, WIDTH, WORKLOADS, once, tokens
from pallas_kernels.workload import Workload

__all__ = ["DENSE", "SPARSE", "WORKLOADS"]

DENSE = {
    name: Workload(partial(tokens, l, h), flops=4.0 * h * WIDTH * l**2, bytes=once(l, h))
    for name, (l, h) in SHAPES.items()
}
