"""Self- and cross-attention of the video transformer, and the table of what may stand between q, k, v and the output."""

from __future__ import annotations

from functools import partial

import jax
from einops import rearrange
from flax import nnx

from pallas_kernels import attention, sage_sparse_linear_attention, sparse_linear_attention
from tdjax.config import DiTConfig
from tdjax.layers import LINEAR, Linear, RMSNorm
from tdjax.models.rope import rotate
from tdjax.precision import FLOAT32
from tdjax.sharding import over_heads


class DenseCore(nnx.Module):
    """Softmax attention over all keys."""

    def __init__(self, cfg: DiTConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg

    def __call__(self, q, k, v):  # q [b l h k], k v [b s h k]
        return over_heads(partial(attention, impl=self.cfg.impl), q, k, v)


class SLACore(nnx.Module):
    """Sparse-linear attention; owns the float32 projection of the linear branch, which starts at zero."""

    op = staticmethod(sparse_linear_attention)

    def __init__(self, cfg: DiTConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.proj = Linear(cfg.head_dim, cfg.head_dim, FLOAT32, rngs=rngs, init=jax.nn.initializers.zeros)

    def __call__(self, q, k, v):  # [b l h k]
        sla = self.cfg.sla
        op = partial(self.op, topk=sla.topk, block_q=sla.block_q, block_k=sla.block_k, impl=self.cfg.impl)
        return over_heads(op, q, k, v, self.proj.kernel[...], self.proj.bias[...])


class SageSLACore(SLACore):
    """Sparse-linear attention with int8 scores; the same parameters."""

    op = staticmethod(sage_sparse_linear_attention)


SELF_ATTENTION = {"dense": DenseCore, "sla": SLACore, "sagesla": SageSLACore}


class Attention(nnx.Module):
    """Projections to heads and back; queries and keys are RMS-normed over the full width, all heads together."""

    def __init__(self, cfg: DiTConfig, *, rngs: nnx.Rngs):
        linear = partial(LINEAR[cfg.linear], cfg.dim, cfg.dim, cfg.policy, rngs=rngs)
        self.cfg = cfg
        self.q, self.k, self.v, self.o = linear(), linear(), linear(), linear()
        self.norm_q = RMSNorm(cfg.dim, cfg.eps, cfg.policy)
        self.norm_k = RMSNorm(cfg.dim, cfg.eps, cfg.policy)

    def queries(self, x):  # [b l d] -> [b l h k]
        return self.heads(self.norm_q(self.q(x)))

    def keys(self, x):
        return self.heads(self.norm_k(self.k(x)))

    def values(self, x):
        return self.heads(self.v(x))

    def heads(self, x):
        return rearrange(x, "b l (h k) -> b l h k", h=self.cfg.heads)

    def merge(self, x):
        return self.o(rearrange(x, "b l h k -> b l (h k)"))


class SelfAttention(Attention):
    """Attention of video tokens to one another, rotated by position."""

    def __init__(self, cfg: DiTConfig, *, rngs: nnx.Rngs):
        super().__init__(cfg, rngs=rngs)
        self.core = SELF_ATTENTION[cfg.attention](cfg, rngs=rngs)

    def __call__(self, x, rope):  # x [b l d], rope (cos, sin) [l k/2]
        q, k = rotate(self.queries(x), rope), rotate(self.keys(x), rope)
        return self.merge(self.core(q, k, self.values(x)))


class CrossAttention(Attention):
    """Attention of video tokens to all text rows, no mask; with image features, a second one added before the output."""

    def __init__(self, cfg: DiTConfig, *, rngs: nnx.Rngs):
        super().__init__(cfg, rngs=rngs)
        self.core = DenseCore(cfg, rngs=rngs)
        if cfg.image_dim:
            linear = partial(LINEAR[cfg.linear], cfg.dim, cfg.dim, cfg.policy, rngs=rngs)
            self.k_img, self.v_img = linear(), linear()
            self.norm_k_img = RMSNorm(cfg.dim, cfg.eps, cfg.policy)

    def __call__(self, x, text, features=None):  # x [b l d], text [b s d], features [b 257 d]
        q = self.queries(x)
        y = self.core(q, self.keys(text), self.values(text))
        if features is not None:
            k, v = self.heads(self.norm_k_img(self.k_img(features))), self.heads(self.v_img(features))
            y = y + self.core(q, k, v)
        return self.merge(y)
