"""Every op of the package and its implementations: what the report of this machine lists, and what
self-test, bench and compile gate must cover."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from pallas_kernels import (
    causal_conv,
    flash_attention,
    int8_matmul,
    norm_modulate,
    qk_prep,
    sage_attention,
    sparse_attention,
    temporal_unfold,
)

OPS: dict[str, Mapping[str, Callable]] = {
    **flash_attention.IMPLEMENTATIONS,
    **sparse_attention.IMPLEMENTATIONS,
    **sage_attention.IMPLEMENTATIONS,
    **int8_matmul.IMPLEMENTATIONS,
    **norm_modulate.IMPLEMENTATIONS,
    **qk_prep.IMPLEMENTATIONS,
    **temporal_unfold.IMPLEMENTATIONS,
    **causal_conv.IMPLEMENTATIONS,
}  # op -> its implementations by name


def compiled(op: str) -> tuple[str, ...]:
    """Returns the names of an op's implementations that are not the interpreter's."""
    return tuple(name for name in OPS[op] if name != "interpret")
