"""Train states on disk: <run>/step_000500/{manifest.json, state/}, each complete or absent, and
read back bit by bit.

A leaf's name is its path in the state joined by dots ("opt.0.mu.blocks.self_attn.q.kernel"), as in
tdjax.checkpoints.orbax.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import jax
import orbax.checkpoint as ocp

import tdjax
from tdjax.checkpoints.orbax import (
    FORMAT,
    array_handlers,
    check_files,
    check_table,
    file_sizes,
    named_leaves,
    quiet,
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
    folder. Every process of a run takes part, and writes what its devices hold. metadata: JSON
    values for the manifest."""
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
    with hosts.written_by_all(target, **own) as part, quiet():
        if hosts.first():
            part.mkdir()
        handler = ocp.PyTreeCheckpointHandler(
            use_compression=False, type_handler_registry=array_handlers()
        )
        with contextlib.closing(ocp.Checkpointer(handler)) as writer:
            writer.save(os.path.abspath(part / "state"), args=ocp.args.PyTreeSave(leaves))
        if hosts.first():
            manifest["files"] = file_sizes(part / "state")
            (part / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    if keep and hosts.first():
        delete(run, keep)
    return target


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
        with quiet(), contextlib.closing(ocp.Checkpointer(ocp.PyTreeCheckpointHandler())) as reader:
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
