"""Modules as shapes: what a checkpoint has to fill, and what a program is compiled for."""

from __future__ import annotations

import functools

import jax
from flax import nnx


@functools.cache
def as_shapes(module: type[nnx.Module], cfg):
    """Returns the module of a class and config with shapes in place of arrays; nothing is
    allocated."""
    return jax.eval_shape(lambda: module(cfg, rngs=_OneKey()))


class _OneKey:
    """In place of nnx.Rngs where numbers do not matter: making a key for every layer takes longer
    than the rest of a constructor."""

    def params(self):
        return jax.random.key(0)
