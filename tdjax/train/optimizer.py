"""AdamW as the published runs used it: short linear warm-up, no clipping, gradient entries that are
not finite count as zero."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import optax

from tdjax.train.state import trainable

DECAY = ("constant", "linear", "cosine")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The defaults are those of the student of rCM at 1.3B (NVlabs/rcm rcm/configs)."""

    learning_rate: float = 2e-6
    b1: float = 0.0
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01  # on every trained weight
    warmup: int = 100  # updates over which the learning rate rises
    start: float = 1e-6  # its factor at the first update
    decay: str = "constant"  # or linear, cosine
    steps: int | None = None  # updates until the decay ends
    decay_from: float = (
        2 / 3
    )  # share of the steps after which the linear decay begins; the cosine follows the warm-up at once
    final: float = 0.0  # factor of the learning rate at the end of the decay
    clip: float | None = None  # greatest norm of the gradient
    train: str = (
        ".*"  # pattern of whole weight names; the others keep their values and have no moments
    )

    def __post_init__(self):
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(
                f"OptimizerConfig.learning_rate is {self.learning_rate}; it must be positive and"
                " finite"
            )
        if not (0 <= self.b1 < 1 and 0 <= self.b2 < 1):
            raise ValueError(
                f"OptimizerConfig: b1 {self.b1} and b2 {self.b2} must be at least 0 and less than 1"
            )
        for name in ("eps", "weight_decay", "warmup", "start", "final"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(
                    f"OptimizerConfig.{name} is {getattr(self, name)}; it must not be negative"
                )
        if self.decay not in DECAY:
            raise ValueError(
                f"OptimizerConfig.decay is {self.decay!r}; allowed: {', '.join(DECAY)}"
            )
        if (self.decay == "constant") != (self.steps is None):
            raise ValueError(
                f"OptimizerConfig: decay {self.decay!r} with steps {self.steps}; only a decay has"
                " steps"
            )
        if self.steps is not None and self.warmup >= self.steps:
            raise ValueError(
                f"OptimizerConfig: warmup {self.warmup} must be less than steps {self.steps}"
            )
        if not 0 <= self.decay_from < 1:
            raise ValueError(
                f"OptimizerConfig.decay_from is {self.decay_from}; it is a share of the steps, at"
                " least 0 and less than 1"
            )
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"OptimizerConfig.clip is {self.clip}; it must be positive, or None")


SLA = OptimizerConfig(learning_rate=1e-5, b1=0.9)
STUDENT_1_3B = OptimizerConfig()
CRITIC_1_3B = OptimizerConfig(learning_rate=4e-7)
STUDENT_14B = OptimizerConfig(learning_rate=1e-6)
CRITIC_14B = OptimizerConfig(learning_rate=1e-7)


def learning_rate(config: OptimizerConfig) -> optax.Schedule:
    """The learning rate of update 0, 1, ... as a function."""
    rate, warmup = config.learning_rate, config.warmup
    after = optax.constant_schedule(rate)  # counts from the end of the warm-up
    if config.decay == "linear":
        begin = max(int(config.decay_from * config.steps), warmup)
        after = optax.linear_schedule(
            rate, config.final * rate, config.steps - begin, begin - warmup
        )
    if config.decay == "cosine":
        after = optax.cosine_decay_schedule(rate, config.steps - warmup, config.final)
    return (
        optax.join_schedules(
            [optax.linear_schedule(config.start * rate, rate, warmup), after], [warmup]
        )
        if warmup
        else after
    )


def zero_bad() -> optax.GradientTransformation:
    """NaN and infinite entries become zero, the others stay."""
    return optax.stateless(
        lambda grads, _: jax.tree.map(lambda g: jnp.where(jnp.isfinite(g), g, 0), grads)
    )


def adam(config: OptimizerConfig) -> optax.GradientTransformation:
    """Adam's direction; without momentum (b1 = 0) no first moment is stored."""
    if config.b1 == 0:
        return optax.scale_by_rms(config.b2, config.eps, eps_in_sqrt=False, bias_correction=True)
    return optax.scale_by_adam(config.b1, config.b2, config.eps)


def adamw(config: OptimizerConfig) -> optax.GradientTransformation:
    """The whole chain; weight decay on every trained leaf."""
    chain = optax.chain(
        zero_bad(),
        optax.clip_by_global_norm(config.clip) if config.clip else optax.identity(),
        adam(config),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(learning_rate(config)),
    )
    if config.train == ".*":
        return chain
    labels = lambda model: jax.tree.map(
        lambda chosen: "train" if chosen else "keep", trainable(model, config.train)
    )
    return optax.partition({"train": chain, "keep": optax.set_to_zero()}, labels)
