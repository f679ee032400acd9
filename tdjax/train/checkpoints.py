"""Train states on disk: <run>/step_000500/{manifest.json, state/}, each complete or absent, and
read back bit by bit; written beside the steps that follow.

A leaf's name is its path in the state joined by dots ("opt.0.mu.blocks.self_attn.q.kernel"), as in
tdjax.checkpoints.orbax.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import jax
import numpy as np
import orbax.checkpoint as ocp

import tdjax
from tdjax.checkpoints.arrays import quiet, write_arrays
from tdjax.checkpoints.orbax import (
    FORMAT,
    Lazy,
    check_files,
    check_table,
    file_sizes,
    named_leaves,
    table,
)
from tdjax.config.parsing import json_object, mismatch
from tdjax.errors import CheckpointError, first_line
from tdjax.parallel import hosts


class Manifest(TypedDict):
    """manifest.json of a train state: {leaf name: (shape, dtype name)}, and what implements each
    random key among them."""

    format: int
    kind: str
    step: int
    leaves: dict[str, tuple[list[int], str]]
    keys: dict[str, str]
    files: NotRequired[dict[str, int]]


def folder(run: Path, step: int) -> Path:
    """Returns where the checkpoint of a step lies, whether it is there or not."""
    return run / f"step_{step:06}"


def steps(run: Path) -> list[int]:
    """Returns the steps of the run's checkpoints, rising."""
    found = (
        re.fullmatch(r"step_(\d{6,})", p.parent.name) for p in run.glob("step_*/manifest.json")
    )
    return sorted(int(match[1]) for match in found if match)


def latest(run: Path) -> Path | None:
    """Returns the last checkpoint of a run, or None."""
    found = steps(run)
    return folder(run, found[-1]) if found else None


def arrays(state) -> dict[str, Any]:
    """Returns {leaf name: array}; a random key as the integers behind it."""
    plain = lambda x: jax.random.key_data(x) if is_key(x) else x
    return {name: plain(x) for name, x in named_leaves(state).items()}


def is_key(x) -> bool:
    """Returns whether an array, or the shape of one, holds random keys."""
    return jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)


def save(run: Path, step: int, state, metadata: dict[str, Any], keep: int = 0) -> Path:
    """Writes one checkpoint, then deletes all but the last `keep` (0: none is deleted). Returns its
    folder. Every process of a run takes part, and writes what its devices hold. state: arrays of
    jax, or those of `on_host`. metadata: JSON values for the manifest."""
    leaves = arrays(state)
    manifest = {
        "format": FORMAT,
        "kind": "train",
        "step": step,
        "trainer": f"tdjax {tdjax.__version__}",
        **metadata,
    }
    manifest["leaves"] = {
        name: [list(shape), dtype] for name, (shape, dtype) in table(leaves).items()
    }
    manifest["keys"] = {
        name: str(jax.random.key_impl(x)) for name, x in named_leaves(state).items() if is_key(x)
    }
    target = folder(run, step)
    size = sum(x.nbytes for x in leaves.values())
    own = {"overwrite": True, "owned": _is_checkpoint, "size": size}
    with hosts.written_by_all(target, **own) as part:
        if hosts.first():
            part.mkdir()
        write_arrays(part / "state", {name: _in_turn(x) for name, x in leaves.items()}, Lazy)
        if hosts.first():
            manifest["files"] = file_sizes(part / "state")
            (part / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    if keep and hosts.first():
        delete(run, keep)
    return target


def _in_turn(array):
    """An array of the host to be written when it is its turn; those of devices as they are."""
    if isinstance(array, jax.Array):
        return array
    return Lazy(array.shape, array.dtype, lambda: array)


def on_host(state):
    """Returns a copy of a state in the host's memory, arrays of numpy and keys of jax, which stays
    when a step takes the memory of the state."""
    for array in arrays(state).values():
        array.copy_to_host_async()
    return jax.tree.map(_copied, state)


def _copied(array: jax.Array):
    if is_key(array):
        data = _copied(jax.random.key_data(array))
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(array))
    host = np.asarray(array)  # on a CPU the device's own memory
    return host.copy() if next(iter(array.devices())).platform == "cpu" else host


class Saver:
    """Writes the checkpoints of a run beside its steps, one at a time: a state is copied to the
    host's memory, and a thread writes the copy. Several processes write together, and wait for it:
    what they exchange has one order.

    keep: as of `save`. on_save: called with the state and its step once a checkpoint is there, in
    the same thread. The block ends when all is written; at a second Ctrl-C at once.

    with Saver(run, keep) as saver:
        saver.save(500, state, metadata)
    """

    def __init__(
        self,
        run: Path,
        keep: int = 0,
        on_save: Callable[[Any, int], Any] | None = None,
    ):
        self.run = run
        self.keep = keep
        self.on_save = on_save
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, step: int, state, metadata: dict[str, Any]) -> None:
        """Begins to write a checkpoint, once the one before is there. Raises what `wait` does."""
        self.wait()
        if jax.process_count() > 1:
            self._write(step, state, metadata)
            return
        copy = on_host(state)
        given = step, copy, metadata
        self._thread = threading.Thread(
            target=self._run, args=given, name="tdjax checkpoint", daemon=True
        )
        self._thread.start()

    def _run(self, *given) -> None:
        try:
            self._write(*given)
        except BaseException as error:  # noqa: BLE001  (raised again by check)
            self._error = error

    def _write(self, step: int, state, metadata: dict[str, Any]) -> None:
        save(self.run, step, state, metadata, self.keep)
        if self.on_save is not None:
            self.on_save(state, step)

    def check(self) -> None:
        """Raises what went wrong in the thread, if it is known by now: an OSError where the disk is
        full."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def wait(self) -> None:
        """Returns when all is written. Raises what `check` does."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind is None or not issubclass(kind, KeyboardInterrupt):
            self.wait()


def delete(run: Path, keep: int = 0) -> None:
    """Deletes the run's checkpoints, all but the last `keep`."""
    for step in steps(run)[: -keep or None]:
        shutil.rmtree(folder(run, step), ignore_errors=True)


def _is_checkpoint(path: Path) -> bool:
    """Whether a folder is a checkpoint of a run, and holds nothing else."""
    if {p.name for p in path.iterdir()} != {"manifest.json", "state"}:
        return False
    try:
        return inspect(path)["kind"] == "train"
    except CheckpointError:
        return False


def inspect(path: Path) -> dict[str, Any]:
    """Returns the manifest of one checkpoint. Raises CheckpointError where it is no train state of
    ours."""
    try:
        manifest = json_object((path / "manifest.json").read_bytes())
        wrong = mismatch(manifest, Manifest)
        if wrong:
            raise ValueError(wrong)
    except (OSError, ValueError) as e:
        raise CheckpointError(
            f"{path} is no checkpoint of a run",
            f"{type(e).__name__}: {e}",
            "go on from an earlier step",
        ) from e
    if (manifest["format"], manifest["kind"]) != (FORMAT, "train"):
        raise CheckpointError(
            f"{path} is not ours",
            f"expected a train state of format {FORMAT}",
            "go on with the version that wrote it",
        )
    return manifest


def restore(path: Path, state):
    """Returns the state of a checkpoint, laid out as the (abstract) state given: arrays, or shapes
    with their shardings. Raises CheckpointError for another state and for a damaged one."""
    manifest = inspect(path)
    listed = {name: (tuple(shape), dtype) for name, (shape, dtype) in manifest["leaves"].items()}
    wanted = named_leaves(state)
    stored = {
        name: jax.eval_shape(jax.random.key_data, x) if is_key(x) else x
        for name, x in wanted.items()
    }
    check_table(
        table(stored),
        listed,
        f"{path} holds another train state: the model, the method or the optimizer is not the same",
    )
    check_files(path / "state", manifest.get("files"), "go on from an earlier step")
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    where = {name: x.sharding or here for name, x in wanted.items()}
    how = lambda name, x: ocp.ArrayRestoreArgs(
        restore_type=jax.Array, sharding=where[name], global_shape=x.shape, dtype=x.dtype
    )
    args = ocp.args.PyTreeRestore(
        item=dict(stored), restore_args={name: how(name, x) for name, x in stored.items()}
    )
    try:
        with (
            quiet(),
            contextlib.closing(ocp.Checkpointer(ocp.PyTreeCheckpointHandler())) as reader,
        ):
            read = reader.restore(os.path.abspath(path / "state"), args=args)
    except Exception as e:  # whatever Orbax and TensorStore raise
        raise CheckpointError(
            f"{path / 'state'} cannot be read",
            f"{type(e).__name__}: {first_line(e)}",
            "go on from an earlier step",
        ) from e
    keys = {
        name: jax.random.wrap_key_data(read[name], impl=impl)
        for name, impl in manifest["keys"].items()
    }
    return jax.tree.unflatten(
        jax.tree.structure(state), [keys.get(name, read[name]) for name in wanted]
    )
