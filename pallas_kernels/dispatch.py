"""The one argument `impl` of every op: what each name means, and what "auto" chooses. Nothing ever
falls back silently.

Every op's package has `IMPLEMENTATIONS`: for each of its ops the implementations by name, made by
`implementations`. All of them together are `pallas_kernels.inventory.OPS`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from functools import partial

import jax


def implementations(reference: Callable, kernel: Callable, **others: Callable):
    """Returns the implementations of an op by name: "reference", `others` (as `cudnn=...`),
    "triton" (`kernel`, compiled) and "interpret" (`kernel`, interpreted: for tests). kernel takes
    `interpret`."""
    return {
        "reference": reference,
        **others,
        "triton": partial(kernel, interpret=False),
        "interpret": partial(kernel, interpret=True),
    }


def bound(table: Mapping[str, Callable], **options) -> dict[str, Callable]:
    """Returns the implementations with these options given: functions of arrays alone."""
    return {name: partial(function, **options) for name, function in table.items()}


def choose(op: str, impl: str, table: Mapping[str, Callable], auto: Callable) -> Callable:
    """Returns the implementation called `impl`: a name of `table`, or "auto", which is the callable
    `auto`; ValueError for other names."""
    if impl == "auto":
        return auto
    if impl in table:
        return table[impl]
    allowed = ("auto", *table)
    near = difflib.get_close_matches(impl, allowed, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{op}: impl is {impl!r}; allowed: {', '.join(allowed)}{hint}")


def automatic(
    table: Mapping[str, Callable],
    refusal: str | None,
    *,
    kernel: str = "triton",
    derivative: str | None = None,
) -> Callable:
    """Returns what "auto" means: a kernel of `table` on CUDA, its reference elsewhere and for what
    the kernel refuses.

    refusal: why the kernel does not take these arguments; None if it does.
    kernel: the name of the kernel.
    derivative: the name of the implementation that is differentiated if the default device is a
        GPU, by default the kernel; elsewhere it is the reference: branches for both would keep both
        sets of residuals.
    """
    reference = table["reference"]
    if refusal:
        return reference

    op = jax.custom_jvp(on_cuda(table[kernel], reference))

    @op.defjvp
    def rule(args, tangents):
        known = table[derivative or kernel]
        if jax.default_backend() != "gpu":
            known = reference
        return jax.jvp(known, args, tangents)

    return op


def on_cuda(kernel: Callable, otherwise: Callable) -> Callable:
    """Returns `kernel` where the program is compiled for CUDA, `otherwise` on every other platform;
    decided at lowering."""
    return lambda *args: jax.lax.platform_dependent(*args, cuda=kernel, default=otherwise)
