"""States that share no array, and refuse what cannot be trained."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from tdjax.errors import UsageError
from tdjax.train.configs import OptimizerConfig
from tdjax.train.optimizer import adamw
from tdjax.train.state import DistillState, TrainState


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
