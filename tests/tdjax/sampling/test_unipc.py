"""The samplers of undistilled weights against float64 numpy written from the formulas, an analytic
flow, and diffusers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import put
from compiling import AS_USERS
from tolerances import assert_close

from tdjax.config import SamplerConfig
from tdjax.sampling import few_step, schedules, unipc

NOISE = np.random.default_rng(0).standard_normal((2, 3, 5, 7, 2)).astype(np.float32)  # b t h w c
jit = functools.partial(jax.jit, compiler_options=AS_USERS)


def numpy_unipc(velocity, x, u):
    """UniPC-2 bh2 in float64, as its formulas stand: explicit corrector and predictor with history
    lists."""
    steps, snr = len(u) - 1, lambda t: np.log((1 - t) / t)
    data, corrected = [], []
    for i in range(steps):
        m = x - u[i] * velocity(x, u[i])
        if i > 0:
            h = snr(u[i]) - snr(u[i - 1])
            big = np.expm1(-h)
            if i == 1:
                c = 0.5 * (m - data[-1])
            else:
                r = (snr(u[i - 2]) - snr(u[i - 1])) / h
                g1 = big / -h - 1
                g2 = g1 / -h - 0.5
                rho = np.linalg.solve([[1.0, 1.0], [r, 1.0]], [g1 / big, 2 * g2 / big])
                c = rho[0] * (data[-2] - data[-1]) / r + rho[1] * (m - data[-1])
            x = u[i] / u[i - 1] * corrected[-1] - (1 - u[i]) * big * (data[-1] + c)
        data.append(m)
        corrected.append(x)
        if i == steps - 1:
            return m
        h = snr(u[i + 1]) - snr(u[i])
        big = np.expm1(-h)
        slope = 0.5 * (data[-2] - m) / ((snr(u[i - 1]) - snr(u[i])) / h) if i > 0 else 0.0
        x = u[i + 1] / u[i] * x - (1 - u[i + 1]) * big * (m + slope)
    raise AssertionError("no steps")


def numpy_euler(velocity, x, u):
    for now, after in zip(u, u[1:], strict=False):
        x = x + (after - now) * velocity(x, now)
    return x


def curved(x, u):
    """A smooth nonlinear velocity, in numpy or jax.numpy."""
    xp = jnp if isinstance(x, jax.Array) else np
    return 0.5 * xp.tanh(x) + 0.3 * x * (1.0 - u) + 0.2


def jax_curved(x, timestep):
    return curved(x, timestep[:, None, None, None, None] / 1000.0)


@pytest.mark.parametrize("mode, reference", [("euler", numpy_euler), ("unipc", numpy_unipc)])
@pytest.mark.parametrize(
    "steps, shift, sigma_max", [(1, 5.0, 80.0), (2, 3.0, 200.0), (7, 1.0, 80.0), (50, 5.0, 5000.0)]
)
def test_teachers_against_float64(mode, reference, steps, shift, sigma_max):
    cfg = SamplerConfig(num_steps=steps, sampler=mode, sigma_max=sigma_max, shift=shift)
    z = NOISE
    got, finite = jit(lambda z: few_step.sample_teacher(jax_curved, z, cfg))(z)
    assert_close(
        got,
        reference(curved, z.astype(np.float64), schedules.grid(cfg)),
        "float32",
        f"{mode} {steps}",
    )
    assert finite.tolist() == [True] * steps


def gaussian_error(mode, steps, deviation=0.5, mean=0.7):
    """Error of sampling N(mean, deviation^2), whose velocity and flow map are known, started where
    the flow starts."""
    cfg = SamplerConfig(num_steps=steps, sampler=mode, sigma_max=80.0, shift=3.0)
    u = schedules.grid(cfg)
    spread = lambda t: np.sqrt((1 - t) ** 2 * deviation**2 + t**2)
    z = NOISE.astype(np.float64)
    x = (1 - u[0]) * mean + spread(u[0]) * z

    def velocity(x, timestep):
        t = timestep[:, None, None, None, None] / 1000.0
        variance = (1.0 - t) ** 2 * deviation**2 + t**2
        offset = x - (1.0 - t) * mean
        return (t - (1.0 - t) * deviation**2) / variance * offset - mean

    got = few_step.sample_teacher(velocity, put(x, jnp.float32), cfg)[0]
    return np.abs(np.asarray(got) - (mean + deviation * z)).max()


@pytest.mark.slow
def test_order_of_convergence_on_a_gaussian():
    """Halving the steps' size halves Euler's error and quarters UniPC's, which is far below it."""
    errors = {mode: [gaussian_error(mode, n) for n in (10, 20, 40)] for mode in ("euler", "unipc")}
    order = {mode: np.log2(np.array(e[:-1]) / np.array(e[1:])) for mode, e in errors.items()}
    assert (order["euler"] > 0.8).all() and (order["euler"] < 1.3).all(), errors
    assert (order["unipc"] > 1.8).all(), errors
    assert errors["unipc"][2] < errors["euler"][2] / 10, errors


@pytest.mark.slow
def test_teacher_in_two_calls_gives_the_bits_of_one():
    cfg = SamplerConfig(num_steps=6, sampler="unipc", sigma_max=5000.0)
    rows, z = unipc.step_coefficients(cfg), NOISE
    whole, _ = jit(lambda z: few_step.sample_teacher(jax_curved, z, cfg))(z)
    go = jit(functools.partial(few_step.teacher_from, jax_curved), donate_argnums=0)
    for cut in (1, 3, 5):
        state, first = go(few_step.teacher_start(put(z)), rows.segment(0, cut))
        state, second = go(state, rows.segment(cut, 6))
        np.testing.assert_array_equal(state.x, whole)
        assert len(first) == cut and len(second) == 6 - cut


def test_teacher_tables_do_not_recompile():
    traces = []

    @jax.jit
    def go(z, rows):
        traces.append(1)
        return few_step.teacher_from(jax_curved, few_step.teacher_start(z), rows)[0].x

    for shift in (1.0, 3.0, 5.0):
        for mode in ("euler", "unipc"):
            go(
                NOISE,
                unipc.step_coefficients(
                    SamplerConfig(num_steps=5, sampler=mode, sigma_max=80.0, shift=shift)
                ),
            )
    assert len(traces) == 1


def diffusers_steps(scheduler, x, u):
    """A diffusers scheduler over our own grid, with the velocity `curved`."""
    import torch

    scheduler.set_timesteps(len(u) - 1)
    scheduler.sigmas = torch.tensor(u)
    x = torch.tensor(x)
    for i, timestep in enumerate(scheduler.timesteps):
        x = scheduler.step(torch.tensor(curved(x.numpy(), u[i])), timestep, x).prev_sample
    return x.numpy()


@pytest.mark.slow
def test_diffusers_schedulers_agree():
    """An independent port of both samplers, given the same float64 grid."""
    diffusers = pytest.importorskip("diffusers")
    z = NOISE
    unipc = diffusers.UniPCMultistepScheduler(
        solver_order=2,
        solver_type="bh2",
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=5.0,
        final_sigmas_type="zero",
    )
    for scheduler, mode in (
        (unipc, "unipc"),
        (diffusers.FlowMatchEulerDiscreteScheduler(), "euler"),
    ):
        cfg = SamplerConfig(num_steps=8, sampler=mode, sigma_max=5000.0)
        expected = diffusers_steps(scheduler, z.astype(np.float64), schedules.grid(cfg))
        assert_close(few_step.sample_teacher(jax_curved, put(z), cfg)[0], expected, "float32", mode)
