"""AdamW as the published runs used it: short linear warm-up, no clipping, gradient entries that are
not finite count as zero."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from tdjax.train.configs import OptimizerConfig


def learning_rate(config: OptimizerConfig) -> optax.Schedule:
    """Returns the learning rate of update 0, 1, ... as a function."""
    rate, warmup = config.learning_rate, config.warmup
    after = optax.constant_schedule(rate)  # counts from the end of the warm-up
    if config.decay == "linear":
        begin = max(int(config.decay_from * config.steps), warmup)
        after = optax.linear_schedule(
            rate, config.final * rate, config.steps - begin, begin - warmup
        )
    if config.decay == "cosine":
        after = optax.cosine_decay_schedule(rate, config.steps - warmup, config.final)
    if not warmup:
        return after
    rising = optax.linear_schedule(config.start * rate, rate, warmup)
    return optax.join_schedules([rising, after], [warmup])


def adamw(config: OptimizerConfig) -> optax.GradientTransformation:
    """Returns the whole chain; weight decay on every leaf. `config.train` is no matter of the
    optimizer: what is not trained is not in the model that it updates (`partial.Trained`)."""
    return optax.chain(
        _zero_bad(),
        optax.clip_by_global_norm(config.clip) if config.clip else optax.identity(),
        _adam(config),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(learning_rate(config)),
    )


def _zero_bad() -> optax.GradientTransformation:
    """NaN and infinite entries become zero, the others stay."""
    return optax.stateless(
        lambda grads, _: jax.tree.map(lambda g: jnp.where(jnp.isfinite(g), g, 0), grads)
    )


def _adam(config: OptimizerConfig) -> optax.GradientTransformation:
    """Adam's direction; without momentum (b1 = 0) no first moment is stored."""
    if config.b1 == 0:
        return optax.scale_by_rms(config.b2, config.eps, eps_in_sqrt=False, bias_correction=True)
    return optax.scale_by_adam(config.b1, config.b2, config.eps)
