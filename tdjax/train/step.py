"""The parts that every training step shares: networks as velocities, guidance, named keys,
microbatches, the update, and the samples that do not count."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from einops import rearrange
from jax import lax

from tdjax.errors import UsageError
from tdjax.models.wan_dit import with_compute
from tdjax.parallel.sharding import constrain
from tdjax.sampling.few_step import Velocity, guided
from tdjax.train import times
from tdjax.train.partial import Trained
from tdjax.train.state import Batch, Teacher

# -- networks as velocities ------------------------------------------------------------------------


def velocity(model, text, image=None, features=None) -> Velocity:
    """Returns a model with its conditioning, text [b s d], image [b t h w 20] and features
    [b 257 1280] or None, as the (x, timestep) -> v f32[b t h w c] of losses."""
    more = () if features is None else (features,)  # networks of text and image know no other
    return lambda x, timestep: model(x, timestep, text, image, *more).astype(jnp.float32)


def conditioned(model, batch: Batch) -> Velocity:
    """Returns a model with the conditioning of a batch, as `velocity`."""
    return velocity(model, batch.text, batch.image, batch.features)


def network(model, teacher: Teacher | None, compute: str = "own"):
    """Returns a trained model as it is called: what is trained in part lies over its frozen base.
    compute: another dtype between its layers."""
    if isinstance(model, Trained):
        base = teacher.model if teacher.base is None else teacher.base
        return model.over(base, None if compute == "own" else compute)
    return model if compute == "own" else with_compute(model, compute)


def negative_text(teacher: Teacher | None, text, purpose: str):
    """Returns the negative embedding for every sample, [b s d].

    Raises UsageError, which names the purpose, where it is missing or of another shape.
    """
    negative = None if teacher is None else teacher.negative
    if negative is None:
        raise UsageError(
            f"{purpose} needs the embedding of the negative prompt and there is none",
            "with the prompt's own embedding in its place it would silently do nothing",
            "give Teacher(negative=...), text rows of the negative prompt (or of the empty one the"
            " teacher was trained with)",
        )
    if negative.shape != text.shape[1:]:
        raise UsageError(
            f"the negative embedding has shape {negative.shape}",
            f"each sample's text has shape {text.shape[1:]}; they must agree",
            "encode both with the same text length",
        )
    return jnp.broadcast_to(negative, text.shape).astype(text.dtype)


def guided_teacher(teacher: Teacher, batch: Batch, guidance: float) -> Velocity:
    """Returns the teacher's velocity (x f32[b t h w c], timestep f32[b]) -> v of a batch with
    classifier-free guidance; 1 means none. Both halves see the image and its features, as in Wan's
    image-to-video (Wan-Video/Wan2.1 wan/image2video.py).

    Raises UsageError where guidance needs the negative embedding and it is missing, or of another
    shape than a sample's text.
    """
    positive = conditioned(teacher.model, batch)
    if guidance == 1.0:
        return positive
    negative = negative_text(teacher, batch.text, f"guidance {guidance:g}")
    without = dataclasses.replace(batch, text=negative)
    return guided(positive, conditioned(teacher.model, without), guidance)


# -- from draws to the update ----------------------------------------------------------------------


def named_keys(state, *names: str) -> dict[str, jax.Array]:
    """Returns the random keys of this step by name."""
    keys = jax.random.split(jax.random.fold_in(state.key, state.step), len(names))
    return dict(zip(names, keys, strict=True))


def sample_keys(state, size: int, *names: str) -> dict[str, jax.Array]:
    """Returns the random keys of this step by name, one for each of `size` samples, keys[b]: what
    they give is drawn in the microbatch that needs it, and is the same however a batch is
    divided."""
    return {name: jax.random.split(key, size) for name, key in named_keys(state, *names).items()}


def normal(keys, shape: tuple[int, ...]) -> jax.Array:
    """Returns noise f32[b *shape] of keys[b], each device making that of its samples."""
    return constrain(jax.vmap(lambda key: jax.random.normal(key, shape))(keys), "batch")


def drawn(
    time, keys, shape: tuple[int, ...] = (), within: tuple[float, float] = (0.0, 1.0)
) -> jax.Array:
    """Returns log sigma f32[b *shape] of keys[b] from a distribution of times; within: see
    `times.draw`."""
    return jax.vmap(lambda key: times.draw(time, key, shape, within))(keys)


def check_parts(size: int, accumulate: int) -> None:
    """Raises UsageError unless a batch of `size` divides into `accumulate` microbatches."""
    if size % accumulate:
        larger = math.ceil(size / accumulate) * accumulate
        raise UsageError(
            f"a batch of {size} cannot be divided into {accumulate} microbatches",
            "accumulate must divide the batch size",
            f"use {math.gcd(size, accumulate)}, or a batch of {larger}",
        )


def accumulated(gradient: Callable, arrays, accumulate: int):
    """Returns gradient(arrays), (gradients of a mean over samples, values of each sample), computed
    in `accumulate` microbatches.

    Every array has the batch axis first. Microbatch i takes samples i, i + accumulate, ...: so a
    batch that is laid over devices stays so. Raises UsageError where `accumulate` does not divide
    the batch.
    """
    if accumulate == 1:
        return gradient(arrays)
    size = jax.tree.leaves(arrays)[0].shape[0]
    check_parts(size, accumulate)
    parts = jax.tree.map(lambda x: rearrange(x, "(b a) ... -> a b ...", a=accumulate), arrays)
    shapes = jax.eval_shape(gradient, jax.tree.map(lambda x: x[0], parts))[0]
    zeros = jax.tree.map(lambda g: jnp.zeros(g.shape, g.dtype), shapes)

    def add(total, part):
        grads, samples = gradient(part)
        return jax.tree.map(jnp.add, total, grads), samples

    total, samples = lax.scan(add, zeros, parts)
    grads = jax.tree.map(lambda g: g / accumulate, total)
    return grads, jax.tree.map(lambda x: rearrange(x, "a b ... -> (b a) ..."), samples)


def apply(optimizer: optax.GradientTransformation, grads, opt, model):
    """Returns (model, opt, metrics) after one update; the norm is that of the finite entries."""
    bad = sum(jnp.sum(~jnp.isfinite(g), dtype=jnp.float32) for g in jax.tree.leaves(grads))
    norm = optax.tree.norm(jax.tree.map(lambda g: jnp.where(jnp.isfinite(g), g, 0), grads))
    with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes in its schedules
        updates, opt = optimizer.update(grads, opt, model)
        model = optax.apply_updates(model, updates)
    return model, opt, {"grad_norm": norm, "bad_gradients": bad}


def whole(*arrays):
    """Returns bool[b]: every entry of a sample is finite in every array [b ...]."""
    return jnp.stack([jnp.isfinite(x).all(tuple(range(1, x.ndim))) for x in arrays]).all(0)


def keep(ok, x):
    """Returns x [b ...] with zeros in the samples that are not ok bool[b]."""
    return jnp.where(ok.reshape(ok.shape + (1,) * (x.ndim - 1)), x, 0)


def summary(samples: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Returns metrics of a batch from values of its samples: means over those that are ok (NaN if
    none is), and how many are not."""
    ok = samples["ok"]
    means = {
        name: keep(ok, x).sum() / ok.sum(dtype=jnp.float32)
        for name, x in samples.items()
        if name != "ok"
    }
    return means | {"bad_samples": (~ok).sum(dtype=jnp.float32)}
