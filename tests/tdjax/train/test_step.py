"""Guidance, keys, microbatches, the update, and samples that do not count."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import put
from dit_cases import channels_last, inputs, jit, load
from flax import nnx
from tolerances import assert_close

from tdjax.errors import UsageError
from tdjax.train import step as parts
from tdjax.train.configs import OptimizerConfig
from tdjax.train.optimizer import adamw
from tdjax.train.state import Batch, Teacher, TrainState


class Scale(nnx.Module):
    """Velocity: a multiple of x and of the mean of the text."""

    def __init__(self, value=2.0, dtype=jnp.float32):
        self.scale = nnx.Param(jnp.full((3,), value, dtype))

    def __call__(self, x, timestep, text, image=None):
        return x * self.scale[...] * text.mean((1, 2))[:, None, None, None, None]


OPTIMIZER = adamw(OptimizerConfig(learning_rate=0.1))


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


@pytest.mark.slow
def test_an_image_and_its_features_are_given_to_both_halves_of_guidance(golden):
    """The network of Wan2.1 image-to-video gives the official numbers, and its guided velocity is
    that of two calls which differ by the text."""
    g = golden("dit_i2v21_tiny")
    model, (x, timestep, text, image, features) = load(g), inputs(g)
    negative = put(np.random.default_rng(1).normal(size=text.shape[1:]), jnp.float32)
    batch = Batch(x, text, image, features)

    @jit
    def velocities(model):
        teacher = parts.guided_teacher(Teacher(model, negative), batch, 3.0)
        below = model(x, timestep, jnp.broadcast_to(negative, text.shape), image, features)
        return parts.conditioned(model, batch)(x, timestep), teacher(x, timestep), below

    v, guided, below = velocities(model)
    assert_close(v, channels_last(g["out/v"]), "dit")
    assert_close(guided, below + 3 * (v - below), "float32")


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


@pytest.mark.slow
def test_update_counts_bad_entries():
    model = Scale()
    grads = jax.tree.map(lambda x: put([jnp.nan, 3.0, jnp.inf]), model)
    after, _, metrics = parts.apply(OPTIMIZER, grads, OPTIMIZER.init(model), model)
    assert float(metrics["bad_gradients"]) == 2 and float(metrics["grad_norm"]) == 3.0
    assert np.isfinite(after.scale[...]).all()
