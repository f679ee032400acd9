"""The Wan video transformer: text-to-video and image-to-video, dense or sparse-linear attention,
layers float or of 8 bits.

Same function as thu-ml/TurboDiffusion rcm/networks/wan2pt1.py and wan2pt2.py, with a true LayerNorm
throughout.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from tdjax.config import DiTConfig
from tdjax.models.abstract import as_shapes, drawn, stacked
from tdjax.models.attention import CrossAttention, SelfAttention, TextKV, largest_block
from tdjax.models.linear import LINEAR, PRODUCT, Linear, converted
from tdjax.models.norms import LayerNorm, modulate, sinusoid
from tdjax.models.rope import Rotation, rope
from tdjax.parallel.sharding import constrain, leaf_name, mesh_sizes, missing_tokens
from tdjax.precision import Policy

small = jax.nn.initializers.normal(0.02)
HOST_MEMORY = "pinned_host"
_INPUT = "block_input"  # what a block reads, where it goes to the host's memory


class MLP(nnx.Module):
    """Linear, activation, Linear: [... i] -> [... d]."""

    def __init__(self, i: int, d: int, policy: Policy, *, rngs: nnx.Rngs):
        self.up = Linear(i, d, policy, rngs=rngs, init=small)
        self.down = Linear(d, d, policy, rngs=rngs, init=small)

    def __call__(self, x, activation):
        return self.down(activation(self.up(x)))


class ImageEmbed(nnx.Module):
    """Image features [b 257 image_dim] to the width of the blocks (Wan2.1 image-to-video)."""

    def __init__(self, cfg: DiTConfig, *, rngs: nnx.Rngs):
        i, policy = cfg.image_dim, cfg.policy
        self.norm_in = LayerNorm(i, 1e-5, policy)
        self.up = Linear(i, i, policy, rngs=rngs)
        self.down = Linear(i, cfg.dim, policy, rngs=rngs)
        self.norm_out = LayerNorm(cfg.dim, 1e-5, policy)

    def __call__(self, x):
        return self.norm_out(self.down(jax.nn.gelu(self.up(self.norm_in(x)), approximate=False)))


class ModulatedNorm(nnx.Module):
    """The residual sum and the layer norm that follows it, in one pass: (x + residual gate, its
    norm times 1 + scale plus shift, as the block's linear layers read it)."""

    def __init__(self, cfg: DiTConfig):
        self.cfg = cfg

    @jax.named_scope("norm")
    def __call__(self, x, scale, shift, *, residual=None, gate=None):
        """x and residual [b l d], the others f32 [b 1 d] -> [b l d] twice, the second perhaps
        quantised."""
        cfg = self.cfg
        options = {"eps": cfg.eps, "residual": residual, "gate": gate, "impl": cfg.row_impl}
        return LINEAR[cfg.linear].residual_norm(x, 1 + scale, shift, **options)


class AffineNorm(LayerNorm):
    """`ModulatedNorm` with a scale and a bias of its own."""

    def __init__(self, cfg: DiTConfig):
        super().__init__(cfg.dim, cfg.eps, cfg.policy)
        self.cfg = cfg

    @jax.named_scope("norm")
    def __call__(self, x, *, residual=None, gate=None):
        cfg = self.cfg
        options = {"eps": cfg.eps, "residual": residual, "gate": gate, "impl": cfg.row_impl}
        return LINEAR[cfg.linear].residual_norm(x, self.scale[...], self.bias[...], **options)


class Block(nnx.Module):
    """Modulated self-attention, cross-attention, modulated MLP (Wan, arXiv 2503.20314)."""

    def __init__(self, cfg: DiTConfig, *, rngs: nnx.Rngs):
        linear = LINEAR[cfg.linear]
        self.cfg = cfg
        self.norm1, self.norm2 = ModulatedNorm(cfg), ModulatedNorm(cfg)
        self.self_attn = SelfAttention(cfg, rngs=rngs)
        self.norm3 = AffineNorm(cfg)
        self.cross_attn = CrossAttention(cfg, rngs=rngs)
        self.up = linear(cfg.dim, cfg.ffn_dim, cfg.policy, rngs=rngs, impl=cfg.product_impl)
        self.down = linear(cfg.ffn_dim, cfg.dim, cfg.policy, rngs=rngs, impl=cfg.product_impl)
        self.modulation = nnx.Param(_modulation(rngs, 6, cfg))

    @jax.named_scope("block")
    def __call__(self, x, e, kv: TextKV, rope: Rotation):  # x [b l d], e f32 [b 6 d]
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulations(e)
        x, h = self.norm1(x, scale1, shift1)
        y = self.self_attn(h, rope)
        x, h = self.norm3(x, residual=y, gate=gate1)
        y = self.cross_attn(h, kv)
        x, h = self.norm2(x, scale2, shift2, residual=y)
        return self.mlp(x, h, gate2)

    def modulations(self, e):
        """f32 [b 6 d] -> shift, scale and gate of self-attention, then of the MLP, [b 1 d] each."""
        return rearrange(self.modulation[...].astype(jnp.float32) + e, "b m d -> m b 1 d")

    @jax.named_scope("mlp")
    def mlp(self, stream, x, gate):  # [b l d], x perhaps quantised, gate f32 [b 1 d] -> [b l d]
        return self.down.onto(stream, self.down.gelu_quantized(self.up(x)), gate)


def _modulation(rngs, rows, cfg):
    shape = rows, cfg.dim
    return drawn(jax.random.normal, rngs, shape, cfg.policy.param_dtype) * cfg.dim**-0.5


class Head(nnx.Module):
    """Modulated norm and projection to patches, all in float32."""

    def __init__(self, cfg: DiTConfig, *, rngs: nnx.Rngs):
        kt, kh, kw = cfg.patch
        self.cfg = cfg
        outputs, zeros = kt * kh * kw * cfg.out_channels, jax.nn.initializers.zeros
        self.proj = Linear(cfg.dim, outputs, cfg.policy, rngs=rngs, init=zeros)
        self.modulation = nnx.Param(_modulation(rngs, 2, cfg))

    @jax.named_scope("head")
    def __call__(self, x, e):  # x [b l d], e f32 [b d] -> f32 [b l (kt kh kw c)]
        return self.proj(self.norm(x, e))

    def norm(self, x, e):  # -> f32 [b l d]
        table = self.modulation[...].astype(jnp.float32) + rearrange(e, "b d -> b 1 d")
        shift, scale = rearrange(table, "b m d -> m b 1 d")
        return modulate(x.astype(jnp.float32), scale, shift, self.cfg.eps)


class DiT(nnx.Module):
    """Velocity of noisy latents at a timestep, given text (and the first frame)."""

    def __init__(self, cfg: DiTConfig, *, rngs: nnx.Rngs):
        policy, d = cfg.policy, cfg.dim
        kt, kh, kw = cfg.patch
        self.cfg = cfg
        self.patch_embed = Linear(cfg.embed_channels * kt * kh * kw, d, policy, rngs=rngs)
        self.text_embed = MLP(cfg.text_dim, d, policy, rngs=rngs)
        self.time_embed = MLP(cfg.freq_dim, d, policy, rngs=rngs)
        self.time_proj = Linear(d, 6 * d, policy, rngs=rngs)
        if cfg.image_dim:
            self.image_embed = ImageEmbed(cfg, rngs=rngs)
        self.blocks = stacked(lambda rngs: Block(cfg, rngs=rngs), cfg.layers, rngs)
        self.head = Head(cfg, rngs=rngs)

    def __call__(self, x, timestep, text, image=None, features=None):
        """x f32 [b t h w c], timestep f32 [b] in 0..1000, text [b s text_dim], image [b t h w 20]
        (mask, then latents), features [b 257 image_dim] -> f32 [b t h w c]. Raises ValueError,
        naming the argument, for other shapes."""
        self.check(x=x, timestep=timestep, image=image, text=text, features=features)
        context = self.context(text, features)
        remat = self.cfg.remat
        # Kept activations of a loop are copied into a stack and out of it again; blocks written out
        # one by one hand them over.
        unrolled = functools.partial(lax.scan, unroll=self.cfg.layers)
        scan = unrolled if remat == "none" else functools.partial(_scan_by_number, remat=remat)
        return self.forward(x, timestep, image, lambda attn, _: attn.text_kv(*context), None, scan)

    def text_kv(self, text, features=None) -> TextKV:
        """What every step of a prompt reads alike, for `velocity`: keys and values of all blocks,
        [n b s h k]."""
        self.check(text=text, features=features)
        context = self.context(text, features)
        step = lambda _, attn: (None, attn.text_kv(*context))
        return lax.scan(step, None, self.blocks.cross_attn)[1]

    def velocity(self, x, timestep, kv: TextKV, image=None):
        """`__call__` on text whose keys and values are at hand: x f32 [b t h w c], timestep f32 [b]
        -> f32 [b t h w c]."""
        self.check(x=x, timestep=timestep, image=image)
        # On one device it was as fast either way (docs/performance.md).
        scan = _scan_by_number if mesh_sizes() else lax.scan
        return self.forward(x, timestep, image, lambda _, kv: kv, kv, scan)

    def forward(self, x, timestep, image, kv_of: Callable, kvs, scan: Callable):
        """kv_of(the cross-attention of a block, its part of kvs) -> its TextKV; scan: `lax.scan`,
        or what does the same."""
        grid = self.grid(x)
        table = rotation(grid, self.cfg)

        def step(x, each):
            block, kv = each
            return self.between(block(x, e0, kv_of(block.cross_attn, kv), table)), None

        x, e, e0 = self.begin(x, timestep, image)
        x, _ = scan(step, x, (self.blocks, kvs))
        return self.end(x, e, grid)

    def begin(self, x, timestep, image):
        """What comes before the blocks: x f32 [b t h w c], timestep f32 [b] -> (the stream [b l d],
        e [b d] for the head, e0 [b 6 d] for the blocks)."""
        fill = missing_tokens(math.prod(self.grid(x)), largest_block(self.cfg))
        e, e0 = (constrain(part, "batch") for part in self.time(timestep))
        x = self.patchify(x, image)
        return self.between(jnp.pad(x, ((0, 0), (0, fill), (0, 0))) if fill else x), e, e0

    def end(self, x, e, grid: tuple[int, ...]):
        """What comes after them: [b l d] -> the velocity f32 [b t h w c]."""
        return self.unpatchify(self.head(x, e)[:, : math.prod(grid)], grid)

    def context(self, text, features):
        """(text, features) [b s d] as the cross-attention of every block reads them: quantised once
        for all."""
        attn = self.blocks.cross_attn
        rows = lambda x: constrain(x, "batch", None, None)  # of its samples, on each device
        text = attn.k.quantize_input(rows(self.embed_text(text)))
        if features is None:
            return text, None
        return text, attn.k_img.quantize_input(rows(self.embed_image(features)))

    def grid(self, x) -> tuple[int, int, int]:
        """Patches along t, h and w."""
        return tuple(n // p for n, p in zip(x.shape[1:4], self.cfg.patch, strict=True))

    def between(self, x):
        return constrain(x, "batch", "tokens", None)

    @jax.named_scope("patch_embed")
    def patchify(self, x, image):  # -> [b l d]
        x = x if image is None else jnp.concatenate([x, image.astype(x.dtype)], -1)
        if self.cfg.coordinates:
            places = jnp.broadcast_to(coordinates(x.shape[1:4]), (*x.shape[:4], 3))
            x = jnp.concatenate([x, places.astype(x.dtype)], -1)
        kt, kh, kw = self.cfg.patch
        x = rearrange(x, "b (t kt) (h kh) (w kw) c -> b (t h w) (c kt kh kw)", kt=kt, kh=kh, kw=kw)
        return self.patch_embed(x.astype(self.cfg.policy.compute_dtype))

    def unpatchify(self, x, grid):
        """f32 [b l (kt kh kw c)] -> [b t h w c]; the channel is fastest here, slowest in
        `patchify`."""
        sizes = dict(zip(("t", "h", "w", "kt", "kh", "kw"), (*grid, *self.cfg.patch), strict=True))
        return rearrange(x, "b (t h w) (kt kh kw c) -> b (t kt) (h kh) (w kw) c", **sizes)

    @jax.named_scope("time")
    def time(self, timestep):  # float32 island: f32 [b] -> e [b d], e0 [b 6 d]
        e = self.time_embed(sinusoid(self.rounded(timestep), self.cfg.freq_dim), jax.nn.silu)
        return e, rearrange(self.time_proj(jax.nn.silu(e)), "b (m d) -> b m d", m=6)

    def rounded(self, timestep):
        """The timestep on the bfloat16 grid that published weights were trained on; its derivative
        is that of the identity.

        A cast there and back may be removed by the compiler; reduce_precision may not.
        """
        if not self.cfg.round_time:
            return timestep
        return timestep + lax.stop_gradient(lax.reduce_precision(timestep, 8, 7) - timestep)

    @jax.named_scope("text_embed")
    def embed_text(self, text):  # [b s text_dim] -> [b s d]
        return self.text_embed(text.astype(self.cfg.policy.compute_dtype), jax.nn.gelu)

    @jax.named_scope("image_embed")
    def embed_image(self, features):  # [b 257 image_dim] -> [b 257 d]
        return self.image_embed(features.astype(self.cfg.policy.compute_dtype))

    def check(self, **inputs):
        """Raise ValueError, naming the argument, where one of x, timestep, text, image, features
        does not fit the config."""
        cfg = self.cfg
        shapes = {
            "x": ("b", "t", "h", "w", cfg.out_channels),
            "timestep": ("b",),
            "text": ("b", "s", cfg.text_dim),
            "image": ("b", "t", "h", "w", cfg.condition_channels),
            "features": ("b", "s", cfg.image_dim),
        }
        for name, value in inputs.items():
            shape = shapes[name] if all(shapes[name]) else None
            if (value is None) != (shape is None):
                raise ValueError(
                    f"DiT: {name} is {'missing' if value is None else 'given'}, but this model"
                    f" takes {shape or 'none'}"
                )
            if shape and not _fits(value.shape, shape):
                raise ValueError(f"DiT: {name} has shape {value.shape}; expected {shape}")
        x = inputs.get("x")
        if x is not None and any(n % p for n, p in zip(x.shape[1:4], cfg.patch, strict=True)):
            raise ValueError(
                f"DiT: latents of {x.shape[1:4]} frames, rows and columns are not multiples of the"
                f" patch {cfg.patch}"
            )


def _scan_by_number(step: Callable, x, stacked, remat: str = "none"):
    """`lax.scan`, whose turns are computed again as `_again` says. Each turn reads its number from
    memory: of slices by the loop's own counter XLA makes copies on other streams, for each of which
    the kernels wait, and which divide the graphs of kernels."""
    count = len(jax.tree.leaves(stacked)[0])
    numbers = lax.optimization_barrier(jnp.arange(count))

    def turn(x, each):
        i, own = each
        return step(x, jax.tree.map(lambda all_, one: _row(all_, i, one), stacked, own))

    return lax.scan(_again(turn, remat), x, (numbers, stacked))


@jax.custom_jvp
def _row(stacked, i, own):
    """Row i of `stacked`, whose derivative is that of `own`, the same row as a loop hands it over:
    gradients are stacked, where those of rows taken by number would be added to zeros of all."""
    return lax.dynamic_index_in_dim(stacked, i, 0, False)


@_row.defjvp
def _(primals, tangents):
    return _row(*primals), tangents[2]


def rotation(grid: tuple[int, ...], cfg: DiTConfig) -> Rotation:
    """Angles of the tokens of a grid, with what is missing on a mesh."""
    fill = missing_tokens(math.prod(grid), largest_block(cfg))
    return rope(grid, cfg.head_dim).filled(fill)


def with_low_rank(model: DiT, factors: Mapping[str, tuple]) -> DiT:
    """The same model with factors of LoRA files beside 8-bit layers: {a layer's name, such as
    blocks.self_attn.q: (down [n r i], up [n o r])}, arrays or shapes."""
    model = jax.tree.map(lambda leaf: leaf, model)
    for name, (down, up) in sorted(factors.items()):
        layer = functools.reduce(getattr, name.split("."), model)
        layer.low_rank_down = nnx.data(nnx.Variable(down))
        layer.low_rank_up = nnx.data(nnx.Variable(up))
    return model


def without_blocks(model: DiT) -> DiT:
    """The same model without the leaves of its blocks; `begin` and `end` need none of them."""
    absent = lambda path, leaf: None if leaf_name(path).startswith("blocks.") else leaf
    return jax.tree_util.tree_map_with_path(absent, model)


def _again(step: Callable, remat: str) -> Callable:
    """A block's step that the backward pass computes again, but for what a policy of
    `tdjax.config.REMAT` keeps."""
    policies = jax.checkpoint_policies
    match remat:
        case "none":
            return step
        case "block":
            return jax.checkpoint(step)
        case "products":
            named = policies.save_only_these_names(PRODUCT)
            dots = policies.dots_with_no_batch_dims_saveable  # of 8-bit bases
            return jax.checkpoint(step, policy=policies.save_from_both_policies(named, dots))
    policy = policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[_INPUT],
        offload_src="device",
        offload_dst=HOST_MEMORY,
    )
    return jax.checkpoint(lambda x, each: step(checkpoint_name(x, _INPUT), each), policy=policy)


def _fits(shape: tuple[int, ...], expected: tuple) -> bool:
    """Whether a shape has the numbers of `expected`, in which names stand for any number."""
    if len(shape) != len(expected):
        return False
    return all(n == m for n, m in zip(expected, shape, strict=True) if isinstance(n, int))


def coordinates(shape: tuple[int, int, int]):  # -> f32 [t h w 3]
    """Each place's t, h and w, from -1 to 1 over the clip; 0 along an axis of one."""
    one = np.zeros(1, np.float32)
    axes = [np.linspace(-1, 1, n, dtype=np.float32) if n > 1 else one for n in shape]
    return jnp.stack(jnp.meshgrid(*axes, indexing="ij"), -1)


def with_compute(model: DiT, compute: str) -> DiT:
    """The same weights in a model that computes in another dtype (a name: "float32", "bfloat16",
    "float16")."""
    policy = dataclasses.replace(model.cfg.policy, compute=compute)
    cfg = dataclasses.replace(model.cfg, policy=policy)
    structure = jax.tree.structure(as_shapes(DiT, cfg))
    return jax.tree.unflatten(structure, jax.tree.leaves(model))


def with_linear(model: DiT, linear: str, *, free: bool = False) -> DiT:
    """The same model with the blocks' linear layers of another kind of `tdjax.config.LINEAR`, made
    leaf by leaf.

    free: delete the layers of the given model on the way, so that no more than one of them is held
    twice.
    """
    if linear == model.cfg.linear:
        return model
    old, new = LINEAR[model.cfg.linear].leaves, LINEAR[linear].leaves
    leaves = {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(model)}
    cfg = dataclasses.replace(model.cfg, linear=linear)
    abstract = as_shapes(DiT, cfg)
    shapes = {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(abstract)}
    for name, shape in shapes.items():
        stem, _, last = name.rpartition(".")
        if last == new[0] and f"{stem}.{old[0]}" in leaves:
            given = tuple(leaves.pop(f"{stem}.{last}") for last in old)
            made = converted(given, old=model.cfg.linear, new=linear, dtype=shape.dtype)
            leaves |= {f"{stem}.{last}": leaf for last, leaf in zip(new, made, strict=True)}
            if free:
                jax.block_until_ready(made)
                for leaf in given:
                    leaf.delete()
    return jax.tree_util.tree_map_with_path(lambda path, _: leaves[leaf_name(path)], abstract)
