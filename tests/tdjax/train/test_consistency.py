"""The algebra of distillation in float64: our rectified-flow forms against the published TrigFlow
ones and against slopes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import put

from tdjax.sampling import flow
from tdjax.train import consistency, distribution

TIMES = np.array([0.05, 0.4, 1.0, 1.4, 1.558])  # TrigFlow, from almost clean to almost noise
SHAPE = (len(TIMES), 2, 3, 1, 4)
CLOSE = {"rtol": 1e-8, "atol": 1e-9}  # float64


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def column(a):
    return a.reshape(-1, 1, 1, 1, 1)


def student(x, timestep):
    u = column(timestep) / 1000.0
    return jnp.tanh(1.3 * x + u) + 0.4 * jnp.roll(x, 1, -1) * jnp.cos(3.0 * u)


def teacher(x, timestep):
    u = column(timestep) / 1000.0
    return jnp.sin(x - 0.5 * u) + 0.3 * x * u


def at_times():
    """x_u, coefficients, and the teacher's velocity."""
    x0, eps, t = put(draw(0, *SHAPE)), put(draw(1, *SHAPE)), put(TIMES)
    c = flow.from_log_sigma(jnp.log(jnp.tan(t)))
    x = flow.noisy(x0, eps, flow.per_sample(c))
    return x, c, consistency.at(teacher, x, c.u), t


def trig(velocity, x, t):
    """F as the official wrapper has it: (cos x_t - x0) / sin with x0 = c_skip x_t + c_out net(c_in
    x_t, c_noise)."""
    sin, cos = jnp.sin(t), jnp.cos(t)
    total = column(sin + cos)
    x0 = x / total - column(sin) / total * velocity(x / total, 1000.0 * sin / (sin + cos))
    return (column(cos) * x - x0) / column(sin)


def official(r, d_f, f_student, f_teacher, x, t):
    """g of Algorithm 1, arXiv 2510.08431; x is x_t, d_f the derivative times cos sin."""
    sin, cos = column(jnp.sin(t)), column(jnp.cos(t))
    return -cos * jnp.sqrt(1 - r**2 * sin**2) * (f_student - f_teacher) - r * (cos * sin * x + d_f)


def official_derivative(tangent, x, t, f_teacher, h):
    """cos sin dF/dt three ways; x is x_t."""
    sin, cos = jnp.sin(t), jnp.cos(t)
    f = lambda x, t: trig(student, x, t)
    weight = column(cos * sin)
    if tangent == "exact":
        return jax.jvp(f, (x, t), (weight * f_teacher, cos * sin))[1]
    if tangent == "discrete":
        back = f(np.cos(h) * x - np.sin(h) * f_teacher, t - h)
        return weight * (np.cos(h) * f(x, t) - back) / np.sin(h)
    in_x = jax.jvp(f, (x, t), (weight * f_teacher, jnp.zeros_like(t)))[1]
    return in_x + weight * (np.cos(h) * f(x, t) - f(x, t - h)) / np.sin(h)


@pytest.mark.slow
@pytest.mark.parametrize("tangent", list(consistency.TANGENT))
@pytest.mark.parametrize("r", [0.0, 0.3, 1.0])
def test_direction_is_the_published_one(tangent, r):
    x, c, v_teacher, t = at_times()
    p, h = flow.per_sample(c), 0.02
    v, term = consistency.TANGENT[tangent](student, x, v_teacher, c, h)
    x_t, f_student, f_teacher = x / p.b, trig(student, x / p.b, t), trig(teacher, x / p.b, t)
    np.testing.assert_allclose(flow.trig_from_velocity(x, v, p), f_student, **CLOSE)
    d_f = official_derivative(tangent, x_t, t, f_teacher, h)
    g = consistency.raw_direction(x, v_teacher - v, term, c, r)
    np.testing.assert_allclose(g, official(r, d_f, f_student, f_teacher, x_t, t), **CLOSE)
    if r < 1:  # the official code since January 2026 differs from its paper during the warm-up
        code = official(r, d_f, f_student, f_teacher, x_t, t) - (1 - r) * d_f
        np.testing.assert_allclose(
            consistency.raw_direction(x, v_teacher - v, term, c, r, "code2026"), code, **CLOSE
        )
        assert np.abs(code - g).max() > 0.1


def test_direction_is_the_slope_of_the_consistency_map():
    """r = 1: g = cos b^2 d/du (x - u v) along the teacher = cos b^2 (dv - u J)."""
    x, c, v_teacher, _ = at_times()
    p, h = flow.per_sample(c), 1e-6
    v, term = consistency.exact(student, x, v_teacher, c, 0.0)
    g = consistency.raw_direction(x, v_teacher - v, term, c, 1.0)
    moved = lambda h: flow.data(
        x + h * v_teacher,
        consistency.at(student, x + h * v_teacher, c.u + h),
        flow.per_sample(flow.from_u(c.u + h)),
    )
    np.testing.assert_allclose(
        g, p.cos * p.b**2 * (moved(h) - moved(-h)) / (2 * h), rtol=1e-6, atol=1e-8
    )
    j = jax.jvp(
        lambda x, u: consistency.at(student, x, u), (x, c.u), (v_teacher, jnp.ones_like(c.u))
    )[1]
    np.testing.assert_allclose(g, p.cos * p.b**2 * (v_teacher - v - p.u * j), **CLOSE)


@pytest.mark.parametrize("tangent", ["semidiscrete", "discrete"])
def test_differences_converge_to_the_derivative(tangent):
    x, c, v_teacher, _ = at_times()
    exact = consistency.exact(student, x, v_teacher, c, 0.0)[1]
    errors = [
        np.abs(consistency.TANGENT[tangent](student, x, v_teacher, c, h)[1] - exact).max()
        for h in (4e-3, 2e-3, 1e-3)
    ]
    np.testing.assert_allclose(np.divide(errors[:-1], errors[1:]), 2.0, rtol=0.05)  # first order


def test_a_student_with_straight_trajectories_is_left_alone():
    """All data at one point: v = (x - point) / u is its own teacher's consistency."""
    x, c, _, _ = at_times()
    straight = lambda x, timestep: (x - 0.7) / column(timestep / 1000.0)
    v = consistency.at(straight, x, c.u)
    for tangent in ("exact", "discrete"):
        _, term = consistency.TANGENT[tangent](straight, x, v, c, 0.01)
        np.testing.assert_allclose(
            consistency.raw_direction(x, v - v, term, c, 1.0), 0.0, atol=1e-9
        )


def test_loss_pulls_along_the_direction():
    """d loss / dF = -2 kappa sqrt(size) direction, of length one up to the floor; the value is that
    of the official scale."""
    x, c, v_teacher, _ = at_times()
    size = x[0].size
    v, term = consistency.exact(student, x, v_teacher, c, 0.0)
    g = consistency.raw_direction(x, v_teacher - v, term, c, 1.0)
    direction = consistency.normalised(g, 0.1 / size**0.5)
    length = np.sqrt((np.asarray(g) ** 2).sum((1, 2, 3, 4), keepdims=True))
    np.testing.assert_allclose(direction, g / (length + 0.1), **CLOSE)
    shifted = lambda change: (
        lambda x, timestep: student(x, timestep) + change / flow.per_sample(c).b
    )  # a change of F
    loss = lambda change: consistency.consistency_loss(
        shifted(change), x, c, direction, 100 / size**0.5
    )[0].sum()
    np.testing.assert_allclose(jax.grad(loss)(jnp.zeros(SHAPE)), -200 * direction, **CLOSE)
    np.testing.assert_allclose(loss(jnp.zeros(SHAPE)), 100 * jnp.square(direction).sum(), **CLOSE)
    assert np.isfinite(consistency.normalised(jnp.zeros(SHAPE), 7e-5)).all()


def test_teacher_steps_of_the_discrete_variant():
    """The grid is the shifted one, and each step is Euler's in TrigFlow time."""
    place = np.array([0.0, 0.25, 0.8, 0.999, 0.5])
    s = consistency.dcm_times(put(place), 48, 5.0, 3)
    u = flow.shift(1 - (place * (1 - 3 / 48) + np.arange(4)[:, None] / 48), 5.0)
    np.testing.assert_allclose(flow.from_log_sigma(s).u, u, **CLOSE)
    assert np.isinf(s[0, 0]) and (np.asarray(u[-1]) >= 0).all()
    x = flow.noisy(
        put(draw(0, *SHAPE)),
        put(draw(1, *SHAPE)),
        flow.per_sample(flow.from_u(put(u[0]))),
    )
    there = consistency.teacher_steps(teacher, x, s)
    t = np.arctan2(u, 1 - u)
    x_t = np.asarray(x) * column(np.cos(t[0]) + np.sin(t[0]))
    for now, after in zip(t, t[1:], strict=False):
        x_t = x_t - column(now - after) * trig(teacher, put(x_t), put(now))
    np.testing.assert_allclose(there * column(np.cos(t[-1]) + np.sin(t[-1])), x_t, **CLOSE)


# -- distribution matching -------------------------------------------------------------------------


@pytest.mark.slow
def test_rollout_is_the_stochastic_sampler():
    """Every count; a time later than the one before becomes that one; nothing after the start when
    count is 1."""
    noise = put(draw(0, 2, 4, 1, 2, 2, 3))
    s = put([[np.inf, 1.0, 2.0, -1.0], [np.inf, 0.5, -0.5, 0.0]])
    run = jax.jit(lambda count: distribution.rollout(student, noise, s, count))
    times, x = [np.array([1.0, 1.0])], np.asarray(noise[:, 0])
    for k in range(1, 5):
        got, now = run(k)
        np.testing.assert_allclose(got, x, **CLOSE)
        np.testing.assert_allclose(flow.from_log_sigma(now).u, times[-1], **CLOSE)
        u = times[-1]
        if k < 4:
            after = np.minimum(u, 1 / (1 + np.exp(-np.asarray(s[:, k]))))
            x0 = x - column(u) * np.asarray(student(put(x), put(1000 * u)))
            x = column(1 - after) * x0 + column(after) * np.asarray(noise[:, k])
            times.append(after)
    assert (times[2] == times[1])[0] and (times[3] == times[2])[1]


def test_gradient_of_distribution_matching():
    """2 (x0_critic - x0_teacher) / mean|made - x0_teacher|, whatever made it; written out for
    linear fields."""
    made, eps, s = draw(0, *SHAPE), draw(1, *SHAPE), draw(2, SHAPE[0])
    linear = lambda slope: lambda x, timestep: slope * x
    d, gap = distribution.dmd_direction(put(made), linear(0.3), linear(-0.6), put(eps), put(s))
    u = column(1 / (1 + np.exp(-s)))
    x = (1 - u) * made + u * eps
    weight = np.abs(made - (1 - 0.3 * u) * x).mean((1, 2, 3, 4))
    np.testing.assert_allclose(gap, weight, **CLOSE)
    np.testing.assert_allclose(d, u * 0.9 * x / column(weight), **CLOSE)
    np.testing.assert_allclose(
        jax.grad(lambda made: distribution.dmd_loss(made, d).sum())(put(made)),
        2 * d,
        **CLOSE,
    )
    np.testing.assert_allclose(
        distribution.dmd_loss(put(made), d), (np.asarray(d) ** 2).sum((1, 2, 3, 4)), **CLOSE
    )
    limited, _ = distribution.dmd_direction(
        put(made), linear(0.3), linear(-0.6), put(eps), put(s), 0.6
    )
    rms = np.sqrt((np.asarray(d) ** 2).mean((1, 2, 3, 4), keepdims=True))
    assert (rms > 0.6).any() and (rms < 0.6).any()
    np.testing.assert_allclose(limited, d * np.minimum(1, 0.6 / rms), **CLOSE)
    same, _ = distribution.dmd_direction(
        put(made), linear(0.0), linear(0.0), jnp.zeros(SHAPE), jnp.full(SHAPE[0], -np.inf)
    )
    assert (np.asarray(same) == 0).all()  # mean|made - x0_teacher| is 0 here


def test_critic_loss_is_weighted_flow_matching():
    made, eps, s = (
        put(draw(0, *SHAPE)),
        put(draw(1, *SHAPE)),
        put(draw(2, SHAPE[0])),
    )
    c = flow.from_log_sigma(s)
    x0 = distribution.data_of(student, flow.noisy(made, eps, flow.per_sample(c)), c)
    expected = (jnp.square(made - x0) / flow.per_sample(c).sin ** 2).sum((1, 2, 3, 4))
    np.testing.assert_allclose(
        distribution.critic_loss(student, made, eps, s)[0], expected, **CLOSE
    )
