"""The one argument `impl` of every op: what each name means, and what "auto" chooses. Nothing ever
falls back silently."""

from __future__ import annotations

import difflib
from collections.abc import Callable

import jax


def choose(op: str, impl: str, table: dict[str, Callable], auto: Callable) -> Callable:
    """The implementation called `impl`: a name of `table`, or "auto", which is the callable `auto`;
    ValueError for other names."""
    if impl == "auto":
        return auto
    if impl in table:
        return table[impl]
    allowed = ("auto", *table)
    near = difflib.get_close_matches(impl, allowed, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{op}: impl is {impl!r}; allowed: {', '.join(allowed)}{hint}")


def automatic(
    kernel: Callable, reference: Callable, refusal: str | None, derivative: Callable | None = None
) -> Callable:
    """What "auto" means where both exist: `kernel` on CUDA, `reference` elsewhere and for what the
    kernel refuses.

    refusal: why the kernel does not take these arguments; None if it does. Differentiated, the op
             is `derivative` (by default the
    kernel) if the default device is a GPU, else the reference: branches for both would keep both
    sets of residuals.
    """
    if refusal:
        return reference
    op = jax.custom_jvp(on_cuda(kernel, reference))
    known = (derivative or kernel) if jax.default_backend() == "gpu" else reference
    op.defjvp(lambda args, tangents: jax.jvp(known, args, tangents))
    return op


def on_cuda(kernel: Callable, otherwise: Callable) -> Callable:
    """`kernel` where the program is compiled for CUDA, `otherwise` on every other platform; decided
    at lowering."""
    return lambda *args: jax.lax.platform_dependent(*args, cuda=kernel, default=otherwise)
