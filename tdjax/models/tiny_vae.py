"""A small video decoder: latents to frames by a few convolutions that each see one frame before
theirs. Source of the structure: madebyollin/taehv taehv.py (`taew2_1.pth`), decoder only.

Every layer is `(x, cache) -> (x, cache)`, as in `wan_vae`, and the first latent frame gives one
frame, each later one four.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from tdjax.config import TinyVAEConfig
from tdjax.models.abstract import as_shapes, drawn
from tdjax.models.causal_conv import conv2d, conv2d_upsampled

COLOURS = 3
BLOCKS = 3  # memory blocks of each stage
LIMIT = 3.0  # latents are bent into -3 to 3


class PlainConv(nnx.Module):
    """The same 2-D convolution of every frame; `size` is its side."""

    def __init__(self, size: int, inputs: int, outputs: int, cfg, *, rngs: nnx.Rngs, bias=True):
        init, dtype = jax.nn.initializers.he_normal(), cfg.policy.param_dtype
        self.kernel = nnx.Param(drawn(init, rngs, (size, size, inputs, outputs), dtype))
        self.bias = nnx.Param(jnp.zeros((outputs,), dtype)) if bias else None

    def __call__(self, x):  # [b t h w i] -> [b t h w o]
        return conv2d(x, *self._weights(x))

    def upsampled(self, x):  # [b t h w i] -> [b t 2h 2w o]
        """The convolution of every pixel repeated 2 x 2."""
        return conv2d_upsampled(x, *self._weights(x))

    def _weights(self, x):
        kernel = self.kernel[...].astype(x.dtype)
        bias = jnp.zeros(kernel.shape[-1], x.dtype) if self.bias is None else self.bias[...]
        return kernel, bias.astype(x.dtype)


class MemoryBlock(nnx.Module):
    """Three convolutions of a frame beside the one before it, added to the frame."""

    def __init__(self, width: int, cfg: TinyVAEConfig, *, rngs: nnx.Rngs):
        self.conv1 = PlainConv(3, 2 * width, width, cfg, rngs=rngs)
        self.conv2 = PlainConv(3, width, width, cfg, rngs=rngs)
        self.conv3 = PlainConv(3, width, width, cfg, rngs=rngs)

    def __call__(self, x, past):  # [b t h w c], [b 1 h w c] or None
        past = jnp.zeros_like(x[:, :1]) if past is None else past
        before = jnp.concatenate([past, x[:, :-1]], axis=1)
        y = jax.nn.relu(self.conv1(jnp.concatenate([x, before], axis=-1)))
        y = self.conv3(jax.nn.relu(self.conv2(y)))
        return jax.nn.relu(y + x), x[:, -1:]


class Stage(nnx.Module):
    """Memory blocks, then twice the height and width, and twice the frames where it grows."""

    def __init__(
        self, inputs: int, outputs: int, grows: bool, cfg: TinyVAEConfig, *, rngs: nnx.Rngs
    ):
        self.frames = 2 if grows else 1
        self.blocks = nnx.List([MemoryBlock(inputs, cfg, rngs=rngs) for _ in range(BLOCKS)])
        self.grow = PlainConv(1, inputs, self.frames * inputs, cfg, rngs=rngs, bias=False)
        self.conv = PlainConv(3, inputs, outputs, cfg, rngs=rngs, bias=False)

    def __call__(self, x, cache):
        past = []
        for block, before in zip(self.blocks, cache or (None,) * BLOCKS, strict=True):
            x, last = block(x, before)
            past.append(last)
        # Pointwise, so it may come before the pixels are repeated.
        x = rearrange(self.grow(x), "b t h w (n c) -> b (t n) h w c", n=self.frames)
        return self.conv.upsampled(x), tuple(past)


class Decoder(nnx.Module):
    """Latent frames to frames, 0 to 1 where it was trained well: four for each, or fewer stages'
    worth."""

    def __init__(self, cfg: TinyVAEConfig, *, rngs: nnx.Rngs):
        self.conv_in = PlainConv(3, cfg.latent_channels, cfg.widths[0], cfg, rngs=rngs)
        pairs = zip(cfg.widths, cfg.widths[1:], cfg.temporal_up, strict=False)
        self.stages = nnx.List([Stage(i, o, grows, cfg, rngs=rngs) for i, o, grows in pairs])
        self.conv_out = PlainConv(3, cfg.widths[-1], COLOURS, cfg, rngs=rngs)

    @jax.named_scope("decoder")
    def __call__(self, x, cache):  # [b t h w z] -> [b t*temporal 8h 8w 3]
        x = jax.nn.relu(self.conv_in(jnp.tanh(x / LIMIT) * LIMIT))
        past = []
        for stage, before in zip(self.stages, cache or (None,) * len(self.stages), strict=True):
            x, last = stage(x, before)
            past.append(last)
        return self.conv_out(jax.nn.relu(x)), tuple(past)


class TinyVAE(nnx.Module):
    """The decoder at the door of a pipeline; it has no encoder."""

    def __init__(self, cfg: TinyVAEConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.decoder = Decoder(cfg, rngs=rngs)

    def decode_chunk(self, latents, cache=None):  # f32 [b 1 h w z] -> f32 [b 1|4 H W 3], cache
        """One latent frame to frames in -1..1; cache is None for the first, of whose frames only
        the last belongs to the clip."""
        frames, past = self.decoder(latents.astype(self.cfg.policy.compute_dtype), cache)
        frames = frames[:, -1:] if cache is None else frames
        return frames.astype(jnp.float32) * 2.0 - 1.0, past


@functools.cache
def cache_shapes(cfg: TinyVAEConfig, height: int, width: int):
    """What one clip's decoder carries from one latent frame to the next, as shapes; nothing is
    run."""
    grid = height // cfg.spatial, width // cfg.spatial
    x = jax.ShapeDtypeStruct((1, 1, *grid, cfg.latent_channels), cfg.policy.compute_dtype)
    return jax.eval_shape(lambda vae, x: vae.decoder(x, None), as_shapes(TinyVAE, cfg), x)[1]
