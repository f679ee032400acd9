"""Scalars of the teacher's samplers, Euler and UniPC, as one table: every step is a linear
combination of arrays.

With m = x - u v (the data predicted at a step), both samplers are

    x  <- corrector . (x, x_last, m, m_1, m_2)
    x' <- predictor . (x, m, m_1)

where x_last is the corrected x of the step before, and m_1, m_2 are earlier m.
Euler's corrector leaves x alone. UniPC is the multistep scheme of arXiv 2302.04867, order 2,
variant bh2, predicting data. Everything is float64 numpy on the host: differences of log-SNR cancel
badly in float32.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tdjax.config import SamplerConfig
from tdjax.sampling import schedules

KEEP = (1.0, 0.0, 0.0, 0.0, 0.0)


class StepCoefficients(NamedTuple):
    """time f32[n], corrector f32[n 5], predictor f32[n 3]: one row for each step."""

    time: np.ndarray
    corrector: np.ndarray
    predictor: np.ndarray

    def segment(self, first: int, last: int) -> StepCoefficients:
        """Returns steps first to last-1, for a loop in pieces."""
        return StepCoefficients(*(a[first:last] for a in self))


def step_coefficients(cfg: SamplerConfig) -> StepCoefficients:
    """Returns the table of a teacher's sampler ("euler" or "unipc")."""
    u = schedules.grid(cfg)
    corrector, predictor = {"euler": _euler, "unipc": _unipc}[cfg.sampler](u)
    table = (u[:-1], corrector, predictor)
    return StepCoefficients(*(np.asarray(column, np.float32) for column in table))


def _euler(u: np.ndarray) -> tuple[list, list]:
    """x' = x + (u' - u) v, written with m."""
    ratio = u[1:] / u[:-1]
    return [KEEP] * len(ratio), [(r, 1.0 - r, 0.0) for r in ratio]


def _unipc(u: np.ndarray) -> tuple[list, list]:
    """UniPC-2 bh2: order 1 on the first and the last step, 2 between; the last step lands on the
    predicted data."""
    steps = len(u) - 1
    # log of (1-u)/u; infinite at the end, which is never asked for
    snr = np.log1p(-u[:-1]) - np.log(u[:-1])
    corrector: list[tuple[float, ...]] = [KEEP]
    predictor: list[tuple[float, ...]] = []
    for i in range(1, steps):
        corrector.append(_correct(u, snr, i, order=min(2, i)))
    for i in range(steps - 1):
        predictor.append(_predict(u, snr, i, order=min(2, i + 1)))
    predictor.append((0.0, 1.0, 0.0))
    return corrector, predictor


def _predict(u, snr, i: int, order: int) -> tuple[float, ...]:
    """From u_i to u_{i+1}: factors of (x, m_i, m_{i-1})."""
    h = snr[i + 1] - snr[i]
    scale = -(1.0 - u[i + 1]) * np.expm1(-h)
    slope = 0.5 * h / (snr[i - 1] - snr[i]) if order == 2 else 0.0  # factor of m_{i-1} - m_i
    return u[i + 1] / u[i], scale * (1.0 - slope), scale * slope


def _correct(u, snr, i: int, order: int) -> tuple[float, ...]:
    """Over u_{i-1} to u_i again, now that m_i is known: factors of (x, x_last, m_i, m_{i-1},
    m_{i-2})."""
    h = snr[i] - snr[i - 1]
    e = np.expm1(-h)
    scale = -(1.0 - u[i]) * e
    new, old = 0.5, 0.0  # factors of m_i - m_{i-1} and m_{i-2} - m_{i-1}
    if order == 2:
        r = (snr[i - 2] - snr[i - 1]) / h
        g1 = -e / h - 1.0
        g2 = -g1 / h - 0.5
        b1, b2 = g1 / e, 2.0 * g2 / e
        rho = (b2 - b1) / (r - 1.0)
        new, old = b1 - rho, rho / r
    return 0.0, u[i] / u[i - 1], scale * new, scale * (1.0 - new - old), scale * old
