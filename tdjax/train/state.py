"""What training carries from step to step: a batch, a frozen teacher, and the states of one trained
network or of a student with its critic."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tdjax.errors import UsageError
from tdjax.parallel.sharding import leaf_name


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Samples: latents f32[b t h w c] (normalised, as the VAE gives them), text [b s d], image
    [b t h w 20] or None, features [b 257 1280] of CLIP or None."""

    latents: jax.Array | np.ndarray
    text: jax.Array | np.ndarray
    image: jax.Array | np.ndarray | None = None
    features: jax.Array | np.ndarray | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Teacher:
    """A frozen model (None for flow matching) and the embedding [s d] of its negative prompt (None
    where there is no guidance). base: the frozen part of networks that are trained in part, where
    it is not the model's (`partial.Trained`)."""

    model: Any
    negative: jax.Array | np.ndarray | None = None
    base: Any = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The state of one trained model. step int32[]; ema float32, shaped like the model; key never
    changes, each step folds its number in."""

    step: jax.Array
    model: Any
    ema: Any
    opt: Any
    key: jax.Array

    @classmethod
    def create(cls, model, optimizer: optax.GradientTransformation, key) -> TrainState:
        """Returns step 0 from float32 weights. Arrays are copied, so that the state may be donated
        while `model` is kept.

        Raises UsageError for a weight that is not float32.
        """
        _check(model)
        return cls(
            step=jnp.int32(0),
            model=_copy(model),
            ema=_copy(model),
            opt=optimizer.init(model),
            key=jnp.array(key),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DistillState:
    """The state of a student and its critic (the fake score); step counts the turns of both. critic
    is None for pure consistency."""

    step: jax.Array
    model: Any
    ema: Any
    opt: Any
    critic: Any
    critic_opt: Any
    key: jax.Array

    @classmethod
    def create(cls, model, optimizer, key, *, critic=None, critic_optimizer=None) -> DistillState:
        """Returns step 0. model and critic are usually both the teacher; arrays are copied.

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
        _check(critic)
        return cls(**kept, critic=_copy(critic), critic_opt=critic_optimizer.init(critic))


def _copy(model):
    return jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), model)


def _check(model) -> None:
    """Raises UsageError unless every leaf is float32: updates of a millionth vanish in anything
    narrower."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(model):
        if leaf.dtype != jnp.float32:
            raise UsageError(
                f"the weight {leaf_name(path)} is {leaf.dtype}",
                "training updates float32 weights; only their use may be narrower (Policy.compute)",
                'load the model with Policy(param="float32", compute="bfloat16"), and without int8'
                " layers",
            )
