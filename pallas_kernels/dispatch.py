"""The one argument `impl` of every op: what each name means, and what "auto" chooses. Nothing ever falls back silently."""

from __future__ import annotations

import difflib
from collections.abc import Callable

import jax


def choose(op: str, impl: str, table: dict[str, Callable], auto: Callable) -> Callable:
    """The implementation called `impl`: a name of `table`, or "auto", which is the callable `auto`."""
    if impl == "auto":
        return auto
    if impl in table:
        return table[impl]
    allowed = ("auto", *table)
    near = difflib.get_close_matches(impl, allowed, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{op}: impl is {impl!r}; allowed: {', '.join(allowed)}{hint}")


def on_cuda(kernel: Callable, otherwise: Callable) -> Callable:
    """`kernel` where the program is compiled for CUDA, `otherwise` on every other platform; decided at lowering."""
    return lambda *args: jax.lax.platform_dependent(*args, cuda=kernel, default=otherwise)
