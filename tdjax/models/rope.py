"""Rotary position of video tokens: three axes share the channels of a head (thu-ml/TurboDiffusion
rcm/networks/wan2pt1.py)."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from einops import repeat


def widths(head_dim: int) -> tuple[int, int, int]:
    """Channels of the t, h and w axes: h and w take a third each, cut to an even number, t the
    rest."""
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


def _axis_angles(positions: int, width: int) -> np.ndarray:  # float64 [positions width/2]
    """position * 10000^(-2j/width); computed on the host, exact to the last float32 bit."""
    return np.arange(positions)[:, None] * 10000.0 ** (-np.arange(0, width, 2) / width)


def over_grid(tables, grid: tuple[int, int, int]):  # three f32 [n width/2] -> [t*h*w head_dim/2]
    """Per-axis tables side by side for every token, w fastest."""
    t, h, w = grid
    parts = (
        repeat(tables[0], "t k -> (t h w) k", h=h, w=w),
        repeat(tables[1], "h k -> (t h w) k", t=t, w=w),
        repeat(tables[2], "w k -> (t h w) k", t=t, h=h),
    )
    return jnp.concatenate(parts, -1)


def angles(grid: tuple[int, int, int], head_dim: int) -> list[np.ndarray]:
    """float64 angles of the three axes."""
    return [_axis_angles(n, d) for n, d in zip(grid, widths(head_dim), strict=True)]


class Rotation(NamedTuple):
    """cos, sin f32 [l head_dim/2] of every token's angles. tokens: those of the clip; beyond them
    are rows that only fill up a mesh."""

    cos: Any
    sin: Any
    tokens: int

    def filled(self, rows: int) -> Rotation:
        """Returns the tables with more rows behind."""
        fill = lambda table: jnp.pad(table, ((0, rows), (0, 0))) if rows else table
        return Rotation(fill(self.cos), fill(self.sin), self.tokens)


def rope(grid: tuple[int, int, int], head_dim: int) -> Rotation:
    """Returns the tables of a grid of tokens; only the small per-axis tables are constants of the
    program."""
    tables = angles(grid, head_dim)
    cos, sin = (
        over_grid([jnp.asarray(f(x), jnp.float32) for x in tables], grid) for f in (np.cos, np.sin)
    )
    return Rotation(cos, sin, math.prod(grid))
