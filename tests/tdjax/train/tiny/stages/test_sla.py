"""Sparse attention follows the teacher."""

import jax
import numpy as np
import pytest
import tiny_cases
from tolerances import assert_close

from tdjax.models.wan_dit import DiT
from tdjax.train.configs import OptimizerConfig, SLATrainingConfig
from tdjax.train.optimizer import adamw
from tdjax.train.state import TrainState
from tdjax.train.tiny.stages import sla


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return tiny_cases.tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def some(tokens):
    return tiny_cases.shades(tokens)


@pytest.fixture(scope="module")
def text():
    return tiny_cases.text()


@pytest.mark.slow
def test_sparse_attention_follows_the_teacher(some, text):
    """Latents of three frames of 16 tokens are one block: its linear branch alone differs, and
    begins at nothing."""
    optimizer = adamw(OptimizerConfig(learning_rate=1e-3, b1=0.9, warmup=0))
    dense = tiny_cases.dit()
    student = sla.sparse(dense, tiny_cases.SLA, "float32")
    x = np.random.default_rng(0).normal(size=(1, 3, 4, 4, 8)).astype(np.float32)
    inputs, run = (
        (x, np.float32([500]), np.zeros((1, 32, 16), np.float32)),
        tiny_cases.jit(DiT.__call__),
    )
    assert_close(run(student, *inputs), run(dense, *inputs), "float32")
    start = tiny_cases.dit(seed=4)
    create = lambda model: TrainState.create(model, optimizer, jax.random.key(1))
    state = tiny_cases.jit(create)(sla.sparse(start, tiny_cases.SLA, "float32"))
    program = tiny_cases.repeated(sla.make_step(SLATrainingConfig(), optimizer, 8), 20)
    state, numbers = program(state, some, dense, text)
    losses = np.asarray(numbers["loss"])
    assert losses[-5:].mean() < 0.7 * losses[:5].mean()
