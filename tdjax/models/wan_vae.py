"""Causal video autoencoder of Wan2.1: one latent frame for the first frame, then one for every
four; 8x in space.

Every layer is `(x, cache) -> (x, cache)`: a chunk of frames, and what the layer remembers of the
chunks before it. The cache of the first chunk is None; from then on it is a tuple of arrays of
constant shape, which lax.scan carries. Source of the structure: Wan-Video/Wan2.1
wan/modules/vae.py.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax import lax

from pallas_kernels.norm_silu import unit_norm
from tdjax.config import VAEConfig, neighbours
from tdjax.errors import UsageError
from tdjax.models.abstract import as_shapes
from tdjax.models.causal_conv import CausalConv, Conv, NarrowCausalConv, zero_past
from tdjax.parallel.space import whole_frame

COLOURS = 3
# queries of the middle attention whose scores exist at once: 14400 keys x 2048 x 4 bytes = 118 MB
# at 720p
QUERIES = 2048


class Norm(nnx.Module):
    """Unit length over channels times sqrt(c) times a gain; float32 inside. Before a convolution it
    is part of `temporal_unfold`."""

    def __init__(self, channels: int, cfg: VAEConfig):
        self.scale = nnx.Param(jnp.ones((channels,), cfg.policy.param_dtype))

    def __call__(self, x):  # [... c] -> [... c], float32 island
        return unit_norm(x, self.scale[...]).astype(x.dtype)


class ResidualBlock(nnx.Module):
    """norm, SiLU, causal convolution, twice; a pointwise shortcut where the width changes."""

    def __init__(self, inputs: int, outputs: int, cfg: VAEConfig, *, rngs: nnx.Rngs):
        self.norm1 = Norm(inputs, cfg)
        self.conv1 = CausalConv((3, 3, 3), inputs, outputs, cfg, rngs=rngs)
        self.norm2 = Norm(outputs, cfg)
        self.conv2 = CausalConv((3, 3, 3), outputs, outputs, cfg, rngs=rngs)
        pointwise = functools.partial(Conv, (1, 1, 1), inputs, outputs, cfg, rngs=rngs)
        self.shortcut = pointwise() if inputs != outputs else None

    @jax.named_scope("residual_block")
    def __call__(self, x, cache):  # [b t h w i] -> [b t h w o]
        past1, past2 = _parts(cache, 2)
        y, past1 = self.conv1(x, past1, self.norm1.scale[...])
        x = x if self.shortcut is None else self.shortcut(x)
        y, past2 = self.conv2(y, past2, self.norm2.scale[...], plus=x)
        return y, (past1, past2)


class Attention(nnx.Module):
    """Self-attention within each frame, one head as wide as the channels."""

    def __init__(self, channels: int, cfg: VAEConfig, *, rngs: nnx.Rngs):
        self.norm = Norm(channels, cfg)
        self.qkv = Conv((1, 1), channels, 3 * channels, cfg, rngs=rngs)
        self.proj = Conv((1, 1), channels, channels, cfg, rngs=rngs)

    @jax.named_scope("attention")
    def __call__(self, x, cache):  # [b t h w c] -> [b t h w c]; nothing to remember
        b, t, h, w, _ = x.shape
        q, k, v = rearrange(self.qkv(self.norm(x)), "b t h w (n c) -> n (b t) (h w) c", n=3)
        y = rearrange(
            attend(q, whole_frame(k), whole_frame(v)), "(b t) (h w) c -> b t h w c", b=b, h=h
        )
        return x + self.proj(y), ()


def attend(q, k, v):  # [b l c], [b s c] x2 -> [b l c]
    """softmax(q k' / sqrt(c)) v for a block of queries at a time; scores and softmax in float32."""

    def one(query):  # [b c]
        scores = jnp.einsum("bc,bsc->bs", query, k, preferred_element_type=jnp.float32)
        scores = scores / math.sqrt(k.shape[-1])
        return jnp.einsum("bs,bsc->bc", jax.nn.softmax(scores).astype(v.dtype), v)

    y = lax.map(one, rearrange(q, "b l c -> l b c"), batch_size=QUERIES)
    return rearrange(y, "l b c -> b l c")


class Downsample(nnx.Module):
    """Half the height and width; in time, half the frames of every chunk but the first."""

    def __init__(self, channels: int, temporal: bool, cfg: VAEConfig, *, rngs: nnx.Rngs):
        self.conv = Conv((3, 3), channels, channels, cfg, rngs=rngs)
        time_conv = functools.partial(CausalConv, (3, 1, 1), channels, channels, cfg, rngs=rngs)
        self.time_conv = time_conv() if temporal else None

    @jax.named_scope("downsample")
    def __call__(self, x, cache):  # [b t h w c] -> [b t/2 h/2 w/2 c]
        x = self.conv(x, stride=2)
        if self.time_conv is None:
            return x, ()
        if cache is None:
            return x, x[:, -1:]
        return self.time_conv.halving(x, cache)


class Upsample(nnx.Module):
    """Twice the height and width and half the channels; in time, twice the frames of every chunk
    but the first.

    The first chunk is not part of the later chunks' past either: their convolution over time begins
    with zeros.
    """

    def __init__(self, channels: int, temporal: bool, cfg: VAEConfig, *, rngs: nnx.Rngs):
        self.conv = Conv((3, 3), channels, channels // 2, cfg, rngs=rngs)
        time_conv = functools.partial(CausalConv, (3, 1, 1), channels, 2 * channels, cfg, rngs=rngs)
        self.time_conv = time_conv() if temporal else None

    @jax.named_scope("upsample")
    def __call__(self, x, cache):  # [b t h w c] -> [b 2t 2h 2w c/2]
        if self.time_conv is None:
            cache = ()
        elif cache is None:
            cache = zero_past(x)
        else:
            x, cache = self.time_conv(x, cache)
            x = rearrange(x, "b t h w (n c) -> b (t n) h w c", n=2)
        return self.conv.upsampled(x), cache


def _parts(cache, n: int):
    """The cache's `n` parts; before the first chunk (None) each of them is None."""
    return (None,) * n if cache is None else cache


def _chain(layers, x, cache):
    """Layers `(x, cache) -> (x, cache)` one after the other; their caches are a tuple."""
    out = []
    for layer, past in zip(layers, _parts(cache, len(layers)), strict=True):
        x, past = layer(x, past)
        out.append(past)
    return x, tuple(out)


def _middle(channels: int, cfg: VAEConfig, rngs: nnx.Rngs) -> nnx.List:
    """Residual block, attention, residual block."""
    first = ResidualBlock(channels, channels, cfg, rngs=rngs)
    attention = Attention(channels, cfg, rngs=rngs)
    return nnx.List([first, attention, ResidualBlock(channels, channels, cfg, rngs=rngs)])


class Encoder(nnx.Module):
    """A chunk of frames to one latent frame of 2z channels (mean, log-variance)."""

    def __init__(self, cfg: VAEConfig, *, rngs: nnx.Rngs):
        widths = [cfg.dim * m for m in (1, *cfg.multipliers)]
        self.conv_in = CausalConv((3, 3, 3), COLOURS, widths[0], cfg, rngs=rngs)
        down = []
        for i, (inputs, outputs) in enumerate(zip(widths, widths[1:], strict=False)):
            for n in range(cfg.res_blocks):
                down.append(ResidualBlock(outputs if n else inputs, outputs, cfg, rngs=rngs))
            if i < len(cfg.temporal_down):
                down.append(Downsample(outputs, cfg.temporal_down[i], cfg, rngs=rngs))
        self.down = nnx.List(down)
        self.middle = _middle(widths[-1], cfg, rngs)
        self.norm_out = Norm(widths[-1], cfg)
        self.conv_out = CausalConv((3, 3, 3), widths[-1], 2 * cfg.latent_channels, cfg, rngs=rngs)

    @jax.named_scope("trunk")
    def trunk(self, x, cache):  # [b 1|4 H W 3] -> [b 1 h w c]
        return _chain((self.conv_in, *self.down, *self.middle), x, cache)

    @jax.named_scope("encoder")
    def __call__(self, x, cache):  # [b 1|4 H W 3] -> [b 1 h w 2z]
        trunk, past = _parts(cache, 2)
        x, trunk = self.trunk(x, trunk)
        x, past = self.conv_out(x, past, self.norm_out.scale[...])
        return x, (trunk, past)


class Decoder(nnx.Module):
    """One latent frame to one (the first) or four frames."""

    def __init__(self, cfg: VAEConfig, *, rngs: nnx.Rngs):
        widths = [cfg.dim * m for m in (*cfg.multipliers, cfg.multipliers[-1])][::-1]
        self.conv_in = CausalConv((3, 3, 3), cfg.latent_channels, widths[0], cfg, rngs=rngs)
        self.middle = _middle(widths[0], cfg, rngs)
        up, temporal_up = [], cfg.temporal_down[::-1]
        for i, (inputs, outputs) in enumerate(zip(widths, widths[1:], strict=False)):
            inputs = inputs // 2 if i else inputs  # Upsample has halved them
            for n in range(cfg.res_blocks + 1):
                up.append(ResidualBlock(outputs if n else inputs, outputs, cfg, rngs=rngs))
            if i < len(temporal_up):
                up.append(Upsample(outputs, temporal_up[i], cfg, rngs=rngs))
        self.up = nnx.List(up)
        self.norm_out = Norm(widths[-1], cfg)
        self.conv_out = NarrowCausalConv((3, 3, 3), widths[-1], COLOURS, cfg, rngs=rngs)

    @jax.named_scope("trunk")
    def trunk(self, x, cache):  # [b 1 h w z] -> [b 1 h w c]
        return _chain((self.conv_in, *self.middle), x, cache)

    @jax.named_scope("decoder")
    def __call__(self, x, cache):  # [b 1 h w z] -> [b 1|4 H W 3]
        trunk, up, past = _parts(cache, 3)
        x, trunk = self.trunk(x, trunk)
        with jax.named_scope("up"):
            x, up = _chain(self.up, x, up)
        x, past = self.conv_out(x, past, self.norm_out.scale[...])
        return x, (trunk, up, past)


def over_chunks(step, x, size: int):  # x [b 1+n*size ...] -> [b ...]
    """`step(chunk, cache) -> (y, cache)` over frame 0 alone, then over chunks of `size` frames by
    lax.scan."""
    y, cache = step(x[:, :1], None)
    if x.shape[1] == 1:
        return y
    rest = rearrange(x[:, 1:], "b (n t) ... -> n b t ...", t=size)
    _, ys = lax.scan(lambda cache, chunk: step(chunk, cache)[::-1], cache, rest)
    return jnp.concatenate([y, rearrange(ys, "n b t ... -> b (n t) ...")], axis=1)


class VAE(nnx.Module):
    """Encoder and decoder with latent normalisation. float32 at the doors, `cfg.policy.compute`
    between them.

    Whatever the length of the clip, beside its own frames only the cache and one chunk's
    activations are resident. The decoder's cache is 1.75 GB at 480p and 4.04 GB at 720p in
    bfloat16, the encoder's 1.12 and 2.59 GB (`cache_bytes`).
    """

    def __init__(self, cfg: VAEConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.encoder = Encoder(cfg, rngs=rngs)
        z = cfg.latent_channels
        self.quant_conv = Conv((1, 1, 1), 2 * z, 2 * z, cfg, rngs=rngs)
        self.post_quant_conv = Conv((1, 1, 1), z, z, cfg, rngs=rngs)
        self.decoder = Decoder(cfg, rngs=rngs)

    def encode(self, video, whole: bool = False):
        """Video f32 [b T H W 3] in -1..1 -> normalised latents f32 [b t h w z], without noise: the
        mean of the posterior.

        T is 4k+1 and gives t = k+1; H and W are multiples of 8 (UsageError else). whole: all frames
        but the first in one step, for many small clips: the same numbers in larger pieces of work,
        and memory that grows with the length of the clip.
        """
        return self.normalise(self.encoded(video, whole)[..., : self.cfg.latent_channels])

    def encoded(self, video, whole: bool = False):
        """f32 [b T H W 3] -> mean and log-variance [b t h w 2z]."""
        _check_video(video.shape, self.cfg)
        size = video.shape[1] - 1 if whole else self.cfg.temporal
        video = video.astype(self.cfg.policy.compute_dtype)
        return self.quant_conv(over_chunks(self.encoder, video, size))

    def decode(self, latents, whole: bool = False):
        """Normalised latents f32 [b t h w z] -> video f32 [b 4t-3 8h 8w 3], about -1..1 and not
        clipped.

        The scan stacks frames in the compute dtype; they become float32 after it. whole: as in
        `encode`.
        """
        _check_latents(latents.shape, self.cfg)
        size = latents.shape[1] - 1 if whole else 1
        video = over_chunks(self.decoder, self.decoder_input(latents), size)
        return video.astype(jnp.float32)

    def encode_chunk(self, video, cache=None):  # f32 [b 1|4 H W 3] -> f32 [b 1 h w z], cache
        """`encode` one chunk at a time; cache is None for the first frame."""
        x, cache = self.encoder(video.astype(self.cfg.policy.compute_dtype), cache)
        return self.normalise(self.quant_conv(x)[..., : self.cfg.latent_channels]), cache

    def decode_chunk(self, latents, cache=None):  # f32 [b 1 h w z] -> f32 [b 1|4 H W 3], cache
        """`decode` one latent frame at a time; cache is None for the first."""
        x, cache = self.decoder(self.decoder_input(latents), cache)
        return x.astype(jnp.float32), cache

    def normalise(self, mean):  # [... z] -> f32 [... z], float32 island
        return (mean.astype(jnp.float32) - np.float32(self.cfg.mean)) / np.float32(self.cfg.std)

    def decoder_input(self, latents):  # f32 [b t h w z] -> [b t h w z], float32 island
        x = latents * np.float32(self.cfg.std) + np.float32(self.cfg.mean)
        return self.post_quant_conv(x.astype(self.cfg.policy.compute_dtype))


def _check_video(shape: tuple[int, ...], cfg: VAEConfig):
    """UsageError for frames and sizes that the encoder cannot halve."""
    if len(shape) != 5 or shape[-1] != COLOURS:
        raise ValueError(f"video has shape {shape}; it must be [b T H W {COLOURS}], channels last")
    _, frames, height, width, _ = shape
    if frames < 1 or (frames - 1) % cfg.temporal:
        low, high = neighbours(frames, cfg.temporal, 1)
        raise UsageError(
            f"the video has {frames} frames",
            f"the video VAE codes one frame, then groups of {cfg.temporal}: the number must be"
            f" {cfg.temporal}k+1",
            f"nearest allowed: {low} and {high}",
        )
    for name, value in (("height", height), ("width", width)):
        if value < 1 or value % cfg.spatial:
            low, high = neighbours(value, cfg.spatial)
            raise UsageError(
                f"the video's {name} is {value}",
                f"the video VAE shrinks by {cfg.spatial}: it must be a multiple of {cfg.spatial}",
                f"nearest allowed: {low} and {high}",
            )


def _check_latents(shape: tuple[int, ...], cfg: VAEConfig):
    if len(shape) != 5 or 0 in shape or shape[-1] != cfg.latent_channels:
        raise ValueError(
            f"latents have shape {shape}; they must be [b t h w {cfg.latent_channels}], channels"
            " last, none of them 0"
        )


def intermediates(vae: VAE, video=None, latents=None) -> dict:
    """Values inside `encode(video)` and `decode(latents)`, for comparison with PyTorch: names to
    f32 [b c t h w].

    encoder_chunk<i>, encoder_middle, conv1_out (both halves), conv2_out, decoder_middle; conv1 and
    conv2 are the published names of quant_conv and post_quant_conv.
    """
    out = {}
    if video is not None:
        _check_video(video.shape, vae.cfg)
        x = video.astype(vae.cfg.policy.compute_dtype)
        chunks = over_chunks(vae.encoder, x, vae.cfg.temporal)
        out |= {f"encoder_chunk{i}": chunks[:, i : i + 1] for i in range(chunks.shape[1])}
        out["encoder_middle"] = over_chunks(vae.encoder.trunk, x, vae.cfg.temporal)
        out["conv1_out"] = vae.quant_conv(chunks)
    if latents is not None:
        _check_latents(latents.shape, vae.cfg)
        out["conv2_out"] = vae.decoder_input(latents)
        out["decoder_middle"] = over_chunks(vae.decoder.trunk, out["conv2_out"], 1)
    return {
        name: rearrange(x.astype(jnp.float32), "b t h w c -> b c t h w") for name, x in out.items()
    }


def cache_shapes(cfg: VAEConfig, height: int, width: int, *, encode: bool = False):
    """What one clip's decoder (or encoder) carries from one latent frame to the next, as shapes;
    nothing is run."""
    return _cache_shapes(cfg, height, width, encode)  # one trace, however they are named


@functools.cache
def _cache_shapes(cfg: VAEConfig, height: int, width: int, encode: bool):
    vae = as_shapes(VAE, cfg)
    h, w, c = height // cfg.spatial, width // cfg.spatial, cfg.latent_channels
    if encode:
        h, w, c = height, width, COLOURS
    step = lambda vae, x: (vae.encoder if encode else vae.decoder)(x, None)
    x = jax.ShapeDtypeStruct((1, 1, h, w, c), cfg.policy.compute_dtype)
    return jax.eval_shape(step, vae, x)[1]


def cache_bytes(cfg: VAEConfig, height: int, width: int, *, encode: bool = False) -> int:
    leaves = jax.tree.leaves(cache_shapes(cfg, height, width, encode=encode))
    return sum(x.size * x.dtype.itemsize for x in leaves)
