import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tdjax.errors import UsageError
from tdjax.sampling import flow
from tdjax.train import state as parts
from tdjax.train.optimizer import OptimizerConfig, adamw
from tdjax.train.state import (
    Batch,
    DistillState,
    EMAConfig,
    Teacher,
    TrainState,
    ema_update,
    trainable,
)
from tdjax.train.times import LogNormal, UniformShift


class Scale(nnx.Module):
    """Velocity: a multiple of x and of the mean of the text."""

    def __init__(self, value=2.0, dtype=jnp.float32):
        self.scale = nnx.Param(jnp.full((3,), value, dtype))

    def __call__(self, x, timestep, text, image=None):
        return x * self.scale[...] * text.mean((1, 2))[:, None, None, None, None]


OPTIMIZER = adamw(OptimizerConfig(learning_rate=0.1))


def pointers(tree):
    return [
        x.unsafe_buffer_pointer()
        for x in jax.tree.leaves(tree)
        if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
    ]


def test_a_new_state_shares_no_array():
    """So that it can be donated while the teacher it came from lives on."""
    model, key = Scale(), jax.random.key(0)
    state = DistillState.create(model, OPTIMIZER, key, critic=model, critic_optimizer=OPTIMIZER)
    found = pointers(state) + pointers(model)
    assert len(set(found)) == len(found)
    after = jax.jit(lambda s: dataclasses.replace(s, step=s.step + 1), donate_argnums=0)(state)
    assert (
        int(after.step) == 1
        and float(model.scale[0]) == 2.0
        and jax.random.key_data(key).shape == (2,)
    )
    alone = DistillState.create(model, OPTIMIZER, key)
    assert alone.critic is None and alone.critic_opt is None
    assert {f.name for f in dataclasses.fields(TrainState)} == {
        "step",
        "model",
        "ema",
        "opt",
        "key",
    }


def test_states_refuse():
    with pytest.raises(UsageError, match=r"the weight scale is bfloat16\n.*\n.*param=\"float32\""):
        TrainState.create(Scale(dtype=jnp.bfloat16), OPTIMIZER, jax.random.key(0))
    with pytest.raises(UsageError, match="the weight scale is bfloat16"):
        half = Scale(dtype=jnp.bfloat16)
        DistillState.create(
            Scale(), OPTIMIZER, jax.random.key(0), critic=half, critic_optimizer=OPTIMIZER
        )
    with pytest.raises(ValueError, match="give critic and critic_optimizer together"):
        DistillState.create(Scale(), OPTIMIZER, jax.random.key(0), critic=Scale())


def test_trainable():
    model = {"blocks": {"core": jnp.ones(1), "q": jnp.ones(1)}, "head": jnp.ones(1)}
    assert trainable(model) == {"blocks": {"core": True, "q": True}, "head": True}
    assert trainable(model, r"blocks\.co.*") == {
        "blocks": {"core": True, "q": False},
        "head": False,
    }
    with pytest.raises(UsageError, match="no weight matches 'core'"):  # whole names
        trainable(model, "core")


# -- moving average --------------------------------------------------------------------------------


def averaged(config, values):
    """EMA of weights that take these values, starting from another one."""
    ema = {"w": jnp.float32(7.0)}
    for n, value in enumerate(values):
        ema = ema_update(ema, {"w": jnp.asarray(value, jnp.bfloat16)}, jnp.int32(n), config)
    return ema["w"]


def test_power_average_in_closed_form():
    """Weights of value n at update n: the average is sum n ((n+1)^(g+1) - n^(g+1)) / N^(g+1); the
    first update forgets the start."""
    config, count = EMAConfig(width=0.1), 200
    power = config.exponent + 1
    n = np.arange(count, dtype=np.float64)
    expected = (n * ((n + 1) ** power - n**power)).sum() / count**power
    got = averaged(config, n)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_exponents_have_their_widths():
    """The width is the standard deviation of t^g on [0, 1]: (g+1)^(1/2) (g+2)^-1 (g+3)^(-1/2)."""
    for width in (0.05, 0.1, 0.2, 0.27):
        g = EMAConfig(width=width).exponent
        np.testing.assert_allclose(np.sqrt((g + 1) / (g + 3)) / (g + 2), width, rtol=1e-9)
        assert g > 0
    np.testing.assert_allclose(EMAConfig(width=0.05).exponent, 16.97, atol=0.01)


def test_constant_average():
    np.testing.assert_allclose(averaged(EMAConfig(decay=0.5), [1.0, 2.0]), 7 / 4 + 1 / 4 + 2 / 2)
    for message, wrong in {"width is 0.3": {"width": 0.3}, "decay is 1.0": {"decay": 1.0}}.items():
        with pytest.raises(ValueError, match=message):
            EMAConfig(**wrong)


# -- guidance --------------------------------------------------------------------------------------


def batch(b=2):
    return Batch(
        jnp.ones((b, 1, 1, 1, 3)),
        jnp.arange(b, dtype=jnp.float32)[:, None, None] * jnp.ones((b, 4, 5)),
    )


def test_guidance_acts_once_on_the_velocity():
    x, timestep = batch().latents, jnp.ones(2)
    run = lambda guidance, negative: parts.guided_teacher(
        Teacher(Scale(), negative), batch(), guidance
    )(x, timestep)[:, 0, 0, 0, 0]
    np.testing.assert_allclose(
        run(5.0, jnp.full((4, 5), 3.0)), 2 * (3 + 5 * (np.array([0, 1]) - 3.0))
    )
    np.testing.assert_allclose(run(1.0, None), [0, 2])


def test_guidance_without_a_negative_prompt_is_refused():
    with pytest.raises(
        UsageError,
        match=(
            "guidance 5 needs the embedding of the negative prompt and there is none\n.*silently do"
            " nothing"
        ),
    ):
        parts.guided_teacher(Teacher(Scale()), batch(), 5.0)
    with pytest.raises(
        UsageError,
        match=r"negative embedding has shape \(3, 5\)\neach sample's text has shape \(4, 5\)",
    ):
        parts.guided_teacher(Teacher(Scale(), jnp.ones((3, 5))), batch(), 5.0)


# -- parts of a step -------------------------------------------------------------------------------


def test_keys_differ_by_name_and_step_and_are_repeatable():
    state = TrainState.create(Scale(), OPTIMIZER, jax.random.key(3))
    data = lambda s: [
        tuple(jax.random.key_data(k).tolist()) for k in parts.named_keys(s, "a", "b").values()
    ]
    later = dataclasses.replace(state, step=jnp.int32(1))
    assert data(state) == data(state) and len({*data(state), *data(later)}) == 4


def test_microbatches_give_the_mean_and_every_sample_in_order():
    values = jnp.arange(6.0)
    gradient = lambda part: ({"w": part.mean() * jnp.ones(2)}, {"value": part, "ok": part > 2})
    for n in (1, 2, 3, 6):
        grads, samples = jax.jit(lambda v, n=n: parts.accumulated(gradient, v, n))(values)
        np.testing.assert_allclose(grads["w"], 2.5)
        np.testing.assert_array_equal(samples["value"], values)
    summary = parts.summary(samples)
    assert {k: float(v) for k, v in summary.items()} == {"value": 4.0, "bad_samples": 3.0}
    assert np.isnan(parts.summary({"value": values, "ok": values > 9})["value"])
    with pytest.raises(
        UsageError,
        match="a batch of 6 cannot be divided into 4 microbatches\n.*\nuse 2, or a batch of 8",
    ):
        parts.accumulated(gradient, values, 4)


def test_update_counts_bad_entries():
    model = Scale()
    grads = jax.tree.map(lambda x: jnp.array([jnp.nan, 3.0, jnp.inf]), model)
    after, _, metrics = parts.apply(OPTIMIZER, grads, OPTIMIZER.init(model), model)
    assert float(metrics["bad_gradients"]) == 2 and float(metrics["grad_norm"]) == 3.0
    assert np.isfinite(after.scale[...]).all()


# -- times -----------------------------------------------------------------------------------------


def test_times_have_their_distributions(key):
    """Quantiles of 100,000 draws; the standard error of the median is 0.003."""
    levels = np.array([0.1, 0.5, 0.9])
    s = UniformShift(shift=5.0).draw(key, (100_000,))
    assert s.dtype == jnp.float32 and np.isfinite(s).all()
    np.testing.assert_allclose(
        np.quantile(flow.from_log_sigma(s).u, levels), flow.shift(levels, 5.0), atol=0.01
    )
    s = LogNormal(mean=0.7, deviation=1.6).draw(key, (100_000,))
    assert s.dtype == jnp.float32
    np.testing.assert_allclose(
        np.quantile(s, levels), 0.7 + 1.6 * np.array([-1.28155, 0, 1.28155]), atol=0.03
    )
    for wrong in (
        lambda: UniformShift(shift=0.0),
        lambda: LogNormal(deviation=0.0),
        lambda: LogNormal(mean=np.nan),
    ):
        with pytest.raises(ValueError, match="positive"):
            wrong()
