"""Reading and writing of {name: array} by Orbax, a bounded number of bytes at a time.

Importing Orbax takes longer than many a use of it: this module is imported where arrays are read.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

GROUP_BYTES = 2**26  # small leaves written together; a larger leaf is alone in memory
SHARED_BYTES = 2**22  # a part of an array that copies of it write in parts
READ_BYTES = 2**30  # leaves read at the same time
CHUNK_BYTES = (
    2**28
)  # pieces in which an array is written, so that a sharded restore reads only what it needs


def write_arrays(folder: Path, leaves: Mapping[str, Any], lazy: type) -> None:
    """Writes arrays, and instances of `lazy`, which have shape, dtype, nbytes and `read()`, to a
    new folder. All processes of a run take part."""
    registry = array_handlers((lazy, InTurn(deepcopy_host_arrays=False)))
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry, use_compression=False)
    with quiet(), contextlib.closing(ocp.Checkpointer(handler)) as writer:
        pieces = {name: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES) for name in leaves}
        writer.save(_absolute(folder), args=ocp.args.PyTreeSave(leaves, save_args=pieces))


def described(folder: Path) -> dict[str, Any]:
    """Returns {name: what has its shape and dtype} of a folder. Raises ValueError where Orbax finds
    no description that it can read."""
    with _reader() as reader:
        metadata = reader.metadata(_absolute(folder)).item_metadata
    if metadata is None:
        raise ValueError("no readable description of the arrays")
    return metadata.tree


def placed(folder: Path, wanted: Mapping[str, Any], where: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arrays called as those of `wanted`, in their shapes and dtypes, each where its
    sharding says. Others of the folder are not read."""
    how = lambda x, s: ocp.ArrayRestoreArgs(
        restore_type=jax.Array, sharding=s, global_shape=x.shape, dtype=x.dtype
    )
    args = {name: how(x, where[name]) for name, x in wanted.items()}
    request = ocp.args.PyTreeRestore(item=dict(wanted), restore_args=args, partial_restore=True)
    with _reader() as reader:
        return reader.restore(_absolute(folder), args=request)


def read(folder: Path, name: str) -> np.ndarray:
    """Returns one array, on the host, as stored; no other process of a run takes part."""
    as_array = {name: ocp.RestoreArgs(restore_type=np.ndarray)}
    request = ocp.args.PyTreeRestore(item={name: 0}, restore_args=as_array, partial_restore=True)
    with _reader(alone=True) as reader:
        return reader.restore(_absolute(folder), args=request)[name]


@contextlib.contextmanager
def _reader(alone: bool = False) -> Iterator[ocp.Checkpointer]:
    """alone: it waits for no other process."""
    registry = ocp.type_handlers.create_type_handler_registry(
        (jax.Array, _InGroups()), (np.ndarray, _Sizes())
    )
    among = ocp.options.MultiprocessingOptions()
    if alone:
        here = jax.process_index()
        among = ocp.options.MultiprocessingOptions(primary_host=here, active_processes={here})
    handler = ocp.PyTreeCheckpointHandler(
        type_handler_registry=registry, multiprocessing_options=among
    )
    with (
        quiet(),
        contextlib.closing(ocp.Checkpointer(handler, multiprocessing_options=among)) as reader,
    ):
        yield reader


def _absolute(folder: Path) -> str:
    """A path as Orbax wants it."""
    return os.path.abspath(folder)


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
