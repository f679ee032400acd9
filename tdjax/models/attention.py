"""Self- and cross-attention of the video transformer, and the table of what may stand between q, k,
v and the output."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
from einops import rearrange
from flax import nnx

from pallas_kernels import attention, sage_sparse_linear_attention, sparse_linear_attention
from pallas_kernels.blocking import counts
from pallas_kernels.qk_prep import rms_norm_rope, rms_norm_rope_pool
from tdjax.config import DiTConfig
from tdjax.models.linear import LINEAR, Linear
from tdjax.models.norms import RMSNorm
from tdjax.models.rope import Rotation
from tdjax.parallel.sharding import (
    blocks_lie_whole,
    constrain,
    head_groups,
    one_by_one,
    over_heads,
    over_queries,
    over_tokens,
    to_heads,
    to_tokens,
)
from tdjax.precision import FLOAT32


class DenseCore(nnx.Module):
    """Softmax attention over all keys."""

    def __init__(self, cfg: DiTConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg

    def queries(self, x, norm: RMSNorm, rope):
        """[b l d] -> heads, see `to_heads`, normed and rotated, and what the core needs beside
        them."""
        return _rotated(x, norm, rope, self.cfg), None

    keys = queries

    def __call__(self, q, k, v, means=None, tokens=None):  # [b l h k]
        return over_heads(self.op, q, k, v, tokens=tokens)

    def across(self, q, k, v):  # q [b l h k], k v [b s h k]
        """Attention to keys and values that every device has."""
        return over_queries(self.op, q, k, v)

    @property
    def op(self):
        impl = "auto" if self.cfg.impl == "mosaic" else self.cfg.impl  # which has no dense kernel
        return partial(attention, impl=impl)


def _rotated(x, norm: RMSNorm, rope: Rotation, cfg: DiTConfig, pool: int | None = None):
    """RMS norm over all heads and rotation, tokens divided over the mesh: x [b l d] -> heads, see
    `to_heads`; and the means of blocks of `pool` tokens f32 [b h n k], if that is given."""
    groups = head_groups(cfg.heads)
    sizes = {"eps": norm.eps, "groups": groups, "impl": cfg.row_impl}
    run = partial(rms_norm_rope, **sizes)
    if pool is not None:
        run = partial(rms_norm_rope_pool, **sizes, block=pool)
    tables = (rearrange(table, "l k -> 1 l k") for table in (rope.cos, rope.sin))
    weight = rearrange(norm.scale[...], "d -> 1 1 d")
    heads = ("groups", "batch", "tokens") if groups > 1 else ("batch", "tokens")

    def op(x, weight, cos, sin):
        y = run(x, weight[0, 0], cos[0], sin[0])
        return y if pool is not None else (y,)

    out = (heads, ("batch", "heads", "tokens")) if pool is not None else (heads,)
    y = over_tokens(op, x, weight, *tables, out=out)
    return y if pool is not None else y[0]


class SLACore(nnx.Module):
    """Sparse-linear attention; owns the float32 projection of the linear branch, which starts at
    zero."""

    op = staticmethod(sparse_linear_attention)

    def __init__(self, cfg: DiTConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.proj = Linear(
            cfg.head_dim, cfg.head_dim, FLOAT32, rngs=rngs, init=jax.nn.initializers.zeros
        )

    def queries(self, x, norm: RMSNorm, rope):
        """[b l d] -> heads, see `to_heads`, normed and rotated, and the means of their blocks f32
        [b h n k]."""
        return self._pooled(x, norm, rope, self.cfg.sla.block_q)

    def keys(self, x, norm: RMSNorm, rope):
        return self._pooled(x, norm, rope, self.cfg.sla.block_k)

    def _pooled(self, x, norm, rope, block):
        if blocks_lie_whole(x.shape[1], largest_block(self.cfg), self.cfg.heads):
            return _rotated(x, norm, rope, self.cfg, block)
        # the core, which sees every token of a head, takes the means itself
        return _rotated(x, norm, rope, self.cfg), None

    def __call__(self, q, k, v, means=None, tokens=None):
        """Heads after `to_heads`; means: those of the blocks of q and of k, if they are at hand.
        tokens: how many of l are the clip's, by default all."""
        sla = self.cfg.sla
        sizes = {"topk": sla.topk, "block_q": sla.block_q, "block_k": sla.block_k}
        run = partial(self.op, **sizes, keys=tokens, impl=self.cfg.impl)

        def op(q, k, v, kernel, bias, *means):
            if means:
                of_keys = _of_counted(means[1], k.shape[1], tokens, sla.block_k)
                means = means[0], of_keys
            return run(q, k, v, kernel, bias, means=means or None)

        proj = self.proj.kernel[...], self.proj.bias[...]
        return over_heads(op, q, k, v, *proj, means=means or ())


def _of_counted(means, length: int, tokens: int | None, block: int):  # f32 [b h n k]
    """Means of the blocks of `length` tokens as those of the blocks of the first `tokens`; the
    others are zeros."""
    if tokens is None or tokens == length:
        return means
    ours = counts(tokens, block)
    return means[:, :, : len(ours)] * (counts(length, block)[: len(ours)] / ours)[:, None]


class SageSLACore(SLACore):
    """Sparse-linear attention with int8 scores; the same parameters."""

    op = staticmethod(sage_sparse_linear_attention)


def largest_block(cfg: DiTConfig) -> int:
    """Returns how many tokens the largest block of self-attention has; 1 where it has no blocks."""
    return 1 if cfg.attention == "dense" else max(cfg.sla.block_q, cfg.sla.block_k)


SELF_ATTENTION = {"dense": DenseCore, "sla": SLACore, "sagesla": SageSLACore}


class Attention(nnx.Module):
    """Projections to heads and back; queries and keys are RMS-normed over the full width, all heads
    together."""

    def __init__(self, cfg: DiTConfig, *, rngs: nnx.Rngs):
        linear = _square(cfg, rngs)
        self.cfg = cfg
        self.q, self.k, self.v, self.o = linear(), linear(), linear(), linear()
        self.norm_q = RMSNorm(cfg.dim, cfg.eps, cfg.policy)
        self.norm_k = RMSNorm(cfg.dim, cfg.eps, cfg.policy)

    def queries(self, x):  # [b l d], float or quantised for q -> [b l h k]
        return self.heads(self.norm_q(self.q(x)))

    def keys(self, x):
        return self.heads(self.norm_k(self.k(x)))

    def values(self, x):
        return self.heads(self.v(x))

    def heads(self, x):
        return rearrange(x, "b l (h k) -> b l h k", h=self.cfg.heads)

    def merge(self, x):
        """Heads after `to_tokens` to [b l d]."""
        if x.ndim == 5:
            return self.o.of_groups(rearrange(x, "g b l h k -> g b l (h k)"))
        return self.o(rearrange(x, "b l h k -> b l (h k)"))


def _square(cfg: DiTConfig, rngs: nnx.Rngs):
    """Makes linear layers of the width of the stream."""
    sizes = cfg.dim, cfg.dim, cfg.policy
    return partial(LINEAR[cfg.linear], *sizes, rngs=rngs, impl=cfg.product_impl)


class SelfAttention(Attention):
    """Attention of video tokens to one another, rotated by position."""

    def __init__(self, cfg: DiTConfig, *, rngs: nnx.Rngs):
        super().__init__(cfg, rngs=rngs)
        self.core = SELF_ATTENTION[cfg.attention](cfg, rngs=rngs)

    @jax.named_scope("self_attention")
    def __call__(self, x, rope: Rotation):  # x [b l d], float or quantised for q
        x = self.q.quantize_input(x)
        v = to_heads(self.values(x))  # while keys are computed, and these while queries are
        with jax.named_scope("queries_and_keys"):
            k, k_means = self.core.keys(self.k(x), self.norm_k, rope)
            v, x = one_by_one(v, x)
            q, q_means = self.core.queries(self.q(x), self.norm_q, rope)
            k, q = one_by_one(to_heads(k), q)
        means = None if q_means is None else (q_means, k_means)
        with jax.named_scope("core"):
            y = self.core(to_heads(q), k, v, means, rope.tokens)
        return self.merge(to_tokens(y))

    def values(self, x):
        groups = head_groups(self.cfg.heads)
        if groups == 1:
            return super().values(x)
        h = self.cfg.heads // groups
        return rearrange(self.v.in_groups(x, groups), "g b l (h k) -> g b l h k", h=h)


class TextKV(NamedTuple):
    """Keys and values [b s h k] of the text, and of the image features or None; stacked over
    blocks, [n b s h k]."""

    k: Any
    v: Any
    k_img: Any = None
    v_img: Any = None


class CrossAttention(Attention):
    """Attention of video tokens to all text rows, no mask; with image features, a second one added
    before the output."""

    def __init__(self, cfg: DiTConfig, *, rngs: nnx.Rngs):
        super().__init__(cfg, rngs=rngs)
        self.core = DenseCore(cfg, rngs=rngs)
        if cfg.image_dim:
            linear = _square(cfg, rngs)
            self.k_img, self.v_img = linear(), linear()
            self.norm_k_img = RMSNorm(cfg.dim, cfg.eps, cfg.policy)

    def text_kv(self, text, features=None) -> TextKV:
        """What every step of a prompt reads alike: text [b s d], features [b 257 d], float or
        quantised for k."""
        text = self.k.quantize_input(text)
        kv = TextKV(self.keys(text), self.values(text))
        if features is not None:
            features = self.k_img.quantize_input(features)
            k_img = self.heads(self.norm_k_img(self.k_img(features)))
            kv = kv._replace(k_img=k_img, v_img=self.heads(self.v_img(features)))
        # as attention wants them
        return jax.tree.map(lambda x: constrain(x, "batch", None, "heads", None), kv)

    @jax.named_scope("cross_attention")
    def __call__(self, x, kv: TextKV):  # x [b l d], float or quantised for q
        q = self.queries(x)
        with jax.named_scope("core"):
            y = self.core.across(q, kv.k, kv.v)
            if kv.k_img is not None:
                y = y + self.core.across(q, kv.k_img, kv.v_img)
        return self.merge(y)
