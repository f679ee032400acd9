"""A small video transformer, data for it, those of golden files, and the size of differences."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from arrays import put
from einops import rearrange

from convert.golden import Held
from tdjax.checkpoints.published.checkpoint import Checkpoint
from tdjax.checkpoints.published.detect import detect
from tdjax.checkpoints.published.files import Source
from tdjax.config import DiTConfig, SLAConfig
from tdjax.models.abstract import as_shapes
from tdjax.models.wan_dit import DiT
from tdjax.precision import FLOAT32
from tdjax.train.state import Batch

# Compiled quickly rather than well: half of the usual time went into fused loops.
QUICK = {"xla_backend_optimization_level": 0}
jit = functools.partial(jax.jit, compiler_options=QUICK)


TINY = DiTConfig(
    dim=16,
    heads=2,
    ffn_dim=12,
    layers=2,
    in_channels=3,
    out_channels=3,
    freq_dim=8,
    text_dim=5,
    text_len=4,
    round_time=False,
    policy=FLOAT32,
    sla=SLAConfig(topk=0.34, block_q=64, block_k=64),
)


def dit(seed=0, **changes):
    """A model whose every leaf is random but the projection of the linear branch, which starts at
    zero."""
    cfg = dataclasses.replace(TINY, **changes)
    names = as_shapes(DiT, cfg)
    draw = np.random.default_rng(seed).normal
    value = lambda path, x: (
        put(np.zeros(x.shape), x.dtype)
        if "proj" in str(path) and "core" in str(path)
        else put(draw(size=x.shape) / 4, x.dtype)
    )
    return jax.tree_util.tree_map_with_path(value, names)


def clip(t, h, w, b=2):
    draw = np.random.default_rng(3).normal
    return Batch(
        put(draw(size=(b, t, h, w, 3)), jnp.float32),
        put(draw(size=(b, 4, 5)), jnp.float32),
    )


def channels_last(x):
    return rearrange(x, "b c t h w -> b t h w c")


def module(tensors, **known):
    """A float32 DiT from a state dict, by the rows that read any checkpoint."""
    held = {key: Held(value) for key, value in tensors.items()}
    found = detect(held, "state dict", policy=FLOAT32, round_time=False, **known)
    return Checkpoint(Source(Path("state dict"), (), held, {}), found, held).load()


def load(g):
    """The model of a golden file; its timesteps are already what the network gets."""
    c = g.config
    sla = (
        {"sla": SLAConfig(topk=c["sla_topk"], block_q=c["BLKQ"], block_k=c["BLKK"])}
        if "sla_topk" in c
        else {}
    )
    return module(g.weights(), heads=c["num_heads"], **sla)


def inputs(g):
    """x, timestep, text, image, features in our layouts."""
    video = lambda name: put(channels_last(g[name])) if name in g else None
    features = put(g["in/clip"]) if "in/clip" in g else None
    return (
        video("in/x"),
        put(g["in/timesteps"][:, 0]),
        put(g["in/crossattn_emb"]),
        video("in/y"),
        features,
    )


network = jit(lambda model, x, timestep, text: model(x, timestep, text))


def difference(a, b):
    return jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), a, b)


def norm(tree):
    return float(
        np.sqrt(sum(np.square(np.asarray(x, np.float64)).sum() for x in jax.tree.leaves(tree)))
    )
