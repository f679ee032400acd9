"""What a local file or folder holds, by names alone: the transformer (or its two experts) and the
parts beside it."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from tdjax.checkpoints import filenames
from tdjax.checkpoints.hub import Repo
from tdjax.config import KINDS, sampler_changes
from tdjax.config.parsing import json_object, mismatch, told
from tdjax.errors import CheckpointError
from tdjax.presets import PRESETS

# What a model folder of tdjax holds: checkpoints under these names, and files.
MODEL_FOLDERS = ("dit", "dit_high", "dit_low", "vae", "text")
MODEL_FILES = {"model.json", "tokenizer.json", "spiece.model", "MODEL_CARD.md"}


@dataclasses.dataclass(frozen=True)
class Remote:
    """A file or folder of a hub repository, fetched when it is needed; its other files travel with
    it."""

    repo: Repo
    name: str
    files: tuple[str, ...]

    def path(self) -> Path:
        return self.repo.fetch(list(self.files)) / self.name


@dataclasses.dataclass(kw_only=True)
class Found:
    """What a name turned out to be, before overrides and downloads."""

    name: str
    layout: str = "published"
    preset: str | None = None
    parts: dict[str, Path | Remote] = dataclasses.field(default_factory=dict)
    looked: list[Path] = dataclasses.field(default_factory=list)  # folders searched for parts
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def distilled(self) -> bool:
        """False for a preset of undistilled weights; what files without a preset are is told where
        they are opened."""
        return self.preset is None or PRESETS[self.preset].distilled


def slots(dits: tuple) -> dict:
    """{"dit": the first, "dit_low": the second} of one transformer or two experts."""
    return dict(zip(("dit", "dit_low"), dits, strict=False))


def experts(name: str, exists: Callable[[str], bool]) -> tuple[str, ...]:
    """(high noise, low noise) where the other expert is there too, else the name alone."""
    head, _, tail = name.rpartition("/")
    for other in (filenames.swap_expert(name), f"{head}/{filenames.swap_expert(tail)}"):
        if other != name and exists(other):
            return (name, other) if filenames.expert(name) == "high" else (other, name)
    return (name,)


def absolute(path: str | Path) -> Path:
    """Not resolve(): a file of a hub cache is a link to a name that says nothing."""
    return Path(os.path.abspath(Path(path).expanduser()))


def local(path: Path) -> Found:
    """A file or a folder, with the parts that lie beside it, in it, or one folder up; in ComfyUI's
    tree in the folders of their kind."""
    path = absolute(path)
    found = _one_file(path) if path.is_file() else folder(path)
    for place in found.looked:
        names = _nearby(place)
        for part in filenames.COMPONENTS:
            name = filenames.component(names, part)
            if name and part not in found.parts:
                found.parts[part] = place / name
    dit = found.parts.get("dit")
    found.preset = found.facts.get("preset") or (
        dit and (_alias_of_source(dit) or filenames.alias_of_path(dit))
    )
    return found


class Reading(TypedDict):
    """What words mean beside one of `when`: {word: place of the value}."""

    when: list[str]
    says: dict[str, int]


class Stand(TypedDict):
    """Where the values of a factor stand."""

    before: list[str]
    after: list[list[str]]
    between: list[str]


class Language(TypedDict):
    """The closed language of a small model; tdjax.text.language says what the fields are."""

    words: list[str]
    knows: dict[str, list[str]]
    needs: NotRequired[list[str]]
    says: NotRequired[dict[str, tuple[str, int]]]
    phrases: NotRequired[dict[str, list[Reading]]]
    orders: NotRequired[list[list[str]]]
    caption: NotRequired[str]
    apart: NotRequired[list[tuple[str, int, str]]]
    stands: NotRequired[dict[str, Stand]]
    near: NotRequired[dict[str, dict[str, int]]]


def _language_fault(language: dict[str, Any]) -> str | None:
    """What a language says of values that it does not have, as a line for a message."""
    knows = language["knows"]
    phrases = language.get("phrases", {})
    places = [*language.get("says", {}).values()]
    for factor, readings in phrases.items():
        if all(reading["when"] for reading in readings):
            return f"language.phrases of {told(factor)} have no reading for all other words"
        places += [(factor, place) for one in readings for place in one["says"].values()]
    places += [pair for near in language.get("near", {}).values() for pair in near.items()]
    apart = language.get("apart", ())
    places += [(factor, place) for factor, place, _ in apart]
    for factor, place in places:
        if not 0 <= place < len(knows.get(factor, ())):
            return f"language has no value {place} of {told(factor)}"
    needs, stands = language.get("needs", ()), language.get("stands", {})
    for factor in (*needs, *stands, *(other for _, _, other in apart)):
        if factor not in knows:
            return f"language has no values of {told(factor)}"
    for factor in needs:
        if len({place for name, place, _ in apart if name == factor}) == len(knows[factor]):
            return f"language leaves no value of {told(factor)} to draw"
    if stands and "near" not in language:
        return "language.stands needs near"
    return _caption_fault(language)


def _caption_fault(language: dict[str, Any]) -> str | None:
    if "caption" not in language:
        return None
    caption, knows = language["caption"], language["knows"]
    fault = "language.caption needs orders, apart, and braces around factors"
    complete = {"orders", "apart"} <= language.keys()
    if not complete or set(re.findall(r"{(.*?)}", caption)) - set(knows):
        return fault
    try:
        caption.format(**dict.fromkeys(knows, ""))
    except (ValueError, LookupError):  # a single brace
        return fault
    return None


class ModelFacts(TypedDict, total=False):
    """What model.json may say of a model folder."""

    name: str
    preset: str
    frames: int
    height: int
    width: int
    prompts: list[str]
    sampler: dict[str, Any]
    language: Language


class Manifest(TypedDict):
    """manifest.json of a checkpoint; {leaf name: (shape, dtype name)}."""

    format: int
    kind: str
    config: dict[str, Any]
    leaves: dict[str, tuple[list[int], str]]
    source: NotRequired[dict[str, Any]]
    converter: NotRequired[str]
    files: NotRequired[dict[str, int]]


def read_manifest(folder: Path) -> dict[str, Any]:
    """manifest.json of a checkpoint folder. Raises ValueError where it is none of ours, whatever
    its format."""
    values = json_object((folder / "manifest.json").read_bytes())
    wrong = mismatch(values, Manifest)
    if wrong:
        raise ValueError(wrong)
    return values


def _read_facts(path: Path) -> dict[str, Any]:
    """model.json of a model folder; CheckpointError where it is damaged."""
    try:
        values = json_object(path.read_bytes())
        wrong = mismatch(values, ModelFacts)
        if not wrong and values.get("preset") not in (None, *PRESETS):
            wrong = f"preset is {values['preset']!r}, and there is none of this name"
        if not wrong and "language" in values:
            wrong = _language_fault(values["language"])
        if wrong:
            raise ValueError(wrong)
        sampler_changes(values.get("sampler", {}))
    except ValueError as error:
        raise CheckpointError(
            f"{path} is damaged",
            str(error),
            "write the folder again: python -m convert SRC DST --overwrite",
        ) from error
    return values


def _one_file(path: Path) -> Found:
    if not filenames.is_weights(path.name):
        allowed = ", ".join((*filenames.WEIGHTS, *filenames.ALSO))
        raise CheckpointError(
            f"{path} is no weight file by its name",
            f"allowed: {allowed}",
            "give the weight file itself",
        )
    up = path.parent.parent
    dits = experts(f"{path.parent.name}/{path.name}", lambda name: (up / name).is_file())
    parts = {slot: up / name for slot, name in slots(dits).items()}
    looked = [path.parent, up, *_comfyui(path)]
    return Found(name=filenames.stem(path.name), parts=parts, looked=looked)


def _comfyui(path: Path) -> list[Path]:
    """Where the other parts of a file in ComfyUI's tree lie: models/vae, models/text_encoders for
    models/diffusion_models/[folder/]file."""
    roots = [p.parent for p in path.parents[:2] if p.name in filenames.COMFY_MODELS]
    places = [root / name for root in roots for name in (".", *filenames.COMFY_PARTS)]
    return [place for place in places if place.is_dir()]


def folder(path: Path) -> Found:
    """A component or a model folder of tdjax, or a folder of published files."""
    names = _listing(path)
    if "manifest.json" in names:  # one component of ours: `<model>/dit`
        dits = experts(path.name, lambda name: (path.parent / name / "manifest.json").is_file())
        return Found(
            name=path.name,
            layout="ours",
            parts={s: path.parent / name for s, name in slots(dits).items()},
            looked=[path.parent],
        )
    layout, dits = filenames.transformers(names, str(path))
    if (
        layout == "published" and len(dits) == 1
    ):  # the other expert may be in the folder beside this one
        found = _one_file(path / dits[0])
        return dataclasses.replace(found, name=path.name, looked=[path, path.parent])
    facts = _read_facts(path / "model.json") if "model.json" in names else {}
    looked = [path, path.parent] if layout == "published" else [path]
    return Found(
        name=path.name,
        layout=layout,
        parts={s: path / name for s, name in slots(dits).items()},
        looked=looked,
        facts=facts,
    )


def entry(path: Path) -> Path:
    """The transformer that a path given for one expert means: itself, or the only one in a
    folder."""
    if path.is_file() or (path / "manifest.json").is_file():
        return path
    _, dits = filenames.transformers(_listing(path), str(path))
    if len(dits) != 1:
        raise CheckpointError(
            f"{path} is a folder with {len(dits)} transformers",
            "one expert was expected",
            "give the file itself",
        )
    return path / dits[0]


def _listing(root: Path) -> list[str]:
    """Names of files in a folder and one level below it, hidden ones left out."""
    files = (
        p.relative_to(root).as_posix() for p in [*root.glob("*"), *root.glob("*/*")] if p.is_file()
    )
    return sorted(n for n in files if not n.startswith(".") and "/." not in n)


def _nearby(root: Path) -> list[str]:
    """Names of files in a folder, and those of known parts below it: enough to find a part, also
    where the folder is / or home."""
    known = [
        f"{name}{mark}"
        for part in filenames.COMPONENTS.values()
        for name in part
        for mark in ("", "/manifest.json", "/config.json")
    ]
    files = sorted(p.name for p in root.glob("[!.]*") if p.is_file())
    return files + [name for name in known if "/" in name and (root / name).is_file()]


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint that tdjax wrote, of any version, and holds nothing else."""
    if folder.is_symlink() or {p.name for p in folder.iterdir()} != {"manifest.json", "params"}:
        return False
    try:
        found = read_manifest(folder)
    except (OSError, ValueError):
        return False
    return found.get("converter", "").startswith("tdjax ") and found["kind"] in KINDS


def is_model(folder: Path) -> bool:
    """Whether a folder is a checkpoint, or a model folder, that tdjax wrote and holds nothing
    else: checkpoints under the names of components, a tokenizer, model.json."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    if is_checkpoint(folder):
        return True
    inside = list(folder.iterdir())
    parts = [path for path in inside if path.is_dir()]
    files = {path.name for path in inside if not path.is_dir()}
    return (
        bool(parts)
        and files <= MODEL_FILES
        and all(part.name in MODEL_FOLDERS and is_checkpoint(part) for part in parts)
    )


def _alias_of_source(dit: Path) -> str | None:
    """The preset that a converted checkpoint came from, by the source name in its manifest."""
    if not (dit / "manifest.json").is_file():
        return None
    try:
        source = json_object((dit / "manifest.json").read_bytes()).get("source")
    except ValueError as error:
        raise CheckpointError(
            f"{dit / 'manifest.json'} is damaged",
            str(error),
            "write the folder again: python -m convert SRC DST --overwrite",
        ) from error
    name = source.get("name") if isinstance(source, dict) else None
    return filenames.alias_of_path(Path(name)) if isinstance(name, str) else None


def shown(path: Path) -> str:
    """A file with its folder: what tells the experts apart."""
    return f"{path.parent.name}/{path.name}"
