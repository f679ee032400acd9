"""The components of a pipeline (text encoder, VAE, transformer): opened without data, loaded when a
stage begins, freed after.

Weights come from our own checkpoint folder or straight from a published file; what comes out is the
same module.
"""

from __future__ import annotations

import abc
import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np

from tdjax.checkpoints import orbax
from tdjax.checkpoints.filenames import telling
from tdjax.checkpoints.published import checkpoint as published
from tdjax.config import Config, DiTConfig
from tdjax.errors import CheckpointError
from tdjax.models.wan_dit import HOST_MEMORY, with_linear, without_blocks
from tdjax.parallel import hosts
from tdjax.parallel.sharding import RULES, shardings
from tdjax.pipeline.adapters import Adapters, Chosen
from tdjax.pipeline.streaming import BLOCKS, Streamed, block_of, waiting

KINDS = {
    "dit": ("a video transformer", "dit_path"),
    "vae": ("a video VAE", "vae_path"),
    "tiny_vae": ("a small video decoder", "vae_path"),
    "text": ("a umT5 text encoder", "text_encoder_path"),
}
LOADER = ThreadPoolExecutor(1, thread_name_prefix="load")  # one after another, as asked for
_ENDS = 2**16  # bytes at each end of a file that stand for it in an identity
_QUICK = 2**20  # the same of a fingerprint


class Component(abc.ABC):
    """One network of a pipeline, wherever its weights come from.

    kind:   "text", "vae" or "dit".
    path:   the file or folder that it was opened from.
    stored: the config of what is stored there; config: the one that it is loaded as.
    mesh:   the devices over which it is spread, or None for the first one.
    rules:  where its weights lie on them.
    module: the network on the device; None until it is loaded, and after it is freed.
    coming: the load that a thread was asked for.
    streamed: whether it is loaded as a `Streamed`, its blocks in the host's memory.
    adapters: LoRA files that are merged into it on the device, and can be taken off.
    lora:   the (file, weight) pairs that are merged into it as it is read. beside: those that it
            was opened with and that stay beside its 8-bit weights.
    linear: kind of linear layers in its file, for a transformer.
    gates:  whether its file has gates of FastVideo's sparse attention.
    notes:  lines for the user about what is in its file and not used.
    """

    lora: tuple[tuple[str, float], ...] = ()
    beside: tuple[tuple[str, float], ...] = ()
    notes: tuple[str, ...] = ()
    gates: bool = False

    def __init__(self, path: Path, kind: str, stored: Config):
        self.path = path
        self.kind = kind
        self.stored: Any = stored
        self.linear: str = getattr(stored, "linear", "float")
        self.config: Any = stored
        self.mesh: jax.sharding.Mesh | None = None
        self.rules: Mapping[str, tuple[str, ...]] = RULES
        self.module: Any = None
        self.coming: Future | None = None
        self.streamed = False
        self.adapters = Adapters()

    @property
    def names(self) -> list[str]:
        """The names that may say what the weights are, those that say most first."""
        return telling(self.path)

    # -- what each kind of source does in its own way ----------------------------------------------

    @abc.abstractmethod
    def restore(self, config: Config, placement) -> Any:
        """Returns the module of a config with its leaves where `placement` says: None (the first
        device), a sharding for all, or a module of shardings."""

    @abc.abstractmethod
    def layers(self, prefix: str) -> Iterator[dict[str, jax.Array]]:
        """Yields, layer by layer, {leaf name: its values in that layer, on the device} of the
        stacked leaves below `prefix`."""

    @abc.abstractmethod
    def leaf(self, name: str) -> np.ndarray:
        """Returns one leaf on the host, in the dtype that it is loaded as."""

    @abc.abstractmethod
    def rows(self, name: str, ids: np.ndarray) -> np.ndarray:
        """Returns rows of a table on the host."""

    @abc.abstractmethod
    def files(self) -> list[Path]:
        """Returns all files that the weights are in, in a fixed order."""

    @abc.abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """Returns what tells a reader of a video's metadata which weights made it."""

    # -- what all of them share --------------------------------------------------------------------

    def identity(self) -> str:
        """Returns a hash that tells these weights from any others on this machine: size, date,
        beginning and end of every file."""
        found = hashlib.sha256()
        for file in self.files():
            facts = file.stat()
            found.update(f"{facts.st_size} {facts.st_mtime_ns}\n".encode())
            with file.open("rb") as f:
                found.update(f.read(_ENDS))
                f.seek(max(0, facts.st_size - _ENDS))
                found.update(f.read(_ENDS))
        return found.hexdigest()

    def abstract(self) -> Any:
        """Returns the module as shapes (with shardings under a mesh), by which programs are
        compiled before weights arrive."""
        module = orbax.abstract(self.kind, self.config)
        everywhere = None
        if self.mesh is not None:
            everywhere = jax.sharding.NamedSharding(self.mesh, jax.sharding.PartitionSpec())
            module = jax.tree.map(
                lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
                module,
                shardings(module, self.mesh, self.rules),
            )
        beside = self.adapters.chosen.beside
        return self.adapters.abstract(module, everywhere) if beside else module

    def load(self) -> Any:
        """Returns the module on the device; loading twice is loading once."""
        if self.module is None:
            coming, self.coming = self.coming, None
            module = self.read() if coming is None else coming.result()
            whole = not isinstance(module, Streamed)
            if whole and jax.tree.leaves(module)[0].sharding.memory_kind == HOST_MEMORY:
                module = _moved_to_device(module)
            chosen = self.adapters.chosen
            changed = chosen.files or chosen.beside
            self.module = self.adapters.merged(module) if changed else module
        return self.module

    def adapt(self, chosen: Chosen) -> None:
        """Merges LoRA files into the network, now if it is loaded, and in place of those that were
        merged so before; what was merged as the file was read stays. Where that is interrupted or
        fails, the network is dropped, and the next call loads it with the files of before."""
        before, self.adapters.chosen = self.adapters.chosen, chosen
        if self.module is None:
            return
        try:
            self.module = self.adapters.merged(self.module)
        except BaseException:
            self.adapters.chosen = before
            self.free()
            raise

    def stream(self, streamed: bool) -> None:
        """Has the weights loaded with their blocks in the host's memory, or not; those that are
        there otherwise are dropped."""
        if streamed != self.streamed:
            self.free()
            self.streamed = streamed

    def load_ahead(self, host: bool = False) -> None:
        """Begins to load in a thread, one component after another; `load` then waits for it, and
        raises what went wrong.

        host: only into the memory of the host, where the device's own is taken; `load` moves it.
        """
        apart = jax.process_count() > 1  # what they do together they do in one order
        if self.module is None and self.coming is None and not apart:
            self.coming = LOADER.submit(self.read_to_host if host else self.read)

    @property
    def stageable(self) -> bool:
        """Whether the host can hold the weights as the device will: on one device, and nothing left
        to quantise."""
        return self.mesh is None and not self._changes_linear

    def read(self) -> Any:
        """Returns the weights on the device, whatever is there already."""
        if self.streamed:
            return self.read_streamed()
        config = self.as_read
        module = self.restore(config, self._placement(orbax.abstract(self.kind, config)))
        if self._changes_linear:
            module = with_linear(module, self.config.linear, free=True)
            if self.mesh is not None:
                module = jax.tree.map(hosts.place, module, self._placement(module))
        return jax.block_until_ready(module)

    @property
    def as_read(self) -> Any:
        """The config that weights are read as: those of another kind of linear layers are quantised
        or dequantised after that, on the device."""
        if not self._changes_linear:
            return self.config
        return dataclasses.replace(self.config, linear=self.stored.linear)

    def read_streamed(self) -> Streamed:
        """Returns a transformer whose blocks are in page-locked memory of the host. One block at a
        time passes through the device, where it is transposed and quantised."""
        device = jax.local_devices()[0]
        abstract = orbax.abstract(self.kind, self.config)
        names = orbax.named_leaves(without_blocks(abstract))
        leaves = {name: jax.device_put(self.leaf(name), device) for name in names}
        structure = jax.tree.structure(without_blocks(abstract))
        outer = jax.tree.unflatten(structure, list(leaves.values()))
        blocks = self._waiting_blocks(leaves)
        return Streamed(jax.block_until_ready(outer), tuple(blocks))

    def _waiting_blocks(self, outer: dict[str, Any]) -> list[Any]:
        """The blocks in the host's memory. outer: leaves of all else, on the device."""
        layers = self.layers(BLOCKS)
        put = lambda block: jax.block_until_ready(jax.device_put(block, waiting()))
        return [put(self._block(outer, layer)) for layer in layers]

    def _block(self, outer: dict[str, Any], layer: dict[str, jax.Array]) -> Any:
        """One block on the device, of the kind of linear layers that is asked for."""
        cfg = dataclasses.replace(self.as_read, layers=1)
        stacked = {name: leaf[None] for name, leaf in layer.items()}
        module = orbax.assemble(orbax.abstract(self.kind, cfg), outer | stacked)
        one = with_linear(module, self.config.linear)
        return block_of(one, orbax.abstract(self.kind, self.config).blocks)

    def read_to_host(self) -> Any:
        """Returns the weights in page-locked memory of the host."""
        return jax.block_until_ready(self._restore_to_host(waiting()))

    def free(self) -> None:
        """Drops the weights from the device, and those that are still on their way."""
        coming, self.coming = self.coming, None
        if coming is not None and not coming.cancel():
            coming.add_done_callback(_delete_loaded)
        if self.module is not None:
            _delete(self.module)
            self.module = None
            self.adapters.forget()

    @property
    def _changes_linear(self) -> bool:
        return isinstance(self.config, DiTConfig) and self.config.linear != self.stored.linear

    def _placement(self, module) -> Any:
        return None if self.mesh is None else shardings(module, self.mesh, self.rules)

    def _restore_to_host(self, there: jax.sharding.Sharding) -> Any:
        return self.restore(self.config, there)


class StoredComponent(Component):
    """A component in our own layout, a folder with manifest.json."""

    def __init__(self, path: Path):
        manifest = orbax.inspect(path)
        super().__init__(path, manifest["kind"], orbax.config_of(manifest))

    def restore(self, config: Config, placement) -> Any:
        return orbax.restore(self.path, placement, config)[1]

    def layers(self, prefix: str) -> Iterator[dict[str, jax.Array]]:
        """As Component.layers; the leaves pass through host memory whole."""
        device = jax.local_devices()[0]
        leaves = {name: self.leaf(name) for name in self._names() if name.startswith(prefix)}
        count = len(next(iter(leaves.values())))
        for i in range(count):
            yield {name: jax.device_put(leaf[i], device) for name, leaf in leaves.items()}

    def _waiting_blocks(self, outer: dict[str, Any]) -> list[Any]:
        """Leaf by leaf, as `_restore_to_host`, where nothing is left to quantise."""
        if self._changes_linear:
            return super()._waiting_blocks(outer)
        blocks = orbax.abstract(self.kind, self.config).blocks
        stacked = (self.leaf(f"{BLOCKS}{name}") for name in orbax.named_leaves(blocks))
        leaves = [[jax.device_put(x, waiting()) for x in each] for each in stacked]
        structure = jax.tree.structure(blocks)
        return [jax.tree.unflatten(structure, each) for each in zip(*leaves, strict=True)]

    def leaf(self, name: str) -> np.ndarray:
        return orbax.read(self.path, name).astype(self._names()[name].dtype)

    def rows(self, name: str, ids: np.ndarray) -> np.ndarray:
        return self.leaf(name)[ids]

    def files(self) -> list[Path]:
        return sorted(p for p in self.path.rglob("*") if p.is_file())

    def fingerprint(self) -> dict[str, Any]:
        """Returns the folder's name, and the source that our manifest recorded."""
        return {"name": self.path.name, "source": orbax.inspect(self.path).get("source")}

    @property
    def names(self) -> list[str]:
        """Also the name of the file that it was converted from."""
        source = orbax.inspect(self.path).get("source") or {}
        return [str(source.get("name", "")), *telling(self.path)]

    def _names(self) -> dict[str, Any]:
        return orbax.named_leaves(orbax.abstract(self.kind, self.as_read))

    def _restore_to_host(self, there: jax.sharding.Sharding) -> Any:
        """Leaf by leaf: a restore in one piece would hold all of it twice."""
        module = orbax.abstract(self.kind, self.config)
        leaves = [jax.device_put(self.leaf(name), there) for name in orbax.named_leaves(module)]
        return jax.tree.unflatten(jax.tree.structure(module), leaves)


class PublishedComponent(Component):
    """A component in a file that others wrote, known by its keys. LoRA files are merged into it as
    it is read."""

    def __init__(
        self,
        path: Path,
        lora: Iterable[tuple[str | Path, float]] = (),
        low_noise: bool | None = None,
    ):
        self.lora = tuple((str(file), weight) for file, weight in lora)
        self.file = published.open_checkpoint(path, lora=self.lora, low_noise=low_noise)
        self.notes = tuple(self.file.notes)
        self.gates = self.file.gates > 0
        super().__init__(path, self.file.kind, self.file.config)
        self.linear = self.file.linear
        self._hashed: tuple[list[tuple[int, int]], str] = ([], "")  # (of which files, quick hash)

    def restore(self, config: Config, placement) -> Any:
        return self.file.load(config, placement)

    def layers(self, prefix: str) -> Iterator[dict[str, jax.Array]]:
        """As Component.layers; the file is read as its layers are asked for."""
        return self.file.layers(self.as_read, prefix, jax.local_devices()[0])

    def leaf(self, name: str) -> np.ndarray:
        return self.file.leaf(self.as_read, name)

    def rows(self, name: str, ids: np.ndarray) -> np.ndarray:
        return self.file.rows(self.config, name, ids)

    def files(self) -> list[Path]:
        return list(self.file.source.files)

    def fingerprint(self) -> dict[str, Any]:
        """Returns name, size and a quick hash (first and last MiB of each file), which is made
        again where a file has changed: every video has it."""
        stats = [file.stat() for file in self.files()]
        facts = [(each.st_size, each.st_mtime_ns) for each in stats]
        if self._hashed[0] != facts:
            self._hashed = facts, self._quick_hash()
        return {
            "name": self.path.name,
            "bytes": sum(size for size, _ in facts),
            "quick_sha256": self._hashed[1],
        }

    def _quick_hash(self) -> str:
        quick = hashlib.sha256()
        for file in self.files():
            with file.open("rb") as f:
                quick.update(f.read(_QUICK))
                f.seek(max(0, file.stat().st_size - _QUICK))
                quick.update(f.read())
        return quick.hexdigest()


class PlannedComponent(Component):
    """A component by its config alone, for a memory plan before any file is there. Whatever asks it
    for weights raises CheckpointError."""

    def __init__(self, name: str, kind: str, config: Config):
        super().__init__(Path(name), kind, config)

    def restore(self, config: Config, placement) -> Any:
        self._refuse()

    def layers(self, prefix: str) -> Iterator[dict[str, jax.Array]]:
        self._refuse()

    def leaf(self, name: str) -> np.ndarray:
        self._refuse()

    def rows(self, name: str, ids: np.ndarray) -> np.ndarray:
        self._refuse()

    def files(self) -> list[Path]:
        self._refuse()

    def fingerprint(self) -> dict[str, Any]:
        return {"name": None, "source": "planned"}

    def _refuse(self) -> NoReturn:
        raise CheckpointError(
            f"{self.path} has no weights here",
            "it was planned from its config, before any file was there",
            "open the model with tdjax.load",
        )


def open_component(
    path: str | Path,
    kind: str,
    *,
    lora: Iterable[tuple[str | Path, float]] = (),
    low_noise: bool | None = None,
) -> Component:
    """Returns the component of a published file or of a folder of ours; no tensor data is read.

    lora:      what a published file is read with; a folder of ours takes it by `adapt`.
    low_noise: whether it is the low-noise one of two experts, for which a LoRA can have parts of
               its own; None: by its name.

    Raises CheckpointError for another kind than `kind`.
    """
    path = Path(path)
    stored = (path / "manifest.json").is_file()
    component = StoredComponent(path) if stored else PublishedComponent(path, lora, low_noise)
    if component.kind not in (kind, f"tiny_{kind}"):
        found, argument = KINDS[component.kind]
        raise CheckpointError(
            f"{path} is {found}, not {KINDS[kind][0]}",
            "recognised from its keys and shapes",
            f"give it as {argument}",
        )
    return component


def _moved_to_device(module) -> Any:
    """The module on the first device; its copy in the host's memory is given back."""
    there = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    moved = jax.block_until_ready(jax.device_put(module, there))
    _delete(module)
    return moved


def _delete(module) -> None:
    for leaf in jax.tree.leaves(module):
        leaf.delete()


def _delete_loaded(coming: Future) -> None:
    """Drops weights that nobody waits for any more."""
    if not coming.cancelled() and coming.exception() is None:
        _delete(coming.result())
