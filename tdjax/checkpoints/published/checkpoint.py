"""A published checkpoint opened by its keys alone, then read leaf by leaf:
`open_checkpoint(path).load()` is a module.

Host memory peaks at a few layers of one leaf, device memory at the model and as many layers more.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import einops
import jax
import numpy as np

from tdjax.checkpoints import filenames, orbax
from tdjax.checkpoints.folders import shown
from tdjax.checkpoints.published import scaled, tiny_vae, wan_dit
from tdjax.checkpoints.published.detect import Detected, describe, detect, kind_of, stored_dtypes
from tdjax.checkpoints.published.files import Source, open_source
from tdjax.checkpoints.published.lora import add_lora, left_out_note
from tdjax.checkpoints.published.rules import Binding, Claim, bind
from tdjax.checkpoints.published.tensor import Tensor
from tdjax.checkpoints.published.upload import ahead, settle, upload
from tdjax.config import Config, DiTConfig
from tdjax.parallel import hosts

HOST = ("cpu",)  # platforms whose memory is the host's: nothing is gained by transposing there
# Bytes from which a leaf is transposed on the device; below, compiling would take longer than it
# saves.
ON_DEVICE = 2**22


def open_checkpoint(
    path: str | Path,
    *,
    lora: tuple[tuple[str, float], ...] = (),
    low_noise: bool | None = None,
    **known,
) -> Checkpoint:
    """Open a .pth, .safetensors, .safetensors.index.json, or a folder of (sharded) files; no tensor
    data is read.

    lora:  (file, weight) pairs to add to the weights as they are read. low_noise: whether the file
           is the low-noise one of two experts, for which a LoRA can have parts of its own; told by
           the file's name where it is not given.
    known: config fields that keys and shapes cannot tell, such as `heads` where the head width is
           not 128.
    Raises CheckpointError for anything that is not a whole model of a known kind.
    """
    source = open_source(path)
    tensors, linear, notes = _scaled(source)
    tensors = tiny_vae.trimmed(tensors)
    found = detect(tensors, source.path.name, source.metadata, linear=linear, **known)
    stored = getattr(found.config, "linear", "float")
    if lora and stored != "float":  # changes are added in floating point
        tensors = scaled.untiled(scaled.separate(tensors, {}, source.path.name).dequantized())
        found = detect(tensors, source.path.name, source.metadata, **known)
    changes = []
    if low_noise is None:
        low_noise = filenames.expert(shown(source.path)) == "low"
    for file, weight in lora:
        tensors, counts = add_lora(tensors, found, file, weight, low_noise)
        changes.append(counts)
    notes += filter(None, map(left_out_note, changes))
    return Checkpoint(source, found, tensors, tuple(changes), notes, stored)


def _scaled(source: Source) -> tuple[Mapping[str, Any], str | None, list[str]]:
    """(tensors with their scales settled, kind of linear layers if they tell it, notes)."""
    name = source.path.name
    separate = scaled.separate(source.tensors, source.metadata, name)
    if not separate.scales:
        return separate.tensors, None, []
    layers = []
    if kind_of(separate.tensors, name) == "dit":
        layers = wan_dit.block_layers(separate.tensors, wan_dit.naming(separate.tensors))
    tensors, linear, note = separate.resolved(layers)
    return tensors, linear, [f"{name}: {note}"] if note else []


class Checkpoint:
    """kind: "dit" | "vae" | "text". config: what the keys, shapes and dtypes say, with bfloat16
    storage.

    tensors: {key: something with shape, dtype and read()}. changes: what LoRA files and merges did
             to them. notes: lines for the user, about what is in the file and not used.
    linear:  kind of linear layers in the file; that of `config` is "float" where a LoRA was added.
    """

    def __init__(
        self,
        source: Source,
        found: Detected,
        tensors: Mapping[str, Any],
        changes: tuple[dict, ...] = (),
        notes: list[str] | None = None,
        linear: str = "float",
    ):
        self.source, self.found, self.tensors, self.changes = source, found, tensors, changes
        self.kind, self.config, self.name = found.kind, found.config, source.path.name
        self.linear = linear
        self.sha256: Callable[..., str] = source.sha256
        self.bindings: dict[Config, Binding] = {}
        self.binding(self.config)
        self.notes = [*(notes or []), *self._notes()]

    @property
    def task(self) -> str | None:
        """ "t2v" or "i2v" for a transformer."""
        return self.config.task if isinstance(self.config, DiTConfig) else None

    def __repr__(self) -> str:
        return f"<{self.name}: {describe(self.kind, self.config)}, {len(self.tensors)} tensors>"

    @property
    def gates(self) -> int:
        """How many tensors are gates of FastVideo's sparse attention."""
        return sum(f".{wan_dit.GATE}." in key for key in self.tensors)

    def _notes(self) -> list[str]:
        """What is left out, where that may surprise."""
        lines = []
        if self.gates:
            lines.append(
                f"{self.name}: {self.gates} gates of video sparse attention ({wan_dit.GATE}) are"
                " left out: attention is dense here"
            )
        if self.source.marks:
            marks = ", ".join(self.source.marks[:3])
            more = f" and {len(self.source.marks) - 3} more" if len(self.source.marks) > 3 else ""
            lines.append(f"{self.name}: keys that only mark the file are left out: {marks}{more}")
        return lines

    def binding(self, config: Config) -> Binding:
        """Which keys fill which leaf; raises CheckpointError with the full list where they do
        not."""
        if config not in self.bindings:
            self.bindings[config] = bind(
                self.tensors, self.found.rows, targets(self.kind, config), self.name
            )
        return self.bindings[config]

    def leaves(
        self, config: Config | None = None
    ) -> Iterator[tuple[str, np.ndarray, str | None, np.dtype]]:
        """(leaf name, array as in the file with layers stacked in front [n ...], einops layout or
        None, dtype it should get).

        Raises CheckpointError with the key report where keys and leaves do not fit.
        """
        config = config or self.config
        for name, claim in self.binding(config).claims.items():
            yield (
                name,
                self.stack(claim),
                claim.row.stacked_layout,
                np.dtype(targets(self.kind, config)[name].dtype),
            )

    def stack(self, claim: Claim) -> np.ndarray:
        """The tensors of one leaf, [n ...] where it is stacked."""
        tensors = [self.tensors[key] for key in claim.keys]
        if not claim.row.stacked:
            return tensors[0].read()
        kinds = {np.dtype(t.dtype) for t in tensors}
        out = np.empty(
            (len(tensors), *tensors[0].shape), kinds.pop() if len(kinds) == 1 else np.float32
        )
        for i, tensor in enumerate(tensors):
            out[i] = tensor.read()
        return out

    def lazy(self, config: Config | None = None) -> dict[str, orbax.Lazy]:
        """{leaf name: array in its final layout and dtype, made on the host when it is read}, for
        writing."""
        config = config or self.config
        claims = self.binding(config).claims
        lazy = lambda shape, dtype, claim: orbax.Lazy(
            shape, dtype, functools.partial(self.final, claim, shape, dtype)
        )
        return {
            name: lazy(tuple(t.shape), np.dtype(t.dtype), claims[name])
            for name, t in targets(self.kind, config).items()
        }

    def final(self, claim: Claim, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """One leaf, layer by layer: the file's values, transposed and cast."""
        tensors = [self.tensors[key] for key in claim.keys]
        if not claim.row.stacked:
            return arrange(tensors[0].read(), claim.row.layout, dtype)
        out = np.empty(shape, dtype)
        for i, tensor in enumerate(tensors):
            out[i] = arrange(tensor.read(), claim.row.layout, dtype)
        return out

    def load(self, config: Config | None = None, device=None):
        """The module, each leaf placed, transposed and cast in turn.

        device: None (the first one), a jax.Device, a Sharding, or a module or dict of shardings by
                leaf.
        """
        config = config or self.config
        module = orbax.abstract(self.kind, config)
        where, shapes = (
            orbax.placements(orbax.named_leaves(module), device),
            targets(self.kind, config),
        )
        claims = self.binding(config).claims
        return orbax.assemble(
            module,
            {name: self.placed(claim, shapes[name], where[name]) for name, claim in claims.items()},
        )

    def placed(self, claim: Claim, target: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding):
        """One leaf where it belongs: made on the host if it is small or stays there, else piece by
        piece on the device. Each of several processes makes what its own devices hold."""
        here = sorted(sharding.addressable_devices, key=lambda d: d.id)
        device, apart = here[0], not sharding.is_fully_addressable
        if apart and not sharding.is_fully_replicated:
            return self._divided(claim, target, sharding).block_until_ready()
        size = math.prod(target.shape) * np.dtype(target.dtype).itemsize
        if device.platform in HOST or size < ON_DEVICE:
            made = self.final(claim, tuple(target.shape), np.dtype(target.dtype))
            return hosts.place(made, sharding).block_until_ready()
        out = upload(
            [self.tensors[key] for key in claim.keys], claim.row, target, device
        ).block_until_ready()
        if apart:
            copies = [jax.device_put(out, each) for each in here]
            make = jax.make_array_from_single_device_arrays
            return make(target.shape, sharding, copies).block_until_ready()
        alone = sharding.device_set == {device} and sharding.memory_kind in (
            None,
            device.default_memory().kind,
        )
        return out if alone else jax.device_put(out, sharding)

    def _divided(
        self, claim: Claim, target: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding
    ) -> jax.Array:
        """One leaf over devices of several processes, of which this one reads the parts of its
        own."""
        tensors, dtype = [self.tensors[key] for key in claim.keys], np.dtype(target.dtype)
        made: dict[str, np.ndarray] = {}  # devices may have the same part

        def part(index: tuple[slice, ...]) -> np.ndarray:
            if str(index) not in made:
                if claim.row.stacked:
                    each = [_part(t, claim.row.layout, dtype, index[1:]) for t in tensors[index[0]]]
                    made[str(index)] = np.stack(each)
                else:
                    made[str(index)] = _part(tensors[0], claim.row.layout, dtype, index)
            return made[str(index)]

        return jax.make_array_from_callback(target.shape, sharding, part)

    def layers(
        self, config: Config, prefix: str, device: jax.Device
    ) -> Iterator[dict[str, jax.Array]]:
        """{leaf name: its part of one layer, transposed and cast} for every layer of the stacked
        leaves below `prefix`, on the device; threads read the next layers meanwhile."""
        shapes = targets(self.kind, config)
        claims = {
            name: claim
            for name, claim in self.binding(config).claims.items()
            if name.startswith(prefix)
        }
        host = device.platform in HOST

        def layer(i: int) -> dict[str, np.ndarray]:
            values = {name: self.tensors[claim.keys[i]].read() for name, claim in claims.items()}
            return (
                {
                    n: arrange(x, claims[n].row.layout, np.dtype(shapes[n].dtype))
                    for n, x in values.items()
                }
                if host
                else values
            )

        count = len(next(iter(claims.values())).keys)
        for values in ahead(functools.partial(layer, i) for i in range(count)):
            put = lambda n, x: (
                jax.device_put(x, device)
                if host
                else settle(x, claims[n].row.layout, shapes[n].dtype, device)
            )
            yield {name: put(name, x) for name, x in values.items()}

    def rows(self, config: Config, leaf: str, ids: np.ndarray) -> np.ndarray:
        """Rows of a table on the host, each read by itself where the file allows it."""
        claim, dtype = (
            self.binding(config).claims[leaf],
            np.dtype(targets(self.kind, config)[leaf].dtype),
        )
        tensor = self.tensors[claim.keys[0]]
        if claim.row.layout or not isinstance(tensor, Tensor):
            return self.final(claim, tuple(tensor.shape), dtype)[ids]
        return np.concatenate([tensor.rows(i, i + 1).read() for i in map(int, ids)]).astype(dtype)

    def leaf(self, config: Config, name: str) -> np.ndarray:
        """One leaf on the host."""
        target = targets(self.kind, config)[name]
        return self.final(
            self.binding(config).claims[name], tuple(target.shape), np.dtype(target.dtype)
        )

    def facts(self) -> dict[str, Any]:
        """What a report and a manifest say about this file, without its hash."""
        dropped = self.binding(self.config).dropped
        alias = filenames.alias_of_path(
            self.source.path.absolute()
        )  # a generic name says nothing without its folder
        return {
            "name": (
                f"{alias}/{self.name}"
                if alias and self.name.startswith(filenames.GENERIC)
                else self.name
            ),
            "names": self.found.naming,
            "files": len(self.source.files),
            "bytes": sum(f.stat().st_size for f in self.source.files),
            "tensors": len(self.tensors),
            "matched": len(self.tensors) - len(dropped),
            "dropped": len(dropped),
            "missing": 0,
            "unexpected": 0,
            "ignored": len(self.source.ignored),
            "level": self.source.level,
            "stripped": self.source.stripped,
            "dtypes": stored_dtypes(self.source.tensors),
            "changes": list(self.changes),
            "notes": list(self.notes),
        }


@functools.lru_cache(maxsize=8)
def targets(kind: str, config: Config) -> dict[str, jax.ShapeDtypeStruct]:
    """{leaf name: shape and dtype} of the abstract module."""
    return orbax.named_leaves(orbax.abstract(kind, config))


def _part(tensor: Any, layout: str, dtype: np.dtype, index: tuple[slice, ...]) -> np.ndarray:
    """A part of a tensor, transposed and cast. Where the file's rows stay an axis, no others are
    read."""
    before, _, after = layout.partition("->")
    rows, axes = before.split()[:1], after.split()
    if isinstance(tensor, Tensor) and (not layout or ("(" not in after and rows[0] in axes)):
        at = axes.index(rows[0]) if layout else 0
        tensor = tensor.rows(index[at].start or 0, index[at].stop)
        index = (*index[:at], slice(None), *index[at + 1 :])
    return np.ascontiguousarray(arrange(tensor.read(), layout, dtype)[index])


def arrange(x: np.ndarray, layout: str | None, dtype: np.dtype, **sizes: int) -> np.ndarray:
    """Cast and transpose on the host. Bits are moved as integers: numpy is slow with types that it
    does not know."""
    x = np.ascontiguousarray(x.astype(dtype, copy=False))
    if not layout:
        return x
    bits = einops.rearrange(x.view(f"u{x.dtype.itemsize}"), layout, **sizes)
    return np.ascontiguousarray(bits).view(dtype)
