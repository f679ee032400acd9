"""LoRA files on a transformer that is loaded: put on and taken off without its file being read
again, and without another program.

They are merged into floats on the device. Before that, the leaves that they touch go to the host,
and come back bit by bit when the files change: a merged network costs nothing at a step, and taking
a LoRA off leaves no trace.

Beside weights of 8 bits low-rank changes are a second product, y = W x + up (down x): most are
smaller than a step of the quantised weights, and would be rounded away with them. Their ranks are
side by side, filled up to a power of two, and the strength is in `up`: one program serves every
file of such a rank. Changes of other forms are added and quantised again.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import einops
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tdjax.checkpoints import orbax
from tdjax.checkpoints.published import detect
from tdjax.checkpoints.published.lora import Change, changes_of, left_out_note
from tdjax.checkpoints.published.rules import Row, invert
from tdjax.config import DiTConfig
from tdjax.errors import CheckpointError
from tdjax.models.linear import LINEAR
from tdjax.models.wan_dit import HOST_MEMORY, with_low_rank, without_blocks
from tdjax.parallel import hosts
from tdjax.pipeline.options import Lora, lora_pairs, refuse_experts
from tdjax.pipeline.streaming import Streamed, block_of, waiting, with_one_block

if TYPE_CHECKING:
    from tdjax.pipeline.components import Component

LEAST_RANK = 16
READERS = 8  # threads that read a file
FACTOR = ".low_rank_"  # within the names of leaves beside weights
NAMING = "turbo"  # of the tensors that changes are found for: each has its leaf's own values


@dataclasses.dataclass(frozen=True)
class _Place:
    """A tensor by its published name: a leaf of the float network, and a layer of it or None."""

    leaf: str
    layer: int | None
    row: Row
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Chosen:
    """LoRA files that fit a network. files: (file, weight) pairs; notes: lines for the user.
    beside: {leaf of the float network: rank} of those that stand beside 8-bit weights."""

    files: tuple[tuple[str, float], ...]
    notes: list[str]
    changes: dict[str, list[tuple[_Place, Change]]]
    beside: dict[str, int] = dataclasses.field(default_factory=dict)

    def of(self, block: int | None) -> Chosen:
        """Returns what changes one block, as those of a network of one layer; None: what changes
        the rest."""
        changes = {
            name: [
                (place if block is None else dataclasses.replace(place, layer=0), change)
                for place, change in each
                if name.startswith("blocks.") == (block is not None)
                and (block is None or place.layer == block)
            ]
            for name, each in self.changes.items()
        }
        beside = {} if block is None else self.beside
        return Chosen(self.files, [], {n: each for n, each in changes.items() if each}, beside)


def choose(files: tuple[tuple[str, float], ...], cfg: DiTConfig, low_noise: bool) -> Chosen:
    """Opens (file, weight) pairs for a network; nothing is merged yet. low_noise: it is the
    low-noise one of two experts. Raises CheckpointError."""
    quantized = cfg.linear != "float"
    cfg = dataclasses.replace(cfg, linear="float")
    places = _places(cfg)
    found = detect.Detected("dit", NAMING, cfg, detect.rows("dit", NAMING, cfg))
    changes: dict[str, list[tuple[_Place, Change]]] = {}
    notes = []
    for file, weight in files:
        made, counts = changes_of(places, found, file, weight, low_noise)
        note = left_out_note(counts)
        notes += [note] if note else []
        for change in made:
            place = places[change.key]
            changes.setdefault(place.leaf, []).append((place, change))
    ranks = {}
    if quantized:
        ranks = {name: _rank(each) for name, each in changes.items() if _beside(name, each)}
    return Chosen(files, notes, changes, ranks)


def adapt(
    components: Mapping[str, Component], lora: Lora, lora_high: Lora, lora_low: Lora
) -> list[str]:
    """Merges LoRA files into the transformers of a pipeline, in place of those merged so before;
    arguments as those of `tdjax.load`. Returns lines for the user. Raises CheckpointError and
    UsageError, before any change."""
    if "dit_low" not in components:
        refuse_experts(lora_high, lora_low)
    both = lora_pairs("lora", lora)
    own = {"dit": ("lora_high", lora_high), "dit_low": ("lora_low", lora_low)}
    dits = {name: components[name] for name in own if name in components}
    chosen = {
        name: choose((*dit.beside, *both, *lora_pairs(*own[name])), dit.config, name == "dit_low")
        for name, dit in dits.items()
    }
    ranks: dict[str, int] = {}  # of two experts, which run one program
    for each in chosen.values():
        ranks |= {name: max(rank, ranks.get(name, 0)) for name, rank in each.beside.items()}
    for each in chosen.values():  # one of which may change a layer in a form that is added
        ranks = {n: r for n, r in ranks.items() if _beside(n, each.changes.get(n, []))}
    for name, dit in dits.items():
        dit.adapt(dataclasses.replace(chosen[name], beside=ranks))
    return [line for each in chosen.values() for line in each.notes]


class Adapters:
    """What is merged into one transformer, and the leaves as they were, on the host.

    locked: these are in page-locked memory, of which a process has a limited amount.
    """

    def __init__(self, locked: bool = True):
        self.chosen = Chosen((), [], {})
        self._locked = locked
        self._base: dict[str, tuple[np.ndarray | jax.Array, ...]] = {}
        self._pieces: dict[int | None, Adapters] = {}  # of a `Streamed`: its blocks, and the rest

    def merged(self, module: Any) -> Any:
        """Returns the module with the chosen files and no others. The module that is given is not
        to be used again, not even after an error: each of its leaves that changes is deleted as
        the new one is there, as a device may not hold all of them twice."""
        if isinstance(module, Streamed):
            return self._merged_streamed(module)
        leaves = orbax.named_leaves(module)
        for name in [name for name in leaves if FACTOR in name]:
            leaves.pop(name).delete()
        linear = LINEAR[module.cfg.linear].leaves
        merged = {n: x for n, x in self.chosen.changes.items() if n not in self.chosen.beside}
        parts = {name: _parts(name, leaves, linear) for name in {**self._base, **merged}}
        kinds = {n: _kind(n, parts[n], module.cfg.linear) for n in merged}
        base = {}
        with ThreadPoolExecutor(READERS) as pool:
            products = {
                name: pool.submit(_read, each, len(leaves[parts[name][0]]))
                for name, each in merged.items()
                if kinds[name] and all(change.factors for _, change in each)
            }
            for name, own in parts.items():
                # Bound to their device from the first time on, as the sum is compiled for that.
                old = tuple(hosts.place(leaves[part], leaves[part].sharding) for part in own)
                known = self._base.get(name)
                if known:
                    old = _restored(old, known)
                if name in merged:
                    base[name] = known or jax.block_until_ready(tuple(map(self._kept, old)))
                    given = products.pop(name).result() if name in products else None
                    old = _changed(old, merged[name], kinds[name], given)
                leaves |= zip(own, old, strict=True)
        self._base = base
        plain = orbax.assemble(orbax.abstract("dit", module.cfg), leaves)
        return with_low_rank(plain, self._factors(module.cfg, next(iter(leaves.values())).sharding))

    def _kept(self, leaf: jax.Array) -> np.ndarray | jax.Array:
        """A leaf in the host's memory: page-locked where it lies on one device, to which it then
        comes back at the speed of the bus; once for all devices of a mesh."""
        if self._locked and len(leaf.sharding.device_set) == 1:
            return jax.device_put(leaf, leaf.sharding.with_memory_kind(HOST_MEMORY))
        return hosts.whole(leaf)

    def abstract(self, module: Any, sharding: Any = None) -> Any:
        """Returns a network as shapes, with those of the factors beside its weights."""
        cfg = module.cfg
        shape = lambda x: jax.ShapeDtypeStruct(x, cfg.policy.param_dtype, sharding=sharding)
        return with_low_rank(
            module, {name: tuple(map(shape, two)) for name, two in self._shapes(cfg).items()}
        )

    def factor_bytes(self, cfg: DiTConfig) -> int:
        """Returns the bytes of all factors beside weights; on a mesh every device has them all."""
        if not self.chosen.beside:
            return 0
        numbers = sum(math.prod(one) for two in self._shapes(cfg).values() for one in two)
        return numbers * np.dtype(cfg.policy.param_dtype).itemsize

    def _shapes(self, cfg: DiTConfig) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
        """{layer: shapes of its factors}."""
        leaves = orbax.named_leaves(orbax.abstract("dit", dataclasses.replace(cfg, linear="float")))
        out = {}
        for name, rank in self.chosen.beside.items():
            count, inputs, outputs = leaves[name].shape
            layer = name.removesuffix(".kernel")
            out[layer] = (count, rank, inputs), (count, outputs, rank)
        return out

    def _factors(self, cfg: DiTConfig, like: jax.sharding.Sharding) -> dict[str, tuple]:
        """{layer: its factors on the device}; zero where no file changes it. like: a sharding of
        the network's leaves."""
        if isinstance(like, jax.sharding.NamedSharding):
            like = jax.sharding.NamedSharding(like.mesh, jax.sharding.PartitionSpec())
        shapes = self._shapes(cfg)
        changes = {n: self.chosen.changes.get(f"{n}.kernel", []) for n in shapes}

        def make(layer: str) -> tuple:
            given = _side_by_side(changes[layer], *shapes[layer])
            return _scaled(*(hosts.place(x, like) for x in given), dtype=cfg.policy.param_dtype)

        # Programs of different shapes are compiled beside each other, the first time.
        with ThreadPoolExecutor(READERS) as pool:
            made = dict(zip(shapes, pool.map(make, shapes), strict=True))
        for layer, (_, _, finite) in made.items():  # when all are on their way
            _check(changes[layer], finite)
        return {layer: (down, up) for layer, (down, up, _) in made.items()}

    def _merged_streamed(self, module: Streamed) -> Streamed:
        """The same block by block, each on the device in its turn."""
        outer, blocks = module.outer, list(module.blocks)
        like = self.abstract(orbax.abstract("dit", outer.cfg)).blocks
        for at in (None, *range(len(blocks))):
            part = self._pieces.setdefault(at, Adapters(locked=False))  # the blocks are
            part.chosen = self.chosen.of(at)
            touched = part.chosen.changes or part.chosen.beside or part._base
            if at is not None:
                touched = touched or any(FACTOR in n for n in orbax.named_leaves(blocks[at]))
            if not touched:
                continue
            made = part.merged(with_one_block(outer, blocks[at or 0]))
            if at is None:
                leaves = jax.tree.leaves(without_blocks(made))
                outer = jax.tree.unflatten(jax.tree.structure(outer), leaves)
                continue
            before, block = blocks[at], block_of(made, like)
            blocks[at] = jax.block_until_ready(jax.device_put(block, waiting()))
            jax.tree.map(lambda x: x.delete(), before)
        return Streamed(outer, tuple(blocks))

    def forget(self) -> None:
        """The module is gone: there is nothing to take off."""
        self._base, self._pieces = {}, {}


@functools.lru_cache(maxsize=4)
def _places(cfg: DiTConfig) -> dict[str, _Place]:
    """{published key: where its values are} of a float network."""
    leaves = orbax.named_leaves(orbax.abstract("dit", cfg))
    out = {}
    for leaf, row, keys in invert(leaves, detect.rows("dit", NAMING, cfg)):
        shape = leaves[leaf].shape[1:] if row.stacked else leaves[leaf].shape
        if row.layout:
            zeros = np.broadcast_to(np.int8(0), shape)
            shape = einops.rearrange(zeros, row.inverse_layout).shape
        out |= {key: _Place(leaf, layer, row, tuple(shape)) for layer, key in keys}
    return out


def _parts(name: str, leaves: dict[str, Any], linear: tuple[str, ...]) -> tuple[str, ...]:
    """The leaves that hold a leaf of the float network: itself, or values and scales."""
    if name in leaves:
        return (name,)
    stem = name.rpartition(".")[0]
    return tuple(f"{stem}.{part}" for part in linear)


def _kind(name: str, parts: tuple[str, ...], linear: str) -> str | None:
    """How the weights of a linear layer of blocks are held; None for other leaves."""
    if not (name.startswith("blocks.") and name.endswith(".kernel")):
        return None
    return linear if len(parts) > 1 else "float"


def _restored(old: tuple, known: tuple) -> tuple:
    """The leaves of before on the device, in the place of those there, which are deleted first."""
    for leaf in old:
        leaf.delete()
    return tuple(hosts.place(x, leaf.sharding) for x, leaf in zip(known, old, strict=True))


def _changed(
    old: tuple, changes: list[tuple[_Place, Change]], kind: str | None, given: tuple | None
) -> tuple:
    """The leaves with changes, in the place of those that are given, which are deleted. given: what
    `_read` returns, of changes that are products."""
    if given is None or kind is None:
        new = _by_steps(old, changes, kind)
    else:
        touched = np.zeros(len(old[0]), bool)
        touched[list(_ranks(changes))] = True
        new, finite = _added(old, *given, touched, kind=kind)
        _check(changes, finite)
    made = tuple(hosts.place(x, leaf.sharding) for x, leaf in zip(new, old, strict=True))
    jax.block_until_ready(made)
    for leaf in old:
        leaf.delete()
    return made


def _read(
    changes: list[tuple[_Place, Change]], count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The factors of the changes of a leaf of `count` layers, those of all files side by side."""
    (outputs, inputs), rank = changes[0][0].shape, _rank(changes)
    return _side_by_side(changes, (count, rank, inputs), (count, outputs, rank))


def _ranks(changes: list[tuple[_Place, Change]]) -> dict[int, int]:
    """{layer: rank of its changes together}."""
    ranks: dict[int, int] = {}
    for place, change in changes:
        assert change.factors is not None and place.layer is not None
        ranks[place.layer] = ranks.get(place.layer, 0) + change.rank
    return ranks


def _side_by_side(
    changes: list[tuple[_Place, Change]], down_shape: tuple[int, ...], up_shape: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the factors of all changes on the host, downs [n r i] and ups [n o r], and the scales
    of their products [n r]; zeros where there are none. The factors are in the dtype of the file,
    or in float32 where that differs between them."""
    read = []
    for place, change in changes:
        assert change.factors is not None and place.layer is not None
        read.append((place.layer, *change.factors()))
    dtypes = {x.dtype for _, up, down, _ in read for x in (up, down)}
    dtype = dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)
    downs, ups = np.zeros(down_shape, dtype), np.zeros(up_shape, dtype)
    scales, filled = np.zeros(down_shape[:2], np.float32), [0] * len(downs)
    for layer, up, down, scale in read:
        at = slice(filled[layer], filled[layer] + len(down))
        downs[layer, at], ups[layer, :, at], scales[layer, at] = down, up, scale
        filled[layer] = at.stop
    return downs, ups, scales


def _check(changes: list[tuple[_Place, Change]], finite: jax.Array) -> None:
    """Raises CheckpointError where factors are not finite; finite [n]: whether those of each layer
    are."""
    good = np.asarray(finite)
    bad = [(place, change) for place, change in changes if not good[place.layer]]
    for place, change in bad:
        change.step(np.zeros(place.shape, np.float32))
    if bad:  # the file is right, and too large for the dtype of the factors
        raise CheckpointError(
            f"{bad[0][1].key}: a LoRA is too strong",
            "its factors, times the strength, are beyond the numbers of this network",
            "take a smaller strength",
        )


def _beside(name: str, changes: list[tuple[_Place, Change]]) -> bool:
    """Whether the changes of a leaf can be a second product beside its 8-bit weights."""
    linear = name.startswith("blocks.") and name.endswith(".kernel") and ".core." not in name
    return linear and all(change.factors for _, change in changes)


def _rank(changes: list[tuple[_Place, Change]]) -> int:
    """The rank of the factors of a leaf, with what fills it up."""
    return filled_rank(max(_ranks(changes).values()))


def filled_rank(rank: int) -> int:
    """Returns the rank that factors are filled up to: a power of two, so that few ranks have
    programs, and as the kernels take them."""
    return max(LEAST_RANK, 1 << (rank - 1).bit_length())


@functools.partial(jax.jit, static_argnames="dtype")
def _scaled(downs, ups, scales, *, dtype) -> tuple:
    """downs [n r i], ups [n o r], scales [n r] -> the same downs and scaled ups in dtype, and
    whether those of each layer are finite [n]."""
    ups = ups.astype(jnp.float32) * scales[:, None]
    downs, ups = downs.astype(jnp.float32).astype(dtype), ups.astype(dtype)
    finite = jnp.isfinite(downs).all((1, 2)) & jnp.isfinite(ups).all((1, 2))
    return downs, ups, finite


@functools.partial(jax.jit, static_argnames="kind")
def _added(leaves: tuple, downs, ups, scales, touched, *, kind: str) -> tuple[tuple, jax.Array]:
    """leaves [n ...] of kind, the others as in `_scaled`: the leaves with the products added, a
    layer at a time; those that no file touches keep their bits. And whether the factors of each
    layer and their product are finite."""
    layer = LINEAR[kind]
    downs, ups, finite = _scaled(downs, ups, scales, dtype=jnp.float32)

    def one(each):
        leaves, up, down, change = each
        product = jnp.matmul(up, down, precision=lax.Precision.HIGHEST)
        new = layer.packed(layer.unpacked(*leaves) + product, leaves[0].dtype)
        new = tuple(jnp.where(change, a, b) for a, b in zip(new, leaves, strict=True))
        return new, jnp.isfinite(product).all()

    new, good = lax.map(one, (leaves, ups, downs, touched))
    return new, finite & good


def _by_steps(old: tuple, changes: list[tuple[_Place, Change]], kind: str | None) -> tuple:
    """The leaves with changes of any form, a tensor at a time on the host. kind: of a linear layer
    of blocks, or None for other leaves."""
    new = [np.array(hosts.whole(x)) for x in old]
    by_layer: dict[int | None, list[tuple[_Place, Change]]] = {}
    for place, change in changes:
        by_layer.setdefault(place.layer, []).append((place, change))
    for layer, each in by_layer.items():
        place = each[0][0]
        values = [x if layer is None else x[layer] for x in new]
        if kind is None:
            x = values[0].astype(np.float32)
            x = einops.rearrange(x, place.row.inverse_layout) if place.row.layout else x
        else:
            x = np.asarray(LINEAR[kind].unpacked(*map(jnp.asarray, values)))
        for _, change in each:
            x = change.step(x)
        if kind is None:
            x = einops.rearrange(x, place.row.layout) if place.row.layout else x
            made = (x,)
        else:
            made = LINEAR[kind].packed(jnp.asarray(x), values[0].dtype)
        for target, value in zip(new, made, strict=True):
            if layer is None:
                target[...] = np.asarray(value).astype(target.dtype)
            else:
                target[layer] = np.asarray(value).astype(target.dtype)
    return tuple(new)
