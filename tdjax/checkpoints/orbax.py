"""Our one checkpoint layout: <folder>/manifest.json beside <folder>/params/ (Orbax, a flat dict
{leaf name: array}; `arrays` reads and writes them).

A leaf's name is its path in the module joined by dots ("blocks.self_attn.q.kernel"); blocks are
stacked on axis 0. The manifest holds the config, so loading is: config -> abstract module ->
shardings -> restore, and needs no other argument.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

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
    from tdjax.checkpoints import arrays

    with hosts.written_by_all(folder, overwrite, is_model, size) as part:
        if hosts.first():
            part.mkdir()
        arrays.write_arrays(part / "params", lazy, Lazy)
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
    from tdjax.checkpoints import arrays

    stored = _readable(folder, lambda params: table(arrays.described(params)))
    check_table(listed, stored, f"{folder / 'params'} does not hold what manifest.json lists")
    check_files(folder / "params", manifest.get("files"), AGAIN)
    return kind, cfg


def _readable(folder: Path, read: Callable[[Path], Any]):
    """read(the path of the arrays), where whatever Orbax and TensorStore raise becomes one
    CheckpointError."""
    try:
        return read(folder / "params")
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
    from tdjax.checkpoints import arrays

    places = placements(wanted, sharding)
    where = {name: places[name] for name in wanted}  # what is missing here is no damage
    leaves = _readable(folder, lambda params: arrays.placed(params, wanted, where))
    return config or stored, assemble(module, leaves)


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
    from tdjax.checkpoints import arrays

    return _readable(Path(folder), lambda params: arrays.read(params, name))
