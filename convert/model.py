"""One component, or all components of a model into a model folder."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

from convert import merge
from convert.cli import bar, known, reading, save
from convert.leaves import Leaves, of_file, open_leaves
from tdjax.checkpoints import (
    arrays,  # noqa: F401  a signal while it is imported would leave a folder that is begun
    filenames,
    folders,
)
from tdjax.checkpoints.folders import is_model
from tdjax.checkpoints.orbax import inspect
from tdjax.checkpoints.published import detect, lora
from tdjax.checkpoints.published.checkpoint import Checkpoint, open_checkpoint
from tdjax.checkpoints.published.files import open_source
from tdjax.cli import lora_pair
from tdjax.config import to_dict
from tdjax.errors import CheckpointError, UsageError
from tdjax.files import written

NAMES = ("turbo", "wan", "diffusers", "transformers")  # that an export can have
TOKENIZERS = ("tokenizer.json", "spiece.model")
FOLDERS = {"dit": "dit", "dit_low": "dit_low", "vae": "vae", "text": "text"}


def components(sources: list[Path]) -> dict[str, Path]:
    """{"dit" | "dit_low" | "vae" | "text" | "tokenizer": path} of one model, from its files or from
    a folder that holds them."""
    if len(sources) == 1:
        inside = _in_folder(sources[0]) if sources[0].is_dir() else {}
        return inside if len(inside) > 1 else {"one": next(iter(inside.values()), sources[0])}
    found: dict[str, list[Path]] = {}
    for path in sources:
        found.setdefault("tokenizer" if path.name in TOKENIZERS else _kind_of(path), []).append(
            path
        )
    many = {
        kind: paths for kind, paths in found.items() if len(paths) > (2 if kind == "dit" else 1)
    }
    if many:
        kind, paths = next(iter(many.items()))
        raise UsageError(
            f"{len(paths)} sources are a {kind}",
            ", ".join(map(str, paths)),
            "convert them one by one",
        )
    out = {kind: paths[0] for kind, paths in found.items()}
    if len(found.get("dit", ())) == 2:
        out["dit"], out["dit_low"] = _experts(found["dit"])
    return out


def _kind_of(path: Path) -> str:
    if (path / "manifest.json").is_file():
        return inspect(path)["kind"]
    return detect.kind_of(open_source(path).tensors, path.name)


def _experts(paths: list[Path]) -> tuple[Path, Path]:
    """(high noise, low noise), which keys and shapes cannot tell: only names do."""
    by_name = {filenames.expert(folders.shown(path)): path for path in paths}
    if by_name.keys() != {"high", "low"}:
        raise UsageError(
            f"two transformers: {paths[0]} and {paths[1]}",
            "they may be the experts of Wan2.2, but their names do not say which is for high noise"
            " and which for low",
            "put high or low into the names of the files or of their folders",
        )
    return by_name["high"], by_name["low"]


def _in_folder(folder: Path) -> dict[str, Path]:
    """The parts inside a folder. A folder of shards or a single file is one part, for the reader to
    open."""
    if (folder / "manifest.json").is_file():
        return {}
    root = folders.absolute(folder)
    return {
        name: path
        for name, path in folders.local(root).parts.items()
        if isinstance(path, Path) and root in path.parents
    }


def convert_one(args, path: Path | None, target: Path) -> dict[str, Any]:
    """Convert a file, or the merge that --merge asks for; the report."""
    leaves = _merged(args) if path is None else _opened(args, path)
    if args.names:
        _check_names(leaves.kind, args.names)
    digest = None
    if leaves.file is not None and not args.no_hash:
        with bar(leaves.facts["bytes"], f"{leaves.path.name}: hash") as progress:
            digest = leaves.file.sha256(progress.update)
        leaves = dataclasses.replace(leaves, facts=leaves.facts | {"sha256": digest})
    with reading(leaves, leaves.path.name) as watched:
        save(watched, target, args.names, args.overwrite)
    config = to_dict(leaves.config)
    size = (
        sum(f.stat().st_size for f in target.rglob("*") if f.is_file())
        if target.is_dir()
        else target.stat().st_size
    )
    about = {
        "kind": leaves.kind,
        "what": detect.describe(leaves.kind, leaves.config),
        "config": config,
        "param": config["policy"]["param"],
    }
    return {
        **leaves.facts,
        **about,
        "leaves": len(leaves.lazy),
        "written": size,
        "out": str(target),
    }


def _check_names(kind: str, names: str) -> None:
    """Raises UsageError where nobody has published such a network under these names."""
    known = [name for name in detect.NAMINGS[kind].ROWS if name in NAMES]
    if names not in known:
        raise UsageError(
            f"--names {names} for a {kind}",
            f"its published names are {', '.join(known)}",
            f"use --names {known[0]}, or leave it away for those of the source",
        )


def _opened(args, path: Path) -> Leaves:
    """A source with the LoRA files of the command line, which only a transformer takes."""
    lora = tuple(map(lora_pair, args.lora)) if args.lora and _kind_of(path) == "dit" else ()
    return open_leaves(path, args.dtype, lora=lora, **known(args))


def _merged(args) -> Leaves:
    """--merge BASE,DIFF_BASE,TARGET[,W], then --lora on the result."""
    names, weight = merge.merged_files(args.merge)
    for name in names:
        if (name / "manifest.json").is_file():
            raise CheckpointError(
                f"{name} is a converted checkpoint",
                "--merge works on published files",
                f"first: python -m convert {name} FILE.safetensors",
            )
    base, diff_base, target = (open_checkpoint(name, **known(args)) for name in names)
    tensors, counts = merge.merge(base, diff_base, target, weight)
    found = detect.detect(tensors, base.name, base.source.metadata, **known(args))
    changes = [counts]
    for file, w in map(lora_pair, args.lora):
        tensors, counts = lora.add_lora(tensors, found, file, w)
        changes.append(counts)
    return of_file(Checkpoint(base.source, found, tensors, tuple(changes)), args.dtype)


def convert_model(args, parts: dict[str, Path], target: Path) -> list[dict[str, Any]]:
    """All components into one folder, which appears when the last one is complete; the reports."""
    if target.suffix == ".safetensors":
        raise UsageError(
            f"{len(parts)} sources and {target.name}",
            "an export holds one component",
            "export them one by one",
        )
    reports = []
    with written(target, args.overwrite, owned=is_model) as part:
        part.mkdir()
        for name, path in parts.items():
            if name == "tokenizer":
                shutil.copyfile(path / TOKENIZERS[0] if path.is_dir() else path, part / path.name)
                continue
            folder = "dit_high" if name == "dit" and "dit_low" in parts else FOLDERS[name]
            report = convert_one(args, path, part / folder)
            reports.append(report | {"out": str(target / folder)})
    return reports
