"""Fine-tuning a model whose dense attention was replaced by sparse-linear attention (arXiv
2509.24006).

White box: towards the dense model's velocity at the same noisy latents. Black box: flow matching on
data like the model's own. The student is built with attention "sla" (blocks of 64 x 64 in the
published runs), the teacher with "dense".
Source: thu-ml/TurboDiffusion turbodiffusion/rcm/models/t2v_model_sla.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp

from tdjax.sampling.few_step import Velocity
from tdjax.train.configs import SLATrainingConfig
from tdjax.train.flow_matching import distance, finish, flow_matching_loss, noise_and_time
from tdjax.train.step import conditioned, network, sample_keys


def white_box_loss(student: Velocity, teacher: Velocity, latents, eps, s):
    """Returns the mean square of v_student - v_teacher at the same x_u, without guidance or a
    weight of time, as (f32[b], ok bool[b]).

    latents and eps f32[b t h w c], log sigma s f32[b].
    """
    return distance(student, teacher, latents, eps, s)


def make_step(config: SLATrainingConfig, optimizer) -> Callable:
    """Returns step(state, teacher, batch) -> (state, metrics)."""

    def step(state, teacher, batch):
        latents = batch.latents.astype(jnp.float32)
        keys = sample_keys(state, len(latents), "noise", "time")

        def loss(model, batch, keys):
            student = conditioned(network(model, teacher), batch)
            draws = noise_and_time(config, keys, batch)
            if config.target == "data":
                values, ok = flow_matching_loss(student, batch.latents, *draws)
            else:
                values, ok = white_box_loss(
                    student, conditioned(teacher.model, batch), batch.latents, *draws
                )
            return values.mean(), {"loss": values, "ok": ok}

        return finish(
            config, optimizer, state, loss, (dataclasses.replace(batch, latents=latents), keys)
        )

    return step
