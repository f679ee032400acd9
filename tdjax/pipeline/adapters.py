"""LoRA files on a transformer that is loaded: put on and taken off without its file being read
again, and without another program.

They are merged into the weights on the device. Before that, the leaves that they touch go to the
host, and come back bit by bit when the files change: a merged network costs nothing at a step, and
taking a LoRA off leaves no trace. Weights of 8 bits are quantised again after the sum.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
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
from tdjax.models.linear import LINEAR
from tdjax.models.wan_dit import without_blocks
from tdjax.pipeline.options import Lora, lora_pairs
from tdjax.pipeline.streaming import Streamed, waiting, with_one_block

if TYPE_CHECKING:
    from tdjax.pipeline.components import Component

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
    """LoRA files that fit a network. files: (file, weight) pairs; notes: lines for the user."""

    files: tuple[tuple[str, float], ...]
    notes: list[str]
    changes: dict[str, list[tuple[_Place, Change]]]

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
        return Chosen(self.files, [], {name: each for name, each in changes.items() if each})


def choose(files: tuple[tuple[str, float], ...], cfg: DiTConfig, low_noise: bool) -> Chosen:
    """Opens (file, weight) pairs for a network; nothing is merged yet. low_noise: it is the
    low-noise one of two experts. Raises CheckpointError."""
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
    return Chosen(files, notes, changes)


def adapt(
    components: Mapping[str, Component], lora: Lora, lora_high: Lora, lora_low: Lora
) -> list[str]:
    """Merges LoRA files into the transformers of a pipeline, in place of those merged so before;
    arguments as those of `tdjax.load`. Returns lines for the user. Raises CheckpointError and
    UsageError, before any change."""
    both = lora_pairs("lora", lora)
    own = {"dit": ("lora_high", lora_high), "dit_low": ("lora_low", lora_low)}
    dits = {name: components[name] for name in own if name in components}
    chosen = {
        name: choose((*both, *lora_pairs(*own[name])), dit.config, name == "dit_low")
        for name, dit in dits.items()
    }
    for name, dit in dits.items():
        dit.adapt(chosen[name])
    return [line for each in chosen.values() for line in each.notes]


class Adapters:
    """What is merged into one transformer, and the leaves as they were, on the host."""

    def __init__(self):
        self.chosen = Chosen((), [], {})
        self._base: dict[str, tuple[np.ndarray, ...]] = {}
        self._pieces: dict[int | None, Adapters] = {}  # of a `Streamed`: its blocks, and the rest

    def merged(self, module: Any) -> Any:
        """Returns the module with the chosen files and no others. The module that is given is not
        to be used again, not even after an error: each of its leaves that changes is deleted as
        the new one is there, as a device may not hold all of them twice."""
        if isinstance(module, Streamed):
            return self._merged_streamed(module)
        leaves = orbax.named_leaves(module)
        linear = LINEAR[module.cfg.linear].leaves
        for name, before in self._base.items():
            _replace(leaves, _parts(name, leaves, linear), before)
        base = {}
        for name, changes in self.chosen.changes.items():
            parts = _parts(name, leaves, linear)
            old = tuple(leaves[part] for part in parts)
            base[name] = tuple(np.asarray(x) for x in old)
            kind = None
            if name.startswith("blocks.") and name.endswith(".kernel"):
                kind = module.cfg.linear if len(parts) > 1 else "float"
            if kind and all(change.factors for _, change in changes):
                new = _low_rank(old, changes, kind)
            else:
                new = _by_steps(old, changes, kind)
            _replace(leaves, parts, new)
        self._base = base
        return orbax.assemble(module, leaves)

    def _merged_streamed(self, module: Streamed) -> Streamed:
        """The same block by block, each on the device in its turn."""
        outer, blocks = module.outer, list(module.blocks)
        for at in (None, *range(len(blocks))):
            part = self._pieces.setdefault(at, Adapters())
            part.chosen = self.chosen.of(at)
            if not part.chosen.changes and not part._base:
                continue
            made = part.merged(with_one_block(outer, blocks[at or 0]))
            if at is None:
                outer = without_blocks(made)
                continue
            before, block = blocks[at], jax.tree.map(lambda x: x[0], made.blocks)
            blocks[at] = jax.block_until_ready(jax.device_put(block, waiting()))
            jax.tree.map(lambda x: x.delete(), before)
        return Streamed(outer, tuple(blocks))

    def forget(self) -> None:
        """The module is gone: there is nothing to take off."""
        self._base, self._pieces = {}, {}


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


def _replace(leaves: dict[str, Any], parts: tuple[str, ...], values: tuple) -> None:
    """Puts values where the leaves of these names lie, and deletes those."""
    for part, value in zip(parts, values, strict=True):
        old = leaves[part]
        leaves[part] = jax.block_until_ready(jax.device_put(value, old.sharding))
        old.delete()


def _low_rank(old: tuple, changes: list[tuple[_Place, Change]], kind: str) -> tuple:
    """The leaves [n ...] of a linear layer with products added, those of all files side by side."""
    pairs: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
    for place, change in changes:
        assert change.factors is not None and place.layer is not None
        pairs.setdefault(place.layer, []).append(change.factors())
    ranks = {layer: sum(up.shape[1] for up, _ in each) for layer, each in pairs.items()}
    (outputs, inputs), rank = changes[0][0].shape, max(ranks.values())
    ups = np.zeros((len(old[0]), outputs, rank), np.float32)
    downs = np.zeros((len(old[0]), rank, inputs), np.float32)
    for layer, each in pairs.items():
        at = 0
        for up, down in each:
            ups[layer, :, at : at + up.shape[1]] = up
            downs[layer, at : at + len(down)] = down
            at += len(down)
    touched = np.zeros(len(old[0]), bool)
    touched[list(pairs)] = True
    return _added(old, ups, downs, touched, kind=kind)


@functools.partial(jax.jit, static_argnames="kind")
def _added(leaves: tuple, ups, downs, touched, *, kind: str) -> tuple:
    """leaves [n ...] of kind, ups [n o r], downs [n r i]: a layer at a time; those that no file
    touches keep their bits."""
    layer = LINEAR[kind]

    def one(each):
        leaves, up, down, change = each
        product = jnp.matmul(up, down, precision=lax.Precision.HIGHEST)
        new = layer.packed(layer.unpacked(*leaves) + product, leaves[0].dtype)
        return tuple(jnp.where(change, a, b) for a, b in zip(new, leaves, strict=True))

    return lax.map(one, (leaves, ups, downs, touched))


def _by_steps(old: tuple, changes: list[tuple[_Place, Change]], kind: str | None) -> tuple:
    """The leaves with changes of any form, a tensor at a time on the host. kind: of a linear layer
    of blocks, or None for other leaves."""
    new = [np.array(x) for x in old]
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
