"""The umT5 text encoder: T5 with a relative-position table of its own in every layer, no biases, no
attention scaling.

Source: arXiv:2304.09151 (umT5), arXiv:1910.10683 section 2.1 (T5); Wan-Video/Wan2.1
wan/modules/t5.py for what Wan does with it (rows after the prompt's end become zeros).
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax import lax

from pallas_kernels.primitives import EXACT
from tdjax.config import TextConfig
from tdjax.models.abstract import drawn, stacked
from tdjax.models.linear import Linear
from tdjax.models.norms import RMSNorm


def relative_bucket(rel: np.ndarray, buckets: int, max_distance: int) -> np.ndarray:
    """Row of the bias table for rel = key - query (any integers): int32 of the same shape.

    The upper half of the table is for keys after the query; within a half, small distances have a
    row each and larger ones share rows that widen geometrically up to max_distance. Float32 on the
    host, as in the published code: a device's own logarithm could move a distance that lies on an
    edge.
    """
    half = buckets // 2
    exact = half // 2
    distance = np.abs(rel)
    scale = np.float32(math.log(max_distance / exact))
    log = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    log = log / scale * np.float32(half - exact)
    far = np.minimum(exact + np.trunc(log).astype(np.int32), half - 1)
    return (np.where(rel > 0, half, 0) + np.where(distance < exact, distance, far)).astype(np.int32)


def relative_positions(length: int) -> np.ndarray:
    """Every key - query of a sequence, ascending: int32 [2 length - 1]."""
    return np.arange(1 - length, length, dtype=np.int32)


def position_bias(table, cfg: TextConfig, length: int):  # table [buckets h] -> [h s s] (query, key)
    """Relative-position bias of one layer."""
    rows = relative_bucket(relative_positions(length), cfg.buckets, cfg.max_distance)
    by_distance = table[rows]  # [2s-1 h]
    position = jnp.arange(length)
    rel = position[None, :] - position[:, None]
    return rearrange(by_distance[rel + length - 1], "q k h -> h q k")


def _masked_softmax(logits, bias, mask, island):
    """Float32 island: logits [b h q k], bias [h q k], mask [b k] -> [b h q k] in island. The mask
    overwrites the bias with the lowest finite number, so a row without any key stays finite."""
    lowest = jnp.finfo(island).min
    bias = jnp.where(mask[:, None, None, :] > 0, bias.astype(island)[None], lowest)
    return jax.nn.softmax(logits.astype(island) + bias, axis=-1)


def linear(i: int, o: int, cfg: TextConfig, rngs: nnx.Rngs, std: float | None = None) -> Linear:
    """A Linear without bias, started as T5 is (the deviation of q stands in for the missing
    attention scale)."""
    init = jax.nn.initializers.normal(std or i**-0.5)
    return Linear(i, o, cfg.policy, bias=False, rngs=rngs, init=init)


class Embedding(nnx.Module):
    """Rows of a table by id; T5 does not scale them."""

    def __init__(self, cfg: TextConfig, *, rngs: nnx.Rngs):
        self.embedding = nnx.Param(
            drawn(jax.random.normal, rngs, (cfg.vocab, cfg.dim), cfg.policy.param_dtype)
        )

    def __call__(self, ids):  # i32[b s] -> [b s d]
        return self.embedding[...][ids]


class SelfAttention(nnx.Module):
    """Heads of plain dot products plus a position bias: no 1/sqrt(k), which T5 folds into the
    weights of q."""

    def __init__(self, cfg: TextConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.q = linear(cfg.dim, cfg.attention_dim, cfg, rngs, std=(cfg.dim * cfg.head_dim) ** -0.5)
        self.k = linear(cfg.dim, cfg.attention_dim, cfg, rngs)
        self.v = linear(cfg.dim, cfg.attention_dim, cfg, rngs)
        self.o = linear(cfg.attention_dim, cfg.dim, cfg, rngs)

    def __call__(self, x, bias, mask):  # x [b s d], bias [h s s], mask [b s] -> [b s d]
        island = self.cfg.policy.island_dtype
        heads = lambda y: rearrange(y, "b s (h k) -> b s h k", h=self.cfg.heads)
        q, k, v = heads(self.q(x)), heads(self.k(x)), heads(self.v(x))
        options = {"precision": EXACT, "preferred_element_type": island}
        logits = jnp.einsum("b q h k, b s h k -> b h q s", q, k, **options)
        weights = _masked_softmax(logits, bias, mask, island).astype(x.dtype)
        out = jnp.einsum("b h q s, b s h k -> b q h k", weights, v, precision=EXACT)
        return self.o(rearrange(out, "b s h k -> b s (h k)"))


class Block(nnx.Module):
    """Self-attention, then a gated MLP, each on a normalised input and added back."""

    def __init__(self, cfg: TextConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.norm1 = RMSNorm(cfg.dim, cfg.eps, cfg.policy)
        self.attn = SelfAttention(cfg, rngs=rngs)
        std = (cfg.buckets * cfg.heads) ** -0.5
        self.relative_bias = nnx.Param(
            std * drawn(jax.random.normal, rngs, (cfg.buckets, cfg.heads), cfg.policy.param_dtype)
        )
        self.norm2 = RMSNorm(cfg.dim, cfg.eps, cfg.policy)
        self.gate = linear(cfg.dim, cfg.ffn_dim, cfg, rngs)
        self.up = linear(cfg.dim, cfg.ffn_dim, cfg, rngs)
        self.down = linear(cfg.ffn_dim, cfg.dim, cfg, rngs)

    def __call__(self, x, mask):  # x [b s d], mask [b s] -> [b s d]
        x = x + self.attention(x, mask)
        return x + self.feed_forward(x)

    def attention(self, x, mask):  # -> [b s d], what the residual stream gains
        bias = position_bias(self.relative_bias[...], self.cfg, x.shape[1])
        return self.attn(self.norm1(x), bias, mask)

    def feed_forward(self, x):
        h = self.norm2(x)
        return self.down(self.up(h) * jax.nn.gelu(self.gate(h), approximate=True))


class UMT5(nnx.Module):
    """The encoder: blocks stacked on a leading layer axis, run by one scan."""

    def __init__(self, cfg: TextConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.embed = Embedding(cfg, rngs=rngs)
        self.blocks = stacked(lambda rngs: Block(cfg, rngs=rngs), cfg.layers, rngs)
        self.norm = RMSNorm(cfg.dim, cfg.eps, cfg.policy)

    def __call__(self, ids, mask):  # i32[b s], i32[b s] (1 up to the prompt's end) -> [b s d]
        """ids, mask i32 [b s] -> text features [b s d], exact zeros where mask is 0: the DiT has no
        text mask and attends to those rows."""
        return without_padding(self.encode(ids, mask), mask)

    def encode(self, ids, mask):
        """The features [b s d] at all positions, those after the prompt's end included."""
        step = lambda x, block: (block(x, mask), None)
        x = self.embed(ids).astype(self.cfg.policy.compute_dtype)
        return self.norm(lax.scan(jax.checkpoint(step), x, self.blocks)[0])


def without_padding(x, mask):  # [b s d], i32[b s] -> [b s d]
    """Zeros where the mask is 0."""
    return jnp.where(mask[..., None] > 0, x, jnp.zeros((), x.dtype))


def intermediates(model: UMT5, ids, mask) -> dict[str, np.ndarray | jax.Array]:
    """Values inside the encoder by the names of the golden files, block after block; slow, for
    validation."""
    rel = relative_positions(ids.shape[1])
    x = model.embed(ids).astype(model.cfg.policy.compute_dtype)
    out = {
        "rel_pos": rel,
        "rel_bucket": relative_bucket(rel, model.cfg.buckets, model.cfg.max_distance),
        "embed": x,
    }
    for i in range(model.cfg.layers):
        block = jax.tree.map(lambda leaf, i=i: leaf[i], model.blocks)
        out[f"block{i}/attn_out"] = block.attention(x, mask)
        x = x + out[f"block{i}/attn_out"]
        out[f"block{i}/ffn_out"] = block.feed_forward(x)
        x = x + out[f"block{i}/ffn_out"]
        out[f"block{i}/out"] = x
    return out | {"encoder_out_all_positions": model.norm(x)}
