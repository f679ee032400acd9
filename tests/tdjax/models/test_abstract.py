"""Modules as shapes are the modules that are drawn, without their numbers."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from tiny_cases import DIT, TEXT

from tdjax.config import LINEAR, VAEConfig
from tdjax.models.abstract import as_shapes, drawn, stacked
from tdjax.models.umt5 import UMT5
from tdjax.models.wan_dit import DiT
from tdjax.models.wan_vae import VAE

MODULES = {
    "vae": (VAE, VAEConfig(dim=8)),
    "text": (UMT5, TEXT),
    **{f"dit {kind}": (DiT, dataclasses.replace(DIT, linear=kind)) for kind in LINEAR},
}


@pytest.mark.parametrize("name", MODULES)
def test_shapes_are_those_of_what_is_drawn(name):
    module, cfg = MODULES[name]
    made = jax.eval_shape(lambda key: module(cfg, rngs=nnx.Rngs(key)), jax.random.key(0))
    shapes = as_shapes(module, cfg)
    assert jax.tree.structure(shapes) == jax.tree.structure(made)
    told = lambda tree: [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]
    assert told(shapes) == told(made)


def test_layers_have_numbers_of_their_own():
    layer = lambda rngs: drawn(jax.random.normal, rngs, (3, 5), np.float32)
    a, b = stacked(layer, 2, nnx.Rngs(0))
    assert a.shape == (3, 5) and not np.array_equal(a, b)
