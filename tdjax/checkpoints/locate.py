"""Which files a model name means: a preset, a hub id, a published file, a folder of files, our
folder or a diffusers folder.

Nothing here opens weights: what a file really holds is read, and checked, where it is loaded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import filecmp
import functools
import os
import re
import stat
import sys
import tempfile
from pathlib import Path
from typing import Any

from tdjax.checkpoints import filenames
from tdjax.checkpoints.folders import Found, Remote, absolute, entry, experts, local, shown, slots
from tdjax.checkpoints.hub import Repo, close
from tdjax.errors import CheckpointError, UsageError
from tdjax.presets import PRESETS, Preset

PARTS = ("dit", "vae", "text", "tokenizer")
PATHS = (  # arguments that give a component's own file
    "dit_path",
    "high_noise_model_path",
    "low_noise_model_path",
    "vae_path",
    "text_encoder_path",
    "tokenizer_path",
)
TITLES = {
    "dit": "transformer",
    "dit_low": "low-noise expert",
    "vae": "VAE",
    "text": "text encoder",
    "tokenizer": "tokenizer",
}
ARGUMENTS = {
    "dit": "dit_path",
    "dit_low": "low_noise_model_path",
    "vae": "vae_path",
    "text": "text_encoder_path",
    "tokenizer": "tokenizer_path",
}
HEADER = 2**24  # bytes of a .safetensors header that are looked through
UNWANTED = (
    ".bin",
    ".msgpack",
    ".h5",
    ".onnx",
    ".pt",
    ".ckpt",
)  # copies of the same weights in a diffusers repository


@dataclasses.dataclass(frozen=True, kw_only=True)
class Located:
    """Local files of a model. dit: one path, or (high noise, low noise). A folder with
    manifest.json is ours."""

    name: str
    layout: str  # of the transformer: "published" | "ours" | "diffusers"
    preset: str | None  # key of PRESETS, where names tell
    dit: tuple[Path, ...] = ()
    vae: Path | None = None
    text: Path | None = None
    tokenizer: Path | None = (
        None  # tokenizer.json or spiece.model, a folder or a text encoder's file that holds one
    )
    distilled: bool = True  # False: by its names Wan's own weights, for the teacher's samplers
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)  # model.json of our folder
    warnings: tuple[str, ...] = ()


def locate(
    model: str | Path | None,
    *,
    revision: str | None = None,
    offline: bool = False,
    parts: tuple[str, ...] = PARTS,
    dit_path: str | Path | None = None,
    high_noise_model_path: str | Path | None = None,
    low_noise_model_path: str | Path | None = None,
    vae_path: str | Path | None = None,
    text_encoder_path: str | Path | None = None,
    tokenizer_path: str | Path | None = None,
) -> Located:
    """Find (and, from the hub, download) the files of a model.

    model:     a preset or the stem of a published file, in any case; a hub id "organisation/name",
               or one file of it "organisation/name/file"; a local file or folder. None (or "demo")
               where dit_path or the expert paths say it.
    parts:     those that must be found, and are downloaded; another one is None unless it lies
               beside the others.
    *_path:    local files that replace parts; replaced parts are not downloaded.
    Raises CheckpointError with what is missing, where it was looked for and what it is called.
    """
    if dit_path and (high_noise_model_path or low_noise_model_path):
        raise UsageError(
            "dit_path and an expert path",
            "both give the transformer",
            "give one file, or the two experts",
        )
    given = {
        "dit": dit_path or high_noise_model_path,
        "dit_low": low_noise_model_path,
        "vae": vae_path,
        "text": text_encoder_path,
        "tokenizer": tokenizer_path,
    }
    own = {name: _existing(absolute(path), ARGUMENTS[name]) for name, path in given.items() if path}
    if model is None or str(model) in ("", "demo"):
        if "dit" not in own:
            raise UsageError(
                "no model",
                "a transformer is needed beside the other files",
                "give `model`, or dit_path FILE",
            )
        found = local(own["dit"])
    else:
        found = _find(str(model), revision, offline)
        if "dit" in own:
            found = _with_transformer(
                found, local(own["dit"]), keep_low=bool(high_noise_model_path)
            )
    if high_noise_model_path:  # as given, even if their names say the opposite
        high, pair = entry(own["dit"]), [found.parts.get("dit"), found.parts.get("dit_low")]
        found.parts["dit"] = high
        if pair[1] == high:
            found.parts["dit_low"] = pair[0]
    found.parts |= {
        name: entry(path) if name == "dit_low" else path
        for name, path in own.items()
        if name != "dit"
    }
    warnings = _swapped(own.get("dit") if high_noise_model_path else None, own.get("dit_low"))
    text = found.parts.get("text")
    if "tokenizer" not in found.parts and isinstance(text, Path) and _carries_tokenizer(text):
        found.parts["tokenizer"] = text
    if (
        "tokenizer" not in found.parts and "tokenizer" in parts
    ):  # small, and the official folder of weights has none
        found.parts |= _base_parts(Preset, Repo(Preset.base_repo, None, offline), only="tokenizer")
    alone = (
        dit_path is not None
        and "dit_low" not in found.parts
        and filenames.needs_two(shown(own["dit"]))
    )
    if alone:
        warnings.append(
            f"{shown(own['dit'])} is one expert of two, given by itself: every step runs through it"
        )
    paths = _gather(found, parts, alone=alone)
    dits = tuple(paths[name] for name in ("dit", "dit_low") if name in paths)
    if len(dits) == 2 and _same(*dits):
        raise CheckpointError(
            f"the high-noise and the low-noise expert are the same weights: {dits[0]} and"
            f" {dits[1]}",
            "Wan2.2 A14B has two different transformers",
            "give the file named high as high_noise_model_path, the one named low as"
            " low_noise_model_path",
        )
    return Located(
        name=found.name,
        layout=found.layout,
        preset=found.preset,
        dit=dits,
        distilled=found.distilled,
        facts=found.facts,
        warnings=tuple(warnings),
        **{name: paths.get(name) for name in ("vae", "text", "tokenizer")},
    )


def _carries_tokenizer(text: Path) -> bool:
    """Whether a text encoder's file holds its tokenizer: every .gguf, and ComfyUI's .safetensors,
    which have it among their tensors."""
    if text.suffix != ".safetensors" or not text.is_file():
        return text.suffix == ".gguf"
    with text.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        return b'"spiece_model"' in f.read(min(length, HEADER))


def cache_folder() -> Path:
    """Where tdjax keeps its own files: TDJAX_CACHE, or tdjax below the platform's cache folder of
    this user. A user without a home folder, such as a bare number in a container, gets a private
    one below the system's folder for temporary files."""
    if os.environ.get("TDJAX_CACHE"):
        return Path(os.path.expanduser(os.environ["TDJAX_CACHE"]))
    home = Path(os.path.expanduser("~"))
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local"
        return Path(local) / "tdjax" / "Cache"
    if os.environ.get("XDG_CACHE_HOME") and sys.platform != "darwin":
        return Path(os.environ["XDG_CACHE_HOME"]) / "tdjax"
    if not home.is_absolute():
        return _private_folder()
    return home / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "tdjax"


@functools.cache
def _private_folder() -> Path:
    """tdjax-UID below the system's folder for temporary files, or another one for this process
    where that name is somebody else's: compiled programs are run as they are found."""
    folder = Path(tempfile.gettempdir()) / f"tdjax-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    facts = folder.lstat()
    private = stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.getuid()
    if private and not facts.st_mode & 0o022:
        return folder
    return Path(tempfile.mkdtemp(prefix="tdjax-"))


# What a name is
# --------------------------------------------------------------------------------------------------


def _find(model: str, revision: str | None, offline: bool) -> Found:
    """A path that exists, else a preset, else a hub id; else an error that says what came close."""
    path = Path(model).expanduser()
    if path.exists():
        return local(path)
    alias = filenames.alias_of(model)
    if alias:
        return published(alias, revision, offline)
    segments = model.split("/")
    is_file = filenames.is_weights(model)
    is_id = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(/[^/].*)?", model) and len(segments) >= (
        3 if is_file else 2
    )
    if is_id and not Path(segments[0]).is_dir():
        return _on_hub(Repo("/".join(segments[:2]), revision, offline), "/".join(segments[2:]))
    if is_file or "/" in model or "\\" in model or model.startswith((".", "~")):
        return local(_existing(path, "`model`"))
    near = close(model, list(PRESETS))
    raise UsageError(
        f"unknown model {model!r}" + (f"; did you mean {near[0]}?" if near else ""),
        f"known names: {', '.join(PRESETS)}",
        "or give a hub id (organisation/name), a .pth or .safetensors file, or a folder",
    )


def _existing(path: Path, argument: str) -> Path:
    """The path, or an error with the names in its folder that come close."""
    if path.exists():
        return path
    parent = next((p for p in path.parents if p.is_dir()), Path("."))
    near = close(path.name, [p.name for p in parent.iterdir()]) if parent == path.parent else []
    why = (
        f"close names in {parent}: {', '.join(near)}"
        if near
        else f"nearest folder that exists: {parent.resolve()}"
    )
    alias = filenames.alias_of(path.name.removesuffix(".pth"))
    fix = f"to download it: {alias} as `model`" if alias else "check the path"
    raise CheckpointError(f"{path} does not exist (given as {argument})", why, fix)


def published(alias: str, revision: str | None, offline: bool) -> Found:
    """A preset's files on the hub. The revision is that of the transformer's repository."""
    preset = PRESETS[alias]
    repo = Repo(preset.repo, revision, offline)
    base = repo if preset.base_repo == preset.repo else Repo(preset.base_repo, None, offline)
    dits = {slot: Remote(repo, file, (file,)) for slot, file in slots(preset.dit).items()}
    return Found(name=alias, preset=alias, parts=dits | _base_parts(preset, base))


def _base_parts(preset, repo: Repo, only: str | None = None) -> dict[str, Remote]:
    """VAE, text encoder and tokenizer of a preset (or of the class: Wan2.1's). Of the two forms of
    the tokenizer either will do."""
    forms = [f"{preset.tokenizer}/tokenizer.json", f"{preset.tokenizer}/spiece.model"]
    tokenizer = next((name for name in forms if repo.cached(name)), forms[0])
    files = {"vae": preset.vae, "text": preset.text, "tokenizer": tokenizer}
    return {
        part: Remote(repo, file, (file,)) for part, file in files.items() if only in (None, part)
    }


def _on_hub(repo: Repo, file: str) -> Found:
    """Any other repository: its files are recognised by name; parts that it lacks are those of
    Wan2.1."""
    names = repo.names()
    if not names and repo.is_offline:
        raise CheckpointError(
            f"hub repository {repo} is not in the cache",
            "this run is offline (`offline` or HF_HUB_OFFLINE)",
            "run once without `offline`, or give the path of a local copy",
        )
    if file and file not in names:
        near = close(file, names)
        raise CheckpointError(
            f"hub repository {repo} has no file {file}",
            f"close names there: {', '.join(near)}" if near else f"it has {len(names)} files",
            f"see {repo.page}",
        )
    if file:
        layout, dits = "published", experts(file, names.__contains__)
    else:
        layout, dits = filenames.transformers(names, repo.id)
    own = slots(dits) | {part: filenames.component(names, part) for part in filenames.COMPONENTS}
    parts = _base_parts(Preset, Repo(Preset.base_repo, None, repo.offline)) | {
        part: _remote(repo, name, names) for part, name in own.items() if name
    }
    alias = filenames.alias_of_path(Path(repo.id) / dits[0]) if dits else None
    return Found(name=repo.id.split("/")[1], layout=layout, preset=alias, parts=parts)


def _remote(repo: Repo, name: str, names: list[str]) -> Remote:
    files = (
        (name,)
        if name in names
        else tuple(n for n in names if n.startswith(f"{name}/") and not n.endswith(UNWANTED))
    )
    return Remote(repo, name, files)


# Overrides and checks
# --------------------------------------------------------------------------------------------------


def _with_transformer(found: Found, own: Found, *, keep_low: bool) -> Found:
    """The model with the transformer of another; its name and preset are the other's where that has
    a known name.

    keep_low: only the high-noise expert is replaced, unless the other model has a low-noise one
              too.
    """
    dropped = ("dit",) if keep_low else ("dit", "dit_low")
    parts = {name: part for name, part in found.parts.items() if name not in dropped}
    dits = {name: part for name, part in own.parts.items() if name in ("dit", "dit_low")}
    preset = own.preset or found.preset
    return dataclasses.replace(
        found, name=own.name, layout=own.layout, preset=preset, parts=parts | dits
    )


def _swapped(high: Path | None, low: Path | None) -> list[str]:
    """Warnings about experts whose names say the opposite of how they were given. Keys and shapes
    cannot tell them apart."""
    wrong = [
        f"{path.name} was given as the {role}-noise expert, but its name says"
        f" {filenames.expert(shown(path))}"
        for path, role in ((high, "high"), (low, "low"))
        if path and filenames.expert(shown(path)) not in (None, role)
    ]
    return (
        [
            *wrong,
            ("if the video is noise or mush, swap high_noise_model_path and low_noise_model_path"),
        ]
        if wrong
        else []
    )


def _gather(found: Found, parts: tuple[str, ...], *, alone: bool) -> dict[str, Path]:
    """Local paths of all parts. Those asked for are downloaded; one error lists all that are
    missing. alone: one expert will do."""
    paths = {name: part for name, part in found.parts.items() if isinstance(part, Path)}
    missing = []
    for name in (*parts, *(["dit_low"] if "dit" in parts and "dit_low" in found.parts else [])):
        part = found.parts.get(name)
        if isinstance(part, Remote):
            try:
                paths[name] = part.path()
            except CheckpointError as error:
                helps = (
                    name == "tokenizer" and found.looked
                )  # for local weights the hub is a help, not the place they come from
                if not (helps or part.repo.is_offline):
                    raise
                missing.append(
                    f"{describe(found, name) if helps else TITLES[name]}: {error.what}"
                    f" ({error.why})"
                )
        elif part is None:
            missing.append(describe(found, name))
    dit = paths.get("dit")
    if (
        dit is not None
        and not alone
        and "dit_low" not in found.parts
        and filenames.needs_two(shown(dit))
    ):
        other = "low" if filenames.expert(shown(dit)) == "high" else "high"
        expected = filenames.swap_expert(shown(dit))
        missing.append(
            f"{other}-noise expert: looked for {expected} in {dit.parent.parent}; or give"
            f" {other}_noise_model_path"
        )
    if missing:
        raise CheckpointError(
            f"{found.name}: {len(missing)} part{'s' if len(missing) > 1 else ''} missing",
            "\n".join(missing),
            "put the files there or give their paths"
            + ("" if found.looked else "; or run once without `offline`"),
        )
    return paths


def describe(found: Found, name: str) -> str:
    """Where a missing part was looked for, and where it is published."""
    preset = PRESETS[found.preset] if found.preset else Preset
    home = {
        "vae": (preset.base_repo, preset.vae),
        "text": (preset.base_repo, preset.text),
        "tokenizer": (preset.base_repo, f"{preset.tokenizer}/tokenizer.json"),
    }.get(name)
    names = ", ".join(filenames.COMPONENTS.get(name, (*filenames.WEIGHTS, "transformer/", "dit/")))
    places = " and ".join(map(str, found.looked)) or "the hub repository"
    home = f"; published as {home[1]} in https://huggingface.co/{home[0]}" if home else ""
    return f"{TITLES[name]}: looked in {places} for {names}{home}; or give {ARGUMENTS[name]}"


def _same(a: Path, b: Path) -> bool:
    """Whether two files hold the same bytes. Different weights of one size part within the first
    tensor, so this is quick."""
    if a.samefile(b):
        return True
    # An index lists only names: that of both experts is the same.
    return (
        a.is_file()
        and b.is_file()
        and not a.name.endswith(".json")
        and filecmp.cmp(a, b, shallow=False)
    )
