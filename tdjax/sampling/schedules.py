"""Times of the samplers, and where the second expert begins: float64 numpy on the host."""

from __future__ import annotations

import numpy as np

from tdjax.config import SamplerConfig
from tdjax.sampling import flow


def grid(cfg: SamplerConfig) -> np.ndarray:
    """Returns the times u of a sampler, float64 [steps+1], falling to 0.

    Few-step: TrigFlow times arctan(sigma_max), cfg.mid_t, 0 (thu-ml/TurboDiffusion
    inference/wan2.1_t2v_infer.py).
    Teacher: an even grid below sigma_max, shifted (NVlabs/rcm rcm/samplers).
    """
    if cfg.few_step:
        between = cfg.mid_t[: cfg.num_steps - 1]
        return np.asarray(flow.u_from_trig(np.array([np.arctan(cfg.sigma_max), *between, 0.0])))
    top = flow.unshift(flow.u_from_sigma(cfg.sigma_max), cfg.shift)
    even = top * (1.0 - np.arange(cfg.num_steps + 1) / cfg.num_steps)
    return flow.shift(even, cfg.shift)


def times(cfg: SamplerConfig) -> np.ndarray:
    """Returns the grid as the sampler takes it: f32[steps+1]."""
    return grid(cfg).astype(np.float32)


def split_times(times: np.ndarray, boundary: float) -> int:
    """Returns the first step that belongs to the low-noise expert: the first time below `boundary`;
    steps if there is none.

    times f32[steps+1]. The high-noise expert takes every step before it, the low-noise expert every
    step from there on (thu-ml/TurboDiffusion inference/wan2.2_i2v_infer.py).
    """
    starts = np.asarray(times)[:-1]
    below = np.flatnonzero(starts < starts.dtype.type(boundary))
    return int(below[0]) if below.size else len(starts)
