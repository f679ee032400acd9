"""The samplers of distilled weights against the official loops (golden)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import AS_USERS
from einops import rearrange
from tolerances import assert_close

from tdjax.config import SamplerConfig
from tdjax.sampling import few_step, schedules

SHAPE = (2, 3, 5, 7, 2)  # b t h w c
jit = functools.partial(jax.jit, compiler_options=AS_USERS)


def fake(model, dtype=jnp.float32):
    """The golden file's network: model 0 (text, or high noise) or 1 (low noise), with its own
    rounding of inputs and output."""
    scale, wave = ((0.3, jnp.sin), (0.2, jnp.cos))[model]

    def velocity(x, timestep):
        x, timestep = (
            x.astype(dtype).astype(jnp.float32),
            timestep.astype(dtype).astype(jnp.float32),
        )
        v = scale * x + wave(timestep / 500.0)[:, None, None, None, None]
        return v.astype(dtype)

    return velocity


def noise(steps, shape=SHAPE, seed=0):
    return np.random.default_rng(seed).standard_normal((steps, *shape)).astype(np.float32)


def golden_cases():
    return [
        (f"{kind}_s{s}_n{n}/", kind.split("_")[1])
        for kind, counts in (
            ("t2v_sde", (1, 2, 3, 4)),
            ("i2v_sde", (1, 2, 3, 4)),
            ("i2v_ode", (1, 2, 3, 4)),
            ("t2v_sde_bf16io", (2, 4)),
        )
        for s in (80, 200, 1600)
        for n in counts
    ]


def golden_noise(g, prefix, steps):
    """Start noise and injected noise as one array [steps b t h w c]; the official loop's last draw
    has weight 0."""
    draws = (
        g[f"in/{prefix}noises"][:-1]
        if f"in/{prefix}noises" in g
        else np.zeros((steps - 1, *g[f"in/{prefix}init_noise"].shape), np.float32)
    )
    return rearrange(
        np.concatenate([g[f"in/{prefix}init_noise"][None], draws]), "n b c t h w -> n b t h w c"
    )


@functools.cache
def run(mode, model, bf16):
    velocity = fake(model, jnp.bfloat16 if bf16 else jnp.float32)
    return jit(lambda x, noise, times: few_step.sample_from(velocity, x, noise, times, mode))


@functools.cache
def whole(mode, bf16):
    """The loop of all steps, of the first network."""
    velocity = fake(0, jnp.bfloat16 if bf16 else jnp.float32)
    return jit(functools.partial(few_step.sample, velocity, sampler=mode))


def test_every_golden_case_is_named(golden):
    assert sorted(p for p, _ in golden_cases()) == sorted(
        bytes(golden("sampler")["index"]).decode().split()
    )


@pytest.mark.parametrize("prefix, mode", golden_cases())
def test_official_loops(golden, prefix, mode):
    """Each state of the official loop, experts swapped where it swapped them."""
    g = golden("sampler")
    index, expected = (
        g[f"out/{prefix}model_index"],
        rearrange(g[f"out/{prefix}x"], "n b c t h w -> n b t h w c"),
    )
    times, bf16 = g[f"out/{prefix}t_steps"].astype(np.float32), "bf16" in prefix
    z = golden_noise(g, prefix, len(index))
    x, eps = few_step.start(z[0], times), np.asarray(few_step.injected(z))
    for i, model in enumerate(index):
        x, finite = run(mode, int(model), bf16)(x, eps[i : i + 1], times[i : i + 2])
        assert_close(x, expected[i], "sampler", f"{prefix} step {i}")
        assert finite.tolist() == [True]
    if not index.any():
        at_once, finite = whole(mode, bf16)(z, times)
        np.testing.assert_array_equal(at_once, x)
        assert finite.tolist() == [True] * len(index)


@pytest.mark.slow
def test_the_network_receives_the_official_timesteps(golden):
    g = golden("sampler")
    for prefix in ("t2v_sde_s80_n4/", "t2v_sde_bf16io_s200_n4/"):
        seen, expected = [], g[f"out/{prefix}timesteps_to_net"]
        times = g[f"out/{prefix}t_steps"].astype(np.float32)

        def spy(x, timestep, seen=seen):
            seen.append(np.asarray(timestep))
            return jnp.zeros_like(x)

        with jax.disable_jit():
            few_step.sample(spy, noise(4), times, "sde")
        got = np.stack(seen)
        assert got.dtype == np.float32
        if "bf16" in prefix:
            got = got.astype(jnp.bfloat16)
        np.testing.assert_allclose(got.astype(np.float64), expected, rtol=1e-7)


@functools.cache
def one_and_part(mode):
    """The loop, and some steps of it, of another network."""
    velocity = lambda x, timestep: (
        jnp.sin(3.0 * x) + 0.1 * jnp.cos(timestep / 100.0)[:, None, None, None, None] * x
    )
    loops = few_step.sample, few_step.sample_from
    return [jit(functools.partial(loop, velocity, sampler=mode)) for loop in loops]


@pytest.mark.parametrize("mode", ["sde", "ode"])
@pytest.mark.parametrize("cut", [1, 2, 3])
def test_two_calls_give_the_bits_of_one(mode, cut):
    times, z = schedules.times(SamplerConfig()), noise(4)
    one, part = one_and_part(mode)
    once, finite = one(z, times)
    eps = few_step.injected(z)
    x, first = part(few_step.start(z[0], times), eps[:cut], times[: cut + 1])
    x, second = part(x, eps[cut:], times[cut:])
    np.testing.assert_array_equal(x, once)
    assert [*first.tolist(), *second.tolist()] == finite.tolist() == [True] * 4


@pytest.mark.slow
def test_the_start_noise_and_the_last_entry_are_not_injected():
    """A changed entry changes the result exactly when it is used: all entries for sde, the first
    for ode."""
    times = schedules.times(SamplerConfig(num_steps=3))
    for mode, used in (("sde", [True, True, True]), ("ode", [True, False, False])):
        run = jit(functools.partial(few_step.sample, fake(0), sampler=mode))
        base = np.asarray(run(noise(3), times)[0])
        for i in range(3):
            other = noise(3)
            other[i] += 1
            assert (np.asarray(run(other, times)[0]) != base).any() == used[i]
    x = few_step.start(noise(1)[0], times)
    first, second = (
        few_step.sample_from(fake(0), x, eps, np.array([0.5, 0.0], np.float32), "sde")[0]
        for eps in (noise(1), noise(1, seed=1))
    )
    np.testing.assert_array_equal(first, second)


def test_finite_names_the_first_bad_step():
    def velocity(x, timestep):
        return (
            jnp.where(timestep[:, None, None, None, None] < 900, jnp.nan, 0.0).astype(jnp.float32)
            * x
        )

    _, finite = jit(functools.partial(few_step.sample, velocity, sampler="sde"))(
        noise(4), schedules.times(SamplerConfig())
    )
    assert finite.dtype == bool and finite.tolist() == [True, True, False, False]
    _, finite = few_step.sample_teacher(
        velocity, noise(1)[0], SamplerConfig(num_steps=5, sampler="unipc", sigma_max=5000.0)
    )
    assert finite.tolist() == [
        bool(u >= 0.9)
        for u in schedules.grid(SamplerConfig(num_steps=5, sampler="unipc", sigma_max=5000.0))[:-1]
    ]


def test_one_compile_for_each_number_of_steps():
    traces = []

    @functools.partial(jax.jit, static_argnames="sampler")
    def go(noise, times, sampler):
        traces.append(sampler)
        return few_step.sample(fake(0), noise, times, sampler)

    for seed, sigma_max in ((0, 80.0), (1, 200.0), (2, 1600.0)):
        go(noise(4, seed=seed), schedules.times(SamplerConfig(sigma_max=sigma_max)), sampler="sde")
    go(noise(4), schedules.times(SamplerConfig(mid_t=(1.3, 1.0, 0.6))), sampler="sde")
    assert traces == ["sde"]
    go(noise(3), schedules.times(SamplerConfig(num_steps=3)), sampler="sde")
    assert traces == ["sde", "sde"]


def test_wrong_arguments_are_named():
    times = schedules.times(SamplerConfig())
    with pytest.raises(ValueError, match="sampler is 'unipc'; allowed: sde, ode"):
        few_step.sample(fake(0), noise(4), times, "unipc")
    with pytest.raises(ValueError, match="4 steps need 4 entries of noise.*got 3"):
        few_step.sample(fake(0), noise(3), times, "sde")


def test_guidance():
    cond, uncond = (lambda x, t: x + 1.0), (lambda x, t: 0.5 * x)
    x, t = jnp.full((1, 1, 1, 1, 2), 2.0), jnp.full((1,), 500.0)
    np.testing.assert_array_equal(
        few_step.guided(cond, uncond, 5.0)(x, t), 1.0 + 5.0 * (3.0 - 1.0) * np.ones_like(x)
    )
    np.testing.assert_array_equal(few_step.guided(cond, uncond, 1.0)(x, t), cond(x, t))


@pytest.mark.parametrize("u_next", [0.934, 0.25, 0.0])
def test_what_a_step_predicted_is_found_in_its_state(u_next):
    x, v, eps = noise(3)
    u = 0.985
    for sampler, other in (("sde", eps), ("ode", x)):
        after = few_step.UPDATE[sampler](x, v, eps, u, u_next)
        assert_close(few_step.predicted(after, other, u, u_next, sampler), x - u * v, "float32")
