"""Sparse attention towards its dense self, through the video transformer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import put
from dit_cases import TINY, clip, dit, jit, network, norm

from tdjax.train import sla
from tdjax.train.configs import (
    OptimizerConfig,
    SLATrainingConfig,
)
from tdjax.train.optimizer import adamw
from tdjax.train.state import Teacher, TrainState


@pytest.mark.slow
def test_white_box_loss_is_the_distance_to_dense_attention():
    """Nothing for itself, nothing but rounding when every block is chosen, more when one of three
    is."""
    data = clip(3, 16, 16)  # 192 tokens
    eps, s = (
        put(np.random.default_rng(4).normal(size=data.latents.shape), jnp.float32),
        put([0.3, 1.9]),
    )
    dense = lambda x, timestep: network(dit(), x, timestep, data.text)

    def loss(**own):
        model = dit(attention="sla", sla=dataclasses.replace(TINY.sla, **own))
        student = lambda x, timestep: network(model, x, timestep, data.text)
        return [
            sla.white_box_loss(student, other, data.latents, eps, s)[0]
            for other in (student, dense)
        ]

    same, rounding = loss(topk=1.0)
    assert (np.asarray(same) == 0).all() and (np.asarray(rounding) < 1e-10).all()
    same, sparse = loss(topk=0.34)
    assert (np.asarray(same) == 0).all() and (np.asarray(sparse) > 1e-5).all()


@pytest.mark.slow
def test_sla_step_brings_the_student_to_the_teacher():
    data, optimizer = (
        clip(3, 16, 16, 1),
        adamw(OptimizerConfig(learning_rate=3e-4, b1=0.9, warmup=0)),
    )
    step = jit(sla.make_step(SLATrainingConfig(), optimizer), donate_argnums=0)
    create = jit(lambda model: TrainState.create(model, optimizer, jax.random.key(0)))
    state = create(dit(attention="sla"))
    losses = []
    for _ in range(10):
        state = dataclasses.replace(state, step=jnp.int32(0))  # the same noise and times
        state, metrics = step(state, Teacher(dit()), data)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.7 * losses[0]
    assert (
        norm(state.model.blocks.self_attn.core.proj.kernel[...]) > 0
    )  # the linear branch has begun to learn
