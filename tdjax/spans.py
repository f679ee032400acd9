"""The sampling loop cut into calls: where experts change, and into single steps where progress is shown. No cut changes a bit."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tdjax import flow, programs, sampler, teacher
from tdjax.config import SamplerConfig


class Span(NamedTuple):
    """One call: what the loop reads at each of its steps, the first step, the last + 1, and the part whose network runs."""

    schedule: Any
    first: int
    last: int
    expert: str


def start(cfg: SamplerConfig, shape: tuple[int, ...], key, latents=None, *, experts: bool, single: bool) -> tuple[Any, list[Span]]:
    """(state, spans). latents: start noise that was given. experts: there are two networks."""
    noise = programs.start_noise(key, cfg.steps if cfg.mode == "sde" else 1, shape)
    first = noise[0] if latents is None else jnp.array(latents, jnp.float32)  # a copy: the state is donated
    times = flow.times(cfg)
    swap = flow.split_times(times, cfg.boundary) if experts else cfg.steps
    cuts = sorted({0, swap, cfg.steps} | (set(range(cfg.steps)) if single else set()))
    if cfg.few_step:
        state, later = sampler.start(first, times), sampler.injected(noise)
        part = lambda a, b: (later[a:b] if cfg.mode == "sde" else None, jnp.asarray(times[a : b + 1]))
    else:
        state, rows = sampler.teacher_start(first), teacher.rows(cfg)
        part = lambda a, b: jax.tree.map(jnp.asarray, rows.part(a, b))
    return state, [Span(part(a, b), a, b, "dit" if a < swap else "dit_low") for a, b in zip(cuts, cuts[1:], strict=False)]


def arrays(started: tuple[Any, list[Span]]) -> tuple[Any, list]:
    """What `start` gives, without numbers and names."""
    state, cut = started
    return state, [span.schedule for span in cut]
