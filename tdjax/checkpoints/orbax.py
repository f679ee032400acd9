"""Our one checkpoint layout: <folder>/manifest.json beside <folder>/params/ (Orbax, a flat dict
{leaf name: array}).

A leaf's name is its path in the module joined by dots ("blocks.self_attn.q.kernel"); blocks are
stacked on axis 0. The manifest holds the config, so loading is: config -> abstract module ->
shardings -> restore, and needs no other argument.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

import tdjax
from tdjax.checkpoints.folders import is_model, read_manifest
from tdjax.config import KINDS, Config, from_dict, to_dict
from tdjax.config.parsing import told
from tdjax.errors import CheckpointError, first_line
from tdjax.models.abstract import as_shapes
from tdjax.models.tiny_vae import TinyVAE
from tdjax.models.umt5 import UMT5
from tdjax.models.wan_dit import DiT
from tdjax.models.wan_vae import VAE
from tdjax.parallel import hosts
from tdjax.parallel.sharding import leaf_name

FORMAT = 1
AGAIN = "convert the source file again: python -m convert SRC DST --overwrite"
MODULES = {"dit": DiT, "vae": VAE, "tiny_vae": TinyVAE, "text": UMT5}
DENSE_DROPS = (  # parameters of sparse attention, which dense attention does without
    ".self_attn.core."
)
GROUP_BYTES = 2**26  # small leaves written together; a larger leaf is alone in memory
SHARED_BYTES = 2**22  # a part of an array that copies of it write in parts
READ_BYTES = 2**30  # leaves read at the same time
CHUNK_BYTES = (
    2**28
)  # pieces in which an array is written, so that a sharded restore reads only what it needs


@dataclasses.dataclass(frozen=True)
class Lazy:
    """An array that is made when it is written: `read()` gives it. Lets `save` hold one leaf at a
    time."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class InTurn(ocp.type_handlers.NumpyHandler):
    """Writes Lazy leaves in turn: small ones together, a large one only after what came before is
    on disk."""

    async def serialize(self, values, infos, args=None):
        args = args or [ocp.SaveArgs()] * len(values)
        group, size = [], 0
        for i, value in enumerate(values):
            if group and size + value.nbytes > GROUP_BYTES:
                await self.write(group, values, infos, args)
                group, size = [], 0
            group.append(i)
            size += value.nbytes
        await self.write(group, values, infos, args)
        return []

    async def write(self, group, values, infos, args):
        arrays = [np.asarray(values[i].read()) for i in group]
        for done in await super().serialize(
            arrays, [infos[i] for i in group], [args[i] for i in group]
        ):
            await asyncio.to_thread(done.result)


async def all_of(tasks) -> list:
    """The results of all tasks in one list. The first failure is raised when every task has come to
    its end: a read that is abandoned would complain on the terminal, from another thread, long
             after."""
    done = await asyncio.gather(*tasks, return_exceptions=True)
    for result in done:
        if isinstance(result, BaseException):
            raise result
    return [item for result in done for item in result]


async def to_the_end(read):
    """What a read gives, its failure raised as that of `all_of`."""
    before = asyncio.all_tasks()
    try:
        return await read
    except BaseException:
        await asyncio.gather(*asyncio.all_tasks() - before, return_exceptions=True)
        raise


class _Sizes(ocp.type_handlers.NumpyHandler):
    """Tells shapes and dtypes, leaf by leaf."""

    async def metadata(self, infos):
        one = super().metadata
        return await all_of([one([info]) for info in infos])


class _InGroups(ocp.type_handlers.ArrayHandler):
    """Reads leaves in groups of bounded size."""

    async def deserialize(self, infos, args=None):
        out, first, size = [], 0, 0
        for i, arg in enumerate(args):
            size += math.prod(arg.global_shape) * np.dtype(arg.dtype).itemsize
            if size > READ_BYTES or i + 1 == len(args):
                group = slice(first, i + 1)
                out += await to_the_end(super().deserialize(infos[group], args[group]))
                first, size = i + 1, 0
        return out


def array_handlers(*more):
    """How Orbax writes arrays over several devices: copies share the writing of large ones. The cut
    of each is a program, which small ones are not worth. more: (type, its handler), ..."""
    handler = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=SHARED_BYTES)
    return ocp.type_handlers.create_type_handler_registry((jax.Array, handler), *more)


@contextlib.contextmanager
def quiet():
    """Orbax tells the terminal about its own conventions through absl; users of this layout cannot
    act on that."""
    logger = logging.getLogger("absl")
    severe = lambda record: (
        record.levelno >= logging.CRITICAL
    )  # one for each block: parts may be read by several threads
    logger.addFilter(severe)
    try:
        yield
    finally:
        logger.removeFilter(severe)


# Names
# --------------------------------------------------------------------------------------------------


def named_leaves(module) -> dict[str, Any]:
    """{leaf name: array, ShapeDtypeStruct, sharding or whatever stands there}, in the order of
    jax.tree.leaves."""
    return {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(module)}


def abstract(kind: str, cfg: Config):
    """The module of a kind ("dit", "vae", "text") with shapes in place of arrays; nothing is
    allocated."""
    return as_shapes(MODULES[kind], cfg)


def assemble(abstract_module, arrays: dict[str, Any]):
    """Put arrays into the places that an abstract module names. Raises CheckpointError with every
    difference."""
    expected = table(named_leaves(abstract_module))
    check_table(expected, table(arrays), "these weights do not fill the model")
    return jax.tree.unflatten(
        jax.tree.structure(abstract_module), [arrays[name] for name in expected]
    )


def table(leaves: dict[str, Any]) -> dict[str, tuple[tuple[int, ...], str]]:
    """{leaf name: (shape, dtype name)}"""
    return {name: (tuple(x.shape), np.dtype(x.dtype).name) for name, x in leaves.items()}


def check_table(expected: dict, got: dict, what: str) -> None:
    """Raise CheckpointError listing what is missing, unexpected, or of another shape or dtype."""
    lines = [f"missing     {n} {list(s)} {d}" for n, (s, d) in expected.items() if n not in got]
    lines += [f"unexpected  {n} {list(s)} {d}" for n, (s, d) in got.items() if n not in expected]
    for name in expected.keys() & got.keys():
        if expected[name] != got[name]:
            (s, d), (s2, d2) = got[name], expected[name]
            lines.append(f"different   {name} {list(s)} {d}, expected {list(s2)} {d2}")
    if lines:
        raise CheckpointError(
            f"{what}: {len(lines)} of {len(expected)} leaves differ",
            "\n".join(sorted(lines)),
            "give the files of one network",
        )


# Writing
# --------------------------------------------------------------------------------------------------


def save(
    folder,
    module_or_leaves,
    kind: str,
    cfg: Config,
    source: dict | str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a checkpoint folder, complete or not at all.

    module_or_leaves: a module of `kind`, or {leaf name: array or Lazy}. Leaves go to disk one after
                      another, in sorted
    order of names, and must be exactly those of the abstract module. Where several processes make
    one run, all call this with arrays over their devices, and each writes what it has. source:
    where the weights came from (JSON values).
    Raises CheckpointError with every leaf that differs, UsageError where the folder exists and
        overwrite is not given.
    """
    leaves = module_or_leaves
    if not isinstance(leaves, dict):
        leaves = named_leaves(module_or_leaves)
    expected = table(named_leaves(abstract(kind, cfg)))
    check_table(expected, table(leaves), f"these leaves are not a {kind} of this config")
    apart = lambda x: isinstance(x, jax.Array) and not x.is_fully_addressable
    lazy = {
        n: (
            x
            if isinstance(x, Lazy) or apart(x)
            else Lazy(tuple(x.shape), np.dtype(x.dtype), lambda x=x: np.asarray(x))
        )
        for n, x in leaves.items()
    }
    manifest = {
        "format": FORMAT,
        "kind": kind,
        "config": to_dict(cfg),
        "source": {"name": source} if isinstance(source, str) else dict(source or {}),
        "converter": f"tdjax {tdjax.__version__}",
        "leaves": {name: [list(shape), dtype] for name, (shape, dtype) in expected.items()},
    }
    size = sum(x.nbytes for x in lazy.values())
    with hosts.written_by_all(folder, overwrite, is_model, size) as part, quiet():
        if hosts.first():
            part.mkdir()
        registry = array_handlers((Lazy, InTurn(deepcopy_host_arrays=False)))
        handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry, use_compression=False)
        with contextlib.closing(ocp.Checkpointer(handler)) as writer:
            pieces = {name: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES) for name in lazy}
            writer.save(part / "params", args=ocp.args.PyTreeSave(lazy, save_args=pieces))
        if hosts.first():
            for told in part.glob("params/commit_success.txt"):
                told.write_text(
                    "complete\n"
                )  # Orbax says where on this machine the folder was, which is nobody's business
            manifest["files"] = file_sizes(part / "params")
            (part / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    return Path(folder)


def file_sizes(folder: Path) -> dict[str, int]:
    """{name below the folder: bytes} of all files in it, for a manifest: TensorStore reads zeros
    where a file of values was cut short."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): p.stat().st_size for p in files}


def check_files(folder: Path, listed: dict[str, int] | None, fix: str) -> None:
    """Raises CheckpointError where a file that a manifest lists is missing or has another size;
    manifests of 0.1 list none."""
    have = file_sizes(folder)
    for name, size in (listed or {}).items():
        if have.get(name) != size:
            raise CheckpointError(
                f"{folder} cannot be read: files are missing or damaged",
                f"{told(name)} should have {size} bytes and has {have.get(name, 'none')}",
                fix,
            )


# Reading
# --------------------------------------------------------------------------------------------------


def inspect(folder) -> dict[str, Any]:
    """The manifest, checked for form; no parameter is read. Raises CheckpointError for a folder or
    a format that is not ours."""
    folder = Path(folder)
    file = folder / "manifest.json"
    if not file.is_file():
        raise CheckpointError(
            f"{folder} is not a tdjax checkpoint: it has no manifest.json", *_why_not(folder)
        )
    try:
        manifest = read_manifest(folder)
        version, kind = manifest["format"], manifest["kind"]
        sizes = [n for shape, _ in manifest["leaves"].values() for n in shape]
        if any(n < 0 for n in sizes):
            raise ValueError("a leaf has a negative size")
    except ValueError as e:
        raise CheckpointError(
            f"{file} is damaged or not ours", str(e)[:300], "convert the source file again"
        ) from e
    if version != FORMAT:
        fix = (
            "update tdjax"
            if version > FORMAT
            else "convert the source file again: python -m convert SRC DST"
        )
        raise CheckpointError(
            f"{file} has format {version}", f"this version of tdjax reads format {FORMAT}", fix
        )
    if kind not in KINDS:
        raise CheckpointError(
            f"{file} holds a {kind!r}", f"known kinds: {', '.join(KINDS)}", "update tdjax"
        )
    return manifest


def _why_not(folder: Path) -> tuple[str, str]:
    """The second and third line of the message about a folder without manifest."""
    if not folder.exists():
        close = sorted(p.name for p in folder.parent.iterdir()) if folder.parent.is_dir() else []
        return (
            "the folder does not exist",
            f"there is: {', '.join(close[:8]) or 'nothing beside it'}",
        )
    parts = sorted(p.parent.name for p in folder.glob("*/manifest.json"))
    if parts:
        return (
            f"it is a model folder with {', '.join(parts)}",
            f"name one of them: {folder / parts[0]}",
        )
    if folder.is_file() or any(folder.glob("*.safetensors")) or any(folder.glob("*.pth")):
        return "these are published weights", f"convert them: python -m convert {folder} DST"
    return (
        "a checkpoint holds manifest.json and params/",
        "convert published weights: python -m convert SRC DST",
    )


def config_of(manifest: dict[str, Any]) -> Config:
    """The config in a manifest. Raises CheckpointError for fields that are not known."""
    try:
        return from_dict(KINDS[manifest["kind"]], manifest["config"])
    except (ValueError, TypeError) as e:
        raise CheckpointError(
            "the manifest's config is not one this version of tdjax knows",
            str(e),
            "convert the source file again",
        ) from e


def checked(folder) -> tuple[str, Config]:
    """(kind, config) after comparing the manifest's leaf table with the model of its config and
    with what is stored."""
    folder, manifest = Path(folder), inspect(folder)
    kind, cfg = manifest["kind"], config_of(manifest)
    listed = {name: (tuple(shape), dtype) for name, (shape, dtype) in manifest["leaves"].items()}
    check_table(
        table(named_leaves(abstract(kind, cfg))),
        listed,
        f"{folder / 'manifest.json'} does not describe its own config",
    )
    stored = _readable(
        folder, lambda reader: table(_described(reader.metadata(_params(folder)).item_metadata))
    )
    check_table(listed, stored, f"{folder / 'params'} does not hold what manifest.json lists")
    check_files(folder / "params", manifest.get("files"), AGAIN)
    return kind, cfg


def _described(metadata) -> dict[str, Any]:
    """{leaf name: what has its shape and dtype}; Orbax gives None for a folder whose description it
    cannot read."""
    if metadata is None:
        raise ValueError("no readable description of the arrays")
    return metadata.tree


def _params(folder: Path) -> str:
    """The path of the arrays; Orbax wants it absolute."""
    return os.path.abspath(folder / "params")


def _readable(folder: Path, action: Callable[[ocp.Checkpointer], Any], alone: bool = False):
    """action(reader), where whatever Orbax and TensorStore raise becomes one CheckpointError.
    alone: the reader waits for no other process."""
    registry = ocp.type_handlers.create_type_handler_registry(
        (jax.Array, _InGroups()), (np.ndarray, _Sizes())
    )
    among = ocp.options.MultiprocessingOptions()
    if alone:
        here = jax.process_index()
        among = ocp.options.MultiprocessingOptions(primary_host=here, active_processes={here})
    try:
        with (
            quiet(),
            contextlib.closing(
                ocp.Checkpointer(
                    ocp.PyTreeCheckpointHandler(
                        type_handler_registry=registry, multiprocessing_options=among
                    ),
                    multiprocessing_options=among,
                )
            ) as reader,
        ):
            return action(reader)
    except Exception as e:
        raise CheckpointError(
            f"{folder / 'params'} cannot be read: files are missing or damaged",
            f"{type(e).__name__}: {first_line(e)}",
            AGAIN,
        ) from e


def restore(folder, sharding=None, config: Config | None = None):
    """(config, module) of a checkpoint folder. Raises CheckpointError where it is damaged,
    incomplete or of another model.

    sharding: where leaves go, see `placements`.
    config:   another config of the same model: other storage dtype, or attention "dense" for
              weights that have more.
    """
    folder = Path(folder)
    kind, stored = checked(folder)
    module = abstract(kind, config or stored)
    wanted = named_leaves(module)
    have = {name: tuple(shape) for name, (shape, _) in inspect(folder)["leaves"].items()}
    unused = {
        name
        for name in have.keys() - wanted.keys()
        if DENSE_DROPS in name and config.attention == "dense"
    }
    no_dtype = lambda shapes: {
        name: (shape, "") for name, shape in shapes.items() if name not in unused
    }
    check_table(
        no_dtype({n: x.shape for n, x in wanted.items()}),
        no_dtype(have),
        f"{folder} cannot be read with the config asked for",
    )
    where = placements(wanted, sharding)
    how = lambda x, s: ocp.ArrayRestoreArgs(
        restore_type=jax.Array, sharding=s, global_shape=x.shape, dtype=x.dtype
    )
    args = {name: how(x, where[name]) for name, x in wanted.items()}
    request = ocp.args.PyTreeRestore(item=dict(wanted), restore_args=args, partial_restore=True)
    arrays = _readable(folder, lambda reader: reader.restore(_params(folder), args=request))
    return config or stored, assemble(module, arrays)


def placements(leaves: dict[str, Any], sharding) -> dict[str, Any]:
    """A sharding for each leaf name, from None (the first device), a Device, a Sharding, or a
    module or dict of those."""
    if sharding is None or isinstance(sharding, jax.Device):
        sharding = jax.sharding.SingleDeviceSharding(sharding or jax.local_devices()[0])
    if isinstance(sharding, jax.sharding.Sharding):
        return dict.fromkeys(leaves, sharding)
    return sharding if isinstance(sharding, dict) else named_leaves(sharding)


def read(folder, name: str) -> np.ndarray:
    """One leaf, on the host, as stored; no other process of a run takes part."""
    as_array = {name: ocp.RestoreArgs(restore_type=np.ndarray)}
    request = ocp.args.PyTreeRestore(item={name: 0}, restore_args=as_array, partial_restore=True)
    return _readable(
        Path(folder), lambda reader: reader.restore(_params(Path(folder)), args=request), alone=True
    )[name]
