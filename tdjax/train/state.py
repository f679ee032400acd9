"""What training carries, and the parts that every step shares: named keys, microbatches, the
update, the moving average."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from einops import rearrange
from jax import lax

from tdjax.errors import UsageError
from tdjax.parallel.sharding import constrain, leaf_name
from tdjax.sampling.few_step import Velocity, guided


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """latents f32[b t h w c] (normalised, as the VAE gives them), text [b s d], image [b t h w 20]
    or None."""

    latents: jax.Array | np.ndarray
    text: jax.Array | np.ndarray
    image: jax.Array | np.ndarray | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Teacher:
    """A frozen model (None for flow matching) and the embedding [s d] of its negative prompt (None
    where there is no guidance)."""

    model: Any
    negative: jax.Array | np.ndarray | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Of one trained model. step int32[]; ema, shaped like the model, float32; key never changes,
    each step folds its number in."""

    step: jax.Array
    model: Any
    ema: Any
    opt: Any
    key: jax.Array

    @classmethod
    def create(cls, model, optimizer: optax.GradientTransformation, key) -> TrainState:
        """Step 0 from float32 weights. Arrays are copied, so that the state may be donated while
        `model` is kept.

        Raises UsageError for a weight that is not float32.
        """
        check(model)
        return cls(
            step=jnp.int32(0),
            model=copy(model),
            ema=copy(model),
            opt=optimizer.init(model),
            key=jnp.array(key),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DistillState:
    """Of a student and its critic (the fake score); step counts the turns of both. critic is None
    for pure consistency."""

    step: jax.Array
    model: Any
    ema: Any
    opt: Any
    critic: Any
    critic_opt: Any
    key: jax.Array

    @classmethod
    def create(cls, model, optimizer, key, *, critic=None, critic_optimizer=None) -> DistillState:
        """Step 0. model and critic are usually both the teacher; arrays are copied.

        Raises UsageError for a weight that is not float32, ValueError for a critic without its
            optimizer or the reverse.
        """
        if (critic is None) != (critic_optimizer is None):
            raise ValueError(
                "DistillState.create: give critic and critic_optimizer together, or neither"
            )
        start = TrainState.create(model, optimizer, key)
        kept = {field.name: getattr(start, field.name) for field in dataclasses.fields(start)}
        if critic is None:
            return cls(**kept, critic=None, critic_opt=None)
        check(critic)
        return cls(**kept, critic=copy(critic), critic_opt=critic_optimizer.init(critic))


def copy(model):
    return jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), model)


def check(model):
    """Raise UsageError unless every leaf is float32: updates of a millionth vanish in anything
    narrower."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(model):
        if leaf.dtype != jnp.float32:
            raise UsageError(
                f"the weight {leaf_name(path)} is {leaf.dtype}",
                "training updates float32 weights; only their use may be narrower (Policy.compute)",
                'load the model with Policy(param="float32", compute="bfloat16"), and without int8'
                " layers",
            )


def trainable(model, pattern: str = ".*"):
    """Booleans in the shape of the model: the leaves whose whole name (`sharding.leaf_name`)
    matches the pattern.

    Raises UsageError if none does.
    """
    mask = jax.tree_util.tree_map_with_path(
        lambda path, _: re.fullmatch(pattern, leaf_name(path)) is not None, model
    )
    if not any(jax.tree.leaves(mask)):
        names = ", ".join(leaf_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(model))
        raise UsageError(
            f"no weight matches {pattern!r}",
            f"the weights are {names}",
            r'use e.g. ".*" or ".*self_attn\.core\.proj\..*"',
        )
    return mask


# -- moving average --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class EMAConfig:
    """Moving average of weights: by powers of the number of updates (arXiv 2312.02696), or with a
    constant decay."""

    width: float = 0.1  # relative length of the average by powers
    decay: float | None = None  # a constant decay instead

    def __post_init__(self):
        if not 0 < self.width < 0.28:  # from 1/sqrt(12) on, no positive exponent has this width
            raise ValueError(
                f"EMAConfig.width is {self.width}; allowed: greater than 0, less than 0.28"
                " (published: 0.1)"
            )
        if self.decay is not None and not 0 <= self.decay < 1:
            raise ValueError(
                f"EMAConfig.decay is {self.decay}; allowed: 0 up to, but not including, 1"
            )

    @property
    def exponent(self) -> float:
        """gamma of the power function whose relative width this is."""
        roots = np.roots([1.0, 7.0, 16.0 - self.width**-2, 12.0 - self.width**-2])
        return float(roots[np.isreal(roots)].real.max())

    def beta(self, n):
        """Share of the old average at update n = 0, 1, ...; f32."""
        if self.decay is not None:
            return jnp.float32(self.decay)
        n = jnp.asarray(n, jnp.float32)
        return jnp.exp((self.exponent + 1.0) * jnp.log1p(-1.0 / (n + 1.0)))


def ema_update(ema, model, step, config: EMAConfig):
    """The float32 average after update `step` (int32[], counted from 0) has given `model`; leaf by
    leaf, in the shapes of `ema`."""
    beta = config.beta(step)
    return jax.tree.map(
        lambda old, new: new.astype(jnp.float32) + beta * (old - new.astype(jnp.float32)),
        ema,
        model,
    )


# -- networks as velocities ------------------------------------------------------------------------


def velocity(model, text, image=None) -> Velocity:
    """A model with its conditioning, text [b s d] and image [b t h w 20] or None, as the (x,
    timestep) -> v f32[b t h w c] of losses."""
    return lambda x, timestep: model(x, timestep, text, image).astype(jnp.float32)


def negative_text(teacher: Teacher | None, text, purpose: str):
    """The negative embedding for every sample, [b s d]; UsageError where it is missing or of
    another shape."""
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
    """The teacher's velocity (x f32[b t h w c], timestep f32[b]) -> v of a batch with
    classifier-free guidance; 1 means none.

    Raises UsageError where guidance needs the negative embedding and it is missing, or of another
        shape than a sample's text.
    """
    positive = velocity(teacher.model, batch.text, batch.image)
    if guidance == 1.0:
        return positive
    negative = negative_text(teacher, batch.text, f"guidance {guidance:g}")
    return guided(positive, velocity(teacher.model, negative, batch.image), guidance)


# -- parts of a step -------------------------------------------------------------------------------


def check_accumulate(config):
    if config.accumulate < 1:
        raise ValueError(
            f"{type(config).__name__}.accumulate is {config.accumulate}; it must be at least 1"
        )


def named_keys(state, *names: str) -> dict[str, jax.Array]:
    """The random keys of this step."""
    return dict(
        zip(
            names,
            jax.random.split(jax.random.fold_in(state.key, state.step), len(names)),
            strict=True,
        )
    )


def normal(key, shape: tuple[int, ...]) -> jax.Array:
    """Noise f32[b ...], each device making that of its samples."""
    return constrain(jax.random.normal(key, shape), "batch")


def accumulated(gradient: Callable, arrays, accumulate: int):
    """gradient(arrays) -> (gradients of a mean over samples, values of each sample), computed in
    `accumulate` microbatches.

    Every array has the batch axis first. Microbatch i takes samples i, i + accumulate, ...: so a
    batch that is laid over devices stays so.
    """
    if accumulate == 1:
        return gradient(arrays)
    size = jax.tree.leaves(arrays)[0].shape[0]
    if size % accumulate:
        raise UsageError(
            f"a batch of {size} cannot be divided into {accumulate} microbatches",
            "accumulate must divide the batch size",
            f"use {math.gcd(size, accumulate)}, or a batch of"
            f" {-(-size // accumulate) * accumulate}",
        )
    parts = jax.tree.map(lambda x: rearrange(x, "(b a) ... -> a b ...", a=accumulate), arrays)
    shapes = jax.eval_shape(gradient, jax.tree.map(lambda x: x[0], parts))[0]
    zeros = jax.tree.map(lambda g: jnp.zeros(g.shape, g.dtype), shapes)

    def add(total, part):
        grads, samples = gradient(part)
        return jax.tree.map(jnp.add, total, grads), samples

    total, samples = lax.scan(add, zeros, parts)
    return jax.tree.map(lambda g: g / accumulate, total), jax.tree.map(
        lambda x: rearrange(x, "a b ... -> (b a) ..."), samples
    )


def apply(optimizer: optax.GradientTransformation, grads, opt, model):
    """One update -> (model, opt, metrics); the norm is that of the finite entries."""
    bad = sum(jnp.sum(~jnp.isfinite(g), dtype=jnp.float32) for g in jax.tree.leaves(grads))
    norm = optax.tree.norm(jax.tree.map(lambda g: jnp.where(jnp.isfinite(g), g, 0), grads))
    with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes in its schedules
        updates, opt = optimizer.update(grads, opt, model)
        model = optax.apply_updates(model, updates)
    return model, opt, {"grad_norm": norm, "bad_gradients": bad}


def whole(*arrays):
    """bool[b]: every entry of a sample is finite in every array [b ...]."""
    return jnp.stack([jnp.isfinite(x).all(tuple(range(1, x.ndim))) for x in arrays]).all(0)


def keep(ok, x):
    """x [b ...] with zeros in the samples that are not ok bool[b]."""
    return jnp.where(ok.reshape(ok.shape + (1,) * (x.ndim - 1)), x, 0)


def summary(samples: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Metrics of a batch from values of its samples: means over those that are ok (NaN if none is),
    and how many are not."""
    ok = samples["ok"]
    means = {
        name: keep(ok, x).sum() / ok.sum(dtype=jnp.float32)
        for name, x in samples.items()
        if name != "ok"
    }
    return means | {"bad_samples": (~ok).sum(dtype=jnp.float32)}
