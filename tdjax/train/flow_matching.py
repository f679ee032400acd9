"""Flow matching: the velocity eps - x0 at a random time, with the caption sometimes replaced so
that guidance has a partner. The image of image-to-video stays: both halves of guidance see it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange, reduce

from tdjax.sampling import flow
from tdjax.sampling.few_step import Velocity
from tdjax.train.configs import FlowMatchingConfig
from tdjax.train.ema import ema_update
from tdjax.train.step import (
    accumulated,
    apply,
    conditioned,
    drawn,
    keep,
    negative_text,
    network,
    normal,
    sample_keys,
    summary,
    whole,
)


def distance(network: Velocity, target: Callable, latents, eps, s):
    """Returns the mean square of network - target over each sample, both at x_u of (latents, eps,
    log sigma s f32[b]), as (f32[b], ok bool[b]).

    target: (x, timestep) -> v; it has no gradient. A sample that is not finite counts as zero.
    """
    c = flow.from_log_sigma(s)
    x = flow.noisy(latents, eps, flow.per_sample(c))
    timestep = flow.TIME_SCALE * c.u
    wanted = jax.lax.stop_gradient(target(x, timestep))
    ok = whole(x, wanted)
    v = network(keep(ok, x), timestep)  # a network that never sees a NaN has none in its gradient
    ok = ok & whole(v)
    return reduce(jnp.square(keep(ok, v - wanted)), "b t h w c -> b", "mean"), ok


def flow_matching_loss(network: Velocity, latents, eps, s):
    """Returns the mean square of v - (eps - x0) over each sample, as (f32[b], ok bool[b]); latents
    and eps f32[b t h w c], log sigma s f32[b]."""
    return distance(network, lambda x, timestep: eps - latents, latents, eps, s)


def drop_captions(text, negative, dropped):  # text, negative [b s d], dropped bool[b]
    """Returns the text with the negative embedding where a caption is dropped."""
    return jnp.where(rearrange(dropped, "b -> b 1 1"), negative, text)


def make_step(config: FlowMatchingConfig, optimizer) -> Callable:
    """Returns step(state, teacher, batch) -> (state, metrics). Of the teacher only the negative
    embedding is used, for dropout, and the base of a network that is trained in part."""

    def step(state, teacher, batch):
        latents = batch.latents.astype(jnp.float32)
        keys = sample_keys(state, len(latents), "noise", "time", "drop")
        if config.dropout:
            dropped = jax.vmap(lambda key: jax.random.bernoulli(key, config.dropout))(keys["drop"])
            negative = negative_text(teacher, batch.text, "caption dropout")
            batch = dataclasses.replace(batch, text=drop_captions(batch.text, negative, dropped))

        def loss(model, batch, keys):
            trained = conditioned(network(model, teacher), batch)
            values, ok = flow_matching_loss(
                trained, batch.latents, *noise_and_time(config, keys, batch)
            )
            return values.mean(), {"loss": values, "ok": ok}

        batch = dataclasses.replace(batch, latents=latents)
        return finish(config, optimizer, state, loss, (batch, keys))

    return step


def noise_and_time(config, keys: dict, batch):
    """Returns (noise, log sigma f32[b]) for the latents of a microbatch, at times of the config."""
    within = (config.time_from, config.time_to)
    noise = normal(keys["noise"], batch.latents.shape[1:])
    return noise, drawn(config.time, keys["time"], within=within)


def finish(config, optimizer, state, loss: Callable, arrays):
    """Returns (state, metrics) after the rest of a step with one network: gradient of
    loss(model, *arrays), update, average."""
    gradient = lambda part: jax.grad(loss, has_aux=True)(state.model, *part)
    grads, samples = accumulated(gradient, arrays, config.accumulate)
    model, opt, metrics = apply(optimizer, grads, state.opt, state.model)
    ema = ema_update(state.ema, model, state.step, config.ema)
    state = dataclasses.replace(state, step=state.step + 1, model=model, ema=ema, opt=opt)
    return state, summary(samples) | metrics
