"""Where arrays lie on a mesh: a table from leaf names to axis names, and one from axis names to
mesh axes.

The networks know only `constrain` and the functions `over_*`, under which kernels run: the compiler
does not divide those itself. Without a mesh (`jax.set_mesh`, Auto axes) they do nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

TOKENS = "seq"  # the mesh axis that tokens are divided over
COPIES = "data"  # that of copies of all, which have samples of their own
GUIDANCE = "guidance"  # that of the halves of a doubled batch
MOST_FILL = 1 / 64  # of the tokens, for blocks that are whole on each device

# Pattern of a leaf name (whole) -> the names of its axes; every leaf of every network matches
# exactly one row.
PARAM_AXES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    # transformer and text encoder, blocks stacked on axis n
    (r"blocks\.(self_|cross_)?attn\.(q|k|v|k_img|v_img)\.kernel", ("n", "embed", "heads")),
    (r"blocks\.(self_|cross_)?attn\.(q|k|v|k_img|v_img)\.bias", ("n", "heads")),
    (r"blocks\.(self_|cross_)?attn\.o\.kernel", ("n", "heads", "embed")),
    (r"blocks\.(up|gate)\.kernel", ("n", "embed", "mlp")),
    (r"blocks\.up\.bias", ("n", "mlp")),
    (r"blocks\.down\.kernel", ("n", "mlp", "embed")),
    (r"blocks\.((self|cross)_attn\.o|down)\.bias", ("n", None)),
    # 8 bits: weights are [o i]; the scales of tiles and of channels stay whole, numbers of tiles
    # seldom divide
    (r"blocks\.(self|cross)_attn\.(q|k|v|k_img|v_img)\.(int8_)?weight", ("n", "heads", "embed")),
    (r"blocks\.(self|cross)_attn\.o\.(int8_)?weight", ("n", "embed", "heads")),
    (r"blocks\.up\.(int8_)?weight", ("n", "mlp", "embed")),
    (r"blocks\.down\.(int8_)?weight", ("n", "embed", "mlp")),
    (r"blocks\.((self|cross)_attn\.\w+|up|down)\.(weight_)?scale", ("n",)),
    (r"blocks\.((self|cross)_attn\.\w+|up|down)\.low_rank_(down|up)", ("n",)),
    # whole: norms, modulation, SLA projection, position bias
    (
        r"blocks\.(norm\d\.(scale|bias)|modulation|relative_bias"
        r"|self_attn\.core\.proj\.(kernel|bias))",
        ("n",),
    ),
    # around the blocks of the transformer
    (
        r"(patch_embed|text_embed\.(up|down)|time_embed\.(up|down)|time_proj)\.kernel",
        (None, "embed"),
    ),
    (r"image_embed\.(up|down)\.kernel", (None, "embed")),
    (r"head\.proj\.kernel", ("embed", None)),
    (
        r"((patch_embed|(text|time|image)_embed\.(up|down)|time_proj|head\.proj)\.bias"
        r"|head\.modulation)",
        (),
    ),
    (r"image_embed\.norm_(in|out)\.(scale|bias)", ()),
    # text encoder
    (r"embed\.embedding", ("vocab", "embed")),
    (r"norm\.scale", ()),
    # the weights of the video VAE are small and whole on every device; its frames are divided
    # (`parallel/space.py`)
    (r"((encoder|decoder)\.|(post_)?quant_conv\.).*", ()),
)

# Axis name -> mesh axis, or several. A mesh axis that the mesh lacks, or that does not divide an
# array's axis, is not used. Under guidance each sample is there twice, one after the other, and
# the two lie apart. A batch that is not doubled has one sample for each copy: what comes after that
# axis does not divide it.
RULES: dict[str, tuple[str, ...]] = {
    "n": (),
    "vocab": ("tensor",),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "halves": (GUIDANCE,),
    "batch": (COPIES, GUIDANCE, "fsdp"),
    "tokens": ("seq",),
    "groups": (),  # of heads that are about to change devices, or have
    "channels": ("tensor",),  # of a product's output
}

# The same while training: weights, averages and moments are divided over all devices but copies
# for data, and gathered for each product; a sequence axis would else cost a whole copy each.
TRAINING_RULES = RULES | {"embed": ("fsdp", "seq")}


def leaf_name(path) -> str:
    """A pytree path of a module as the name of its leaf: attribute names and indices joined by
    dots."""
    keys = [
        str(getattr(key, "name", getattr(key, "key", getattr(key, "idx", key)))) for key in path
    ]
    return ".".join(keys[:-1] if keys and keys[-1] == "value" else keys)


def axes_of(name: str) -> tuple[str | None, ...]:
    """Axis names of one leaf; ValueError unless exactly one row of PARAM_AXES matches."""
    rows = [(pattern, axes) for pattern, axes in PARAM_AXES if re.fullmatch(pattern, name)]
    if len(rows) != 1:
        found = ", ".join(pattern for pattern, _ in rows) or "none"
        raise ValueError(
            f"leaf {name} must match exactly one row of tdjax.parallel.sharding.PARAM_AXES;"
            f" matches: {found}"
        )
    return rows[0][1]


def spec(
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    sizes: dict[str, int],
    rules: Mapping[str, tuple[str, ...]] = RULES,
) -> PartitionSpec:
    """The partition of an array with these axis names over mesh axes of these sizes."""
    parts, used = [], set()
    for dim, axis in zip(shape, axes, strict=False):
        rule = rules[axis] if axis else ()
        names = tuple(m for m in rule if sizes.get(m, 1) > 1 and m not in used)
        while names and dim % math.prod(sizes[m] for m in names):
            names = names[:-1]
        used.update(names)
        one = names[0] if names else None
        parts.append(names if len(names) > 1 else one)
    return PartitionSpec(*parts)


def shardings(module, mesh: jax.sharding.Mesh, rules: Mapping[str, tuple[str, ...]] = RULES):
    """A NamedSharding for every leaf of an (abstract) module, as the same pytree."""
    sizes = dict(mesh.shape)

    def one(path, leaf):
        return NamedSharding(mesh, spec(leaf.shape, axes_of(leaf_name(path)), sizes, rules))

    return jax.tree_util.tree_map_with_path(one, module)


def mesh_sizes() -> dict[str, int]:
    """Sizes of the current mesh's axes that the compiler partitions; empty without a mesh and
    inside shard_map."""
    mesh = jax.sharding.get_abstract_mesh()
    auto = jax.sharding.AxisType.Auto
    return {
        name: mesh.shape[name]
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == auto
    }


def constrain(x, *axes: str | None):
    """Lay activations over the current mesh by axis names ("batch", "tokens", ...); without a mesh,
    x itself."""
    sizes = mesh_sizes()
    return jax.lax.with_sharding_constraint(x, spec(x.shape, axes, sizes)) if sizes else x


def twice(x):  # [b ...] -> [2b ...]
    """Each row of x twice, for its prompt and for its negative prompt; on a mesh, where each of the
    two is computed."""
    if len(x) == 1 and not _divides_halves():
        return jnp.concatenate([x, x])
    both = jnp.broadcast_to(x[:, None], (len(x), 2, *x.shape[1:]))
    return constrain(rearrange(constrain(both, "batch", "halves"), "b g ... -> (b g) ..."), "batch")


def halves(v):  # [2b ...] -> [b ...] twice
    """What comes of the two of each row of `twice`, both of them on every device that has the row:
    one exchange, on a mesh with an axis for them."""
    if len(v) == 2 and not _divides_halves():
        return jnp.split(v, 2)
    both = constrain(rearrange(v, "(b g) ... -> b g ...", g=2), "batch", "halves")
    both = constrain(both, "batch", None)
    return both[:, 0], both[:, 1]


def _divides_halves() -> bool:
    return mesh_sizes().get(GUIDANCE, 1) > 1


def missing_tokens(count: int, block: int = 1) -> int:
    """Returns how many tokens fill up the axis that the current mesh divides them over: to whole
    blocks of so many on each device where that adds little, so that none lies on two, and to equal
    shares elsewhere."""
    devices = mesh_sizes().get(TOKENS, 1)
    if devices == 1:
        return 0
    share = -(-count // devices)
    whole = -(-share // block) * block
    return devices * (whole if whole - share <= share * MOST_FILL else share) - count


def head_groups(heads: int) -> int:
    """Returns how many groups of neighbouring heads [groups b l h/groups k] there are for
    `to_heads`: 1, and [b l h k], where none change devices, or they do not come out even."""
    sizes = mesh_sizes()
    devices = sizes.get(TOKENS, 1)
    return 1 if heads % devices or sizes.get("tensor", 1) > 1 else devices


def blocks_lie_whole(tokens: int, size: int, heads: int) -> bool:
    """Returns whether no block of `size` tokens lies on two devices of the current mesh, nor heads
    where they do not come out even."""
    devices = mesh_sizes().get(TOKENS, 1)
    return devices == 1 or (tokens % (devices * size) == 0 and head_groups(heads) == devices)


def one_by_one(done, x):
    """(done, x), as they are. Where tokens are exchanged for heads, what is computed of x from here
    on comes after `done`: the compiler alone would exchange everything in one place, and compute
    nothing meanwhile."""
    if mesh_sizes().get(TOKENS, 1) == 1:
        return done, x
    leaves, structure = jax.tree.flatten((done, x))
    held = [isinstance(leaf, jax.Array) for leaf in leaves]  # beside arrays there may be dtypes
    arrays = [leaf for leaf, array in zip(leaves, held, strict=True) if array]
    after = iter(lax.optimization_barrier(arrays))
    return structure.unflatten(
        next(after) if array else leaf for leaf, array in zip(leaves, held, strict=True)
    )


def to_heads(x):  # [groups b l h/groups k] -> [b l h k]
    """Every token of some heads on each device, by one exchange, where x comes in `head_groups`; x
    itself, [b l h k], elsewhere."""
    if x.ndim == 4:
        return x
    here, there = _layouts(x.shape[1:])
    run = lambda x: rearrange(_exchanged(x), "n b l h k -> b (n l) h k")
    return jax.shard_map(run, in_specs=here, out_specs=there, check_vma=False)(x)


def to_tokens(y):  # [b l h k] -> [groups b l h/groups k]
    """Every head of some tokens on each device, by one exchange, in `head_groups`; y itself where
    there is one group."""
    groups = head_groups(y.shape[2])
    if groups == 1:
        return y
    here, there = _layouts(y.shape)
    run = lambda y: _exchanged(rearrange(y, "b (n l) h k -> n b l h k", n=groups))
    return jax.shard_map(run, in_specs=there, out_specs=here, check_vma=False)(y)


def _layouts(shape) -> tuple[PartitionSpec, PartitionSpec]:  # of [b l h k]
    """In groups with tokens divided, and with heads divided instead."""
    batch, tokens = spec(shape, ("batch", "tokens"), mesh_sizes())
    return PartitionSpec(None, batch, tokens), PartitionSpec(batch, None, TOKENS)


def over_heads(op, q, k, v, *shared, means=(), tokens: int | None = None):  # q k v [b l h k]
    """op(q, k, v, *shared, *means) with samples and heads divided over the mesh: each device sees
    every token of its heads. The result lies as q, k and v do: after `to_heads`.

    Where there is one of `head_groups` and tokens are divided, exchanges within bring them to their
    heads and the result back; heads that do not divide are filled up with zeros.
    means f32 [b h n k]: of the blocks of tokens, n divided as they are. tokens: how many of l are
    the clip's; op does not see the others.
    """
    sizes = mesh_sizes()
    if not sizes:
        return op(q, k, v, *shared, *means)
    lies = spec(q.shape, ("batch", "tokens", "heads", None), sizes)
    devices = sizes[TOKENS] if lies[1] == TOKENS else 1
    of_means = PartitionSpec(lies[0], lies[2], lies[1])
    there = head_groups(q.shape[2]) == devices
    lies = PartitionSpec(lies[0], None, TOKENS) if there and devices > 1 else lies
    moved = 1 if there else devices

    def run(q, k, v, shared, means):
        heads, rows = q.shape[2], q.shape[1] * moved
        count = rows if tokens is None else tokens
        q, k, v = (_all_tokens(x, moved)[:, :count] for x in (q, k, v))
        y = op(q, k, v, *shared, *_means_to_heads(means, devices))
        y = jnp.pad(y, ((0, 0), (0, rows - count), (0, 0), (0, 0)))
        return _all_heads(y, moved)[:, :, :heads]

    return jax.shard_map(
        run,
        in_specs=(lies, lies, lies, PartitionSpec(), of_means),
        out_specs=lies,
        check_vma=False,
    )(q, k, v, shared, means)


def _all_tokens(x, devices: int):  # [b l/n h k] -> [b l ceil(h/n) k]
    if devices == 1:
        return x
    x = jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % devices), (0, 0)))
    x = _exchanged(rearrange(x, "b l (n h) k -> n b l h k", n=devices))
    return rearrange(x, "n b l h k -> b (n l) h k")


def _all_heads(y, devices: int):  # [b l h k] -> [b l/n h*n k]
    if devices == 1:
        return y
    y = _exchanged(rearrange(y, "b (n l) h k -> n b l h k", n=devices))
    return rearrange(y, "n b l h k -> b l (n h) k")


def _means_to_heads(means, devices: int) -> list:  # each [b h n/d k] -> [b h/d n k]
    """One exchange for all."""
    if devices == 1 or not means:
        return list(means)
    joined = rearrange(jnp.concatenate(means, 2), "b (d h) n k -> d b h n k", d=devices)
    ends = np.cumsum([x.shape[2] for x in means])[:-1].tolist()
    parts = jnp.split(_exchanged(joined), ends, 3)
    return [rearrange(x, "d b h n k -> b h (d n) k") for x in parts]


def _exchanged(parts):  # [n ...]
    """Part i goes to device i; those that come, by the device that they come from."""
    return lax.all_to_all(parts, TOKENS, split_axis=0, concat_axis=0, tiled=True)


def over_queries(op, q, k, v):  # q [b l h k], k v [b s h k]
    """op(q, k, v) with samples, heads and the queries' tokens divided over the mesh; each device
    sees all keys and values of its heads."""
    sizes = mesh_sizes()
    if not sizes:
        return op(q, k, v)
    queries = spec(q.shape, ("batch", "tokens", "heads", None), sizes)
    keys = spec(k.shape, ("batch", None, "heads", None), sizes)
    specs = queries, keys, keys
    return jax.shard_map(op, in_specs=specs, out_specs=queries, check_vma=False)(q, k, v)


def over_tokens(op, *arrays, axes=("batch", "tokens"), out=None):
    """op(*arrays) with samples and tokens divided over the mesh. axes: the first ones of every
    array, which may be 1 long; out: those of each output, by default `axes` for all."""
    sizes = mesh_sizes()
    if not sizes:
        return op(*arrays)
    specs = tuple(spec(a.shape, axes, sizes) for a in arrays)
    lies = dict(zip(axes, specs[0], strict=True))
    out_specs = specs[0]
    if out is not None:
        out_specs = tuple(PartitionSpec(*(lies.get(axis) for axis in each)) for each in out)
    return jax.shard_map(op, in_specs=specs, out_specs=out_specs, check_vma=False)(*arrays)


def over_samples(op, of_samples, shared):  # arrays [b ...], or [n ...] of tiles; and others
    """op(of_samples, shared), its outputs [b ...] or [n ...], with samples divided over copies and
    halves of a guided step: tiles that run across samples end with those of a device. Tokens and
    channels are left to the compiler."""
    sizes = {m: n for m, n in mesh_sizes().items() if m in (COPIES, GUIDANCE)}
    lies = PartitionSpec(spec(of_samples[0].shape, ("batch",), sizes)[0])
    if not _axes(lies[0]):
        return op(of_samples, shared)
    names = {*_axes(lies[0])}
    specs = lies, PartitionSpec()
    return jax.shard_map(op, in_specs=specs, out_specs=lies, axis_names=names, check_vma=False)(
        of_samples, shared
    )


def over_channels(op, of_tokens, of_channels, onto=(), groups: int = 1):
    """op(of_tokens, of_channels, onto) with samples, tokens and output channels divided over the
    mesh: arrays [b l ...], and [o ...], or None, and [b l o] or [b 1 o] -> [b l o], or in more than
    one of `head_groups` [groups b l o/groups]."""
    sizes = mesh_sizes()
    if not sizes:
        return op(of_tokens, of_channels, onto)
    rows = spec(of_tokens[0].shape, ("batch", "tokens"), sizes)
    channels = spec(of_channels[0].shape, ("channels",), sizes)
    outputs = PartitionSpec(*rows, *channels)
    alike = PartitionSpec(rows[0], None, *channels)  # for all tokens
    each = tuple(outputs if a.shape[1] > 1 else alike for a in onto)
    return jax.shard_map(
        op,
        in_specs=(rows, channels, each),
        out_specs=PartitionSpec(None, *rows) if groups > 1 else outputs,
        check_vma=False,
    )(of_tokens, of_channels, onto)


def of_each_group(x, kernel):  # [b l i], [i o] -> [b l o]
    """x kernel in x.dtype, by a copy of the kernel for each group of devices that has tokens of its
    own: the kernel's gradient is cast to the kernel's dtype before groups are summed."""
    sizes = mesh_sizes()
    lies = spec(x.shape, ("batch", "tokens"), sizes) if x.ndim == 3 else (None, None)
    m, n = (math.prod(sizes[axis] for axis in _axes(part)) for part in lies)
    if m * n == 1:
        return jnp.matmul(x, kernel.astype(x.dtype), precision=lax.Precision.HIGHEST)
    free = PartitionSpec.UNCONSTRAINED
    over = PartitionSpec((*_axes(lies[0]), *_axes(lies[1])), free, free)
    copies = lax.with_sharding_constraint(jnp.broadcast_to(kernel, (m * n, *kernel.shape)), over)
    rows = rearrange(x, "(m b) (n l) i -> (m n) b l i", m=m, n=n)
    y = jnp.einsum("gbli,gio->gblo", rows, copies.astype(x.dtype), precision=lax.Precision.HIGHEST)
    return rearrange(y, "(m n) b l o -> (m b) (n l) o", m=m, n=n)


def _axes(part) -> tuple[str, ...]:
    """Mesh axes of one entry of a PartitionSpec."""
    return part if isinstance(part, tuple) else (part,) if part else ()
