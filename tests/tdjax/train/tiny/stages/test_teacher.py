"""The teacher and its text encoder learn together."""

import jax
import numpy as np
import pytest
import tiny_cases
from flax import nnx

from tdjax.train.state import TrainState
from tdjax.train.tiny import settings
from tdjax.train.tiny.data import encoded
from tdjax.train.tiny.stages import teacher


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return tiny_cases.tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def some(tokens):
    return tiny_cases.shades(tokens)


@pytest.mark.slow
def test_the_teacher_learns(some, tokens):
    cfg = settings.TeacherStage(
        steps=60, batch=16, learning_rate=3e-3, text_rate=3e-3, warmup=5, compute="float32", ema=0.9
    )
    optimizer = teacher.make_optimizer(cfg)
    model = tiny_cases.jit(
        lambda key: teacher.Captioned(tiny_cases.DIT, tiny_cases.TEXT, rngs=nnx.Rngs(key))
    )(jax.random.key(0))
    state = TrainState.create(model, optimizer, jax.random.key(1))
    program, negative = (
        tiny_cases.repeated(teacher.make_step(cfg, optimizer), 60),
        encoded.negative(tokens),
    )
    before = np.asarray(model.text.embed.embedding[...])
    state, numbers = program(state, some, negative)
    losses = np.asarray(numbers["loss"])
    assert losses[-10:].mean() < 0.6 * losses[:5].mean() and int(state.step) == 60
    assert (
        np.abs(np.asarray(state.model.text.embed.embedding[...]) - before).max() > 1e-3
    )  # the text encoder learns too
