"""The sampling loop cut into calls: where experts change, and into single steps where progress is
shown. No cut changes a bit."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tdjax.config import SamplerConfig
from tdjax.pipeline import compilation
from tdjax.sampling import few_step, flow, unipc


class Span(NamedTuple):
    """One call: its first step, the last + 1, and the part whose network runs."""

    first: int
    last: int
    expert: str


def cut(cfg: SamplerConfig, *, experts: bool, single: bool) -> list[Span]:
    """experts: there are two networks. single: every step is a call of its own."""
    swap = flow.split_times(flow.times(cfg), cfg.boundary) if experts else cfg.steps
    cuts = sorted({0, swap, cfg.steps} | (set(range(cfg.steps)) if single else set()))
    return [
        Span(a, b, "dit" if a < swap else "dit_low") for a, b in zip(cuts, cuts[1:], strict=False)
    ]


def start(
    key,
    sample,
    times,
    latents,
    *,
    shape: tuple[int, ...],
    mode: str,
    entries: int,
    cuts: tuple[tuple[int, int], ...],
):
    """(state, [noise that the steps of each span inject, or None]): one program, as many small ones
    take longer to compile.

    Sample `sample` draws `entries` of noise from fold_in(key, sample). times f32[steps+1]; latents:
    start noise that was given, or None.
    """
    noise = compilation.start_noise(jax.random.fold_in(key, sample), entries, shape)
    noise = lax.optimization_barrier(
        noise
    )  # its bits are those that a caller draws and gives as `latents`
    first = noise[0] if latents is None else jnp.array(latents)  # a copy: the state is donated
    state = (
        few_step.start(first, times) if mode in few_step.UPDATE else few_step.teacher_start(first)
    )
    return state, [few_step.injected(noise)[a:b] if mode == "sde" else None for a, b in cuts]


def arguments(cfg: SamplerConfig, key, sample: int, latents) -> tuple:
    """Those of the program `start`."""
    return (
        key,
        np.uint32(sample),
        flow.times(cfg),
        None if latents is None else np.asarray(latents, np.float32),
    )


def static(cfg: SamplerConfig, shape: tuple[int, ...], cut: list[Span]) -> dict[str, Any]:
    """What the program `start` depends on: not the schedule's numbers."""
    entries = cfg.steps if cfg.mode == "sde" else 1
    return {
        "shape": shape,
        "mode": cfg.mode,
        "entries": entries,
        "cuts": tuple((span.first, span.last) for span in cut),
    }


def schedules(cfg: SamplerConfig, cut: list[Span], noise: list) -> list:
    """What the loop of each span reads at each of its steps, with the noise from `start`."""
    if not cfg.few_step:
        rows = unipc.rows(cfg)
        return [rows.part(span.first, span.last) for span in cut]
    times = flow.times(cfg)
    return [
        (part, times[span.first : span.last + 1]) for span, part in zip(cut, noise, strict=True)
    ]
