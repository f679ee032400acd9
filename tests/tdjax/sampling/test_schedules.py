"""Schedules against the golden grids, and against the formulas in float64."""

import numpy as np
import pytest

from tdjax.config import SamplerConfig
from tdjax.presets import I2V_SAMPLER, T2V_SAMPLER
from tdjax.sampling import schedules


def test_few_step_grids_match_the_official_scripts(golden):
    g = golden("sampler")
    prefixes = bytes(g["index"]).decode().split()
    assert len(prefixes) == 42
    for prefix in prefixes:
        _, sigma_max, steps = prefix.strip("/").rsplit("_", 2)
        cfg = SamplerConfig(num_steps=int(steps[1:]), sigma_max=float(sigma_max[1:]))
        official = g[f"out/{prefix}t_steps"]
        np.testing.assert_allclose(schedules.grid(cfg), official, rtol=1e-14, atol=0)
        got = schedules.times(cfg)
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, official.astype(np.float32))


def test_expert_split_matches_the_official_script(golden):
    g = golden("sampler")
    for prefix in (p for p in bytes(g["index"]).decode().split() if p.startswith("i2v")):
        index = g[f"out/{prefix}model_index"]
        got = schedules.split_times(g[f"out/{prefix}t_steps"].astype(np.float32), 0.9)
        np.testing.assert_array_equal(np.arange(len(index)) >= got, index == 1)


@pytest.mark.parametrize(
    "times, boundary, expected",
    [
        ((0.95, 0.9, 0.85, 0.0), 0.9, 2),
        ((0.8, 0.5, 0.0), 0.9, 0),
        ((0.95, 0.93, 0.0), 0.9, 2),
        ((0.9, 0.0), 0.9, 1),
    ],
)
def test_expert_split_at_its_edges(times, boundary, expected):
    """A time equal to the boundary still belongs to the high-noise expert; the final 0 is no
    step."""
    assert schedules.split_times(np.array(times, np.float32), boundary) == expected


def test_teacher_grid():
    cfg = SamplerConfig(num_steps=50, sampler="unipc", sigma_max=5000.0, shift=5.0)
    u = schedules.grid(cfg)
    assert u.shape == (51,) and u[-1] == 0 and (np.diff(u) < 0).all()
    np.testing.assert_allclose(u[0], 5000 / 5001, rtol=1e-14)
    top = (5000 / 5001) / (5 - 4 * 5000 / 5001)
    k = np.arange(50)
    even = top * (1 - k / 50)
    np.testing.assert_allclose(u[:-1], 5 * even / (1 + 4 * even), rtol=1e-13)


def test_the_defaults_give_the_known_network_times():
    assert T2V_SAMPLER.num_steps == 4
    np.testing.assert_allclose(
        schedules.times(T2V_SAMPLER), [0.98765, 0.93378, 0.85290, 0.60898, 0], atol=5e-6
    )
    np.testing.assert_allclose(schedules.times(I2V_SAMPLER)[0], 0.99502, atol=5e-6)
