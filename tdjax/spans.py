"""The sampling loop cut into calls: where experts change, and into single steps where progress is shown. No cut changes a bit."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from tdjax import flow, programs, sampler, teacher
from tdjax.config import SamplerConfig


class Span(NamedTuple):
    """One call: its first step, the last + 1, and the part whose network runs."""

    first: int
    last: int
    expert: str


def cut(cfg: SamplerConfig, *, experts: bool, single: bool) -> list[Span]:
    """experts: there are two networks. single: every step is a call of its own."""
    swap = flow.split_times(flow.times(cfg), cfg.boundary) if experts else cfg.steps
    cuts = sorted({0, swap, cfg.steps} | (set(range(cfg.steps)) if single else set()))
    return [Span(a, b, "dit" if a < swap else "dit_low") for a, b in zip(cuts, cuts[1:], strict=False)]


def start(key, sample, latents=None, *, cfg: SamplerConfig, shape: tuple[int, ...], experts: bool, single: bool) -> tuple[Any, list]:
    """(state, what the loop of each span reads at each of its steps): a program of its own, as many small ones take longer to compile.

    Sample `sample` draws from fold_in(key, sample). latents: start noise that was given.
    """
    noise = programs.start_noise(jax.random.fold_in(key, sample), cfg.steps if cfg.mode == "sde" else 1, shape)
    noise = lax.optimization_barrier(noise)  # its bits are those that a caller draws and gives as `latents`
    first = noise[0] if latents is None else jnp.array(latents, jnp.float32)  # a copy: the state is donated
    times = flow.times(cfg)
    if cfg.few_step:
        state, later = sampler.start(first, times), sampler.injected(noise)
        part = lambda a, b: (later[a:b] if cfg.mode == "sde" else None, jnp.asarray(times[a : b + 1]))
    else:
        state, rows = sampler.teacher_start(first), teacher.rows(cfg)
        part = lambda a, b: jax.tree.map(jnp.asarray, rows.part(a, b))
    return state, [part(span.first, span.last) for span in cut(cfg, experts=experts, single=single)]
