"""Modules as shapes: what a checkpoint has to fill, and what a program is compiled for; and how
modules draw the weights that they begin with, of which shapes have none."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx


@functools.cache
def as_shapes(module: type[nnx.Module], cfg):
    """Returns the module of a class and config with shapes in place of arrays; nothing is
    allocated."""
    return jax.eval_shape(lambda: module(cfg, rngs=_NoNumbers()))


class _NoNumbers:
    """In place of nnx.Rngs where numbers do not matter: tracing how they are drawn would take
    longer than all else."""


def drawn(init: Callable, rngs: nnx.Rngs | _NoNumbers, shape: tuple[int, ...], dtype):
    """Returns init(key, shape, dtype) of the next key; zeros where numbers do not matter."""
    if isinstance(rngs, _NoNumbers):
        return jnp.zeros(shape, dtype)
    return init(rngs.params(), shape, dtype)


def stacked(make: Callable, count: int, rngs: nnx.Rngs | _NoNumbers):
    """Returns make(rngs) of `count` layers, each with numbers of its own, every leaf with a leading
    layer axis."""
    if isinstance(rngs, _NoNumbers):
        return jax.vmap(lambda _: make(rngs))(jnp.zeros(count))
    return jax.vmap(lambda key: make(nnx.Rngs(key)))(jax.random.split(rngs.params(), count))
