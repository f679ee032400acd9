"""What a call of the pipeline returns: frames, latents, seed, timings, and how to save and show
them."""

from __future__ import annotations

import base64
import dataclasses
import html
import json
import os
import platform
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np

import tdjax
from tdjax.config import to_dict
from tdjax.config.parsing import json_object, mismatch
from tdjax.config.values import path as checked_path
from tdjax.config.values import switch, whole
from tdjax.errors import UsageError
from tdjax.files import refuse_existing, refuse_unwritable, write_text, written
from tdjax.media import video
from tdjax.text import embeds

if TYPE_CHECKING:  # files are named and refused before jax is there
    from tdjax.pipeline.components import Component
    from tdjax.pipeline.request import Request

FPS = 16  # of files that say nothing else
SHOWN_WIDTH = 384  # pixels that a small video is enlarged to in a notebook


@dataclasses.dataclass
class Result:
    """One call's videos: of each prompt in order, and of each prompt its samples. Iterating gives a
    result for each.

    frames:   uint8 [b T H W 3] (output_type "uint8"), float32 in [0, 1] ("float"), or None
              ("latent").
    latents:  float32 [b t h w c], normalised, on the host.
    seed:     the seed, a tuple of one for each prompt, or None where the caller gave a key.
    timings:  seconds by stage. metadata: everything needed to run it again, JSON values only.
    warnings: lines that a user should know, which also went to the logger "tdjax".
    """

    frames: np.ndarray | None
    latents: np.ndarray
    seed: int | tuple[int, ...] | None
    fps: int
    timings: dict[str, float]
    metadata: dict[str, Any]
    warnings: list[str] = dataclasses.field(default_factory=list)

    def __len__(self) -> int:
        return len(self.latents)

    def __repr__(self) -> str:
        what = "latents only" if self.frames is None else "x".join(map(str, self.frames.shape))
        return (
            f"Result({len(self)} video(s), {what}, seed {self.seed},"
            f" {sum(self.timings.values()):.1f} s)"
        )

    def pixels(self, index: int = 0) -> np.ndarray:
        """uint8 [T H W 3] of one video."""
        if self.frames is None:
            raise UsageError(
                "this result has no frames",
                'it was made with output_type="latent"',
                'use "uint8" or "float"',
            )
        frames = self.frames[index]
        if frames.dtype == np.uint8:
            return frames
        return np.round(np.clip(frames, 0, 1) * 255).astype(np.uint8)

    def frame(self, i: int = 0, index: int = 0):
        """Frame i of one video as a PIL image."""
        from PIL import Image

        return Image.fromarray(self.pixels(index)[i])

    def __iter__(self) -> Iterator[Result]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Result:
        """One video as a result of its own. Raises IndexError."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"there are {len(self)} videos, and none with the number {index}")
        index %= len(self)
        about = self.about(index)
        return dataclasses.replace(
            self,
            frames=None if self.frames is None else self.frames[index : index + 1],
            latents=self.latents[index : index + 1],
            seed=about.get("seed", self.seed),
            metadata=about,
        )

    def about(self, index: int = 0) -> dict[str, Any]:
        """Returns the metadata of one video: its own prompt and seed among them, and its `index`
        among those of this prompt."""
        samples, about = self.metadata.get("num_samples", 1), dict(self.metadata)
        number, sample = divmod(index, samples)
        if len(about.get("prompts", ())) > 1:
            about["prompts"] = about["prompts"][number : number + 1]
        if isinstance(about.get("seed"), list):
            about["seed"] = next(iter(about["seed"][number : number + 1]), None)
        return {**about, "index": about.get("index", 0) + sample, "fps": self.fps}

    def save(
        self,
        path: str | Path,
        *,
        index: int | None = None,
        fps: int | None = None,
        crf: int = 17,
        metadata: bool = True,
        overwrite: bool = False,
        upscale: int = 1,
    ) -> Path:
        """Writes the video, or one of them, and returns its path; several are all written, as
        NAME_0, NAME_1 and so on, and the path of the first returned.

        path:     the suffix chooses the form: .mp4 .webm .mkv .gif .npy, .safetensors = latents, no
                  suffix = png folder.
        metadata: a sidecar `<file>.json` is written beside each.
        upscale:  side of the square that each pixel becomes, for small videos.
        Files appear under their names only when complete. Raises UsageError before the first one
        where any of them cannot be written.
        """
        path = Path(checked_path("path", path)).expanduser()
        metadata, overwrite = switch("metadata", metadata), switch("overwrite", overwrite)
        factor = whole("upscale", upscale)
        index = None if index is None else whole("index", index)
        fps = self.fps if fps is None else whole("fps", fps)
        crf = whole("crf", crf)
        if index is not None and not 0 <= index < len(self):
            raise UsageError(
                f"index is {index}",
                f"there are {len(self)} videos, and the first is 0",
                "leave it away for all of them",
            )
        if not 1 <= factor <= 64:
            raise UsageError(f"upscale is {factor}", "it is a number from 1 to 64", "use 6")
        if index is None and len(self) > 1:
            paths = [path.with_stem(f"{path.stem}_{number}") for number in range(len(self))]
        else:
            paths = [path]
        numbers = range(len(self)) if index is None else [index]
        for each in paths:
            check_save(each, fps=fps, crf=crf, metadata=metadata, overwrite=overwrite)
        for number, each in zip(numbers, paths, strict=True):
            self._save_one(each, number, fps, crf, metadata, overwrite, factor)
        return paths[0]

    def _save_one(
        self,
        path: Path,
        index: int,
        fps: int,
        crf: int,
        metadata: bool,
        overwrite: bool,
        upscale: int,
    ) -> None:
        about = {**self.about(index), "fps": fps}
        if path.suffix == ".safetensors":
            save_latents(path, self.latents[index : index + 1], overwrite)
        else:
            video.write(
                path,
                video.enlarged(self.pixels(index), upscale),
                fps=fps,
                crf=crf,
                metadata=json.dumps(about) if metadata else None,
                overwrite=overwrite,
            )
        if metadata:
            write_json(sidecar(path), about)

    @classmethod
    def load(cls, path: str | Path) -> Result:
        """Returns what `save` wrote as .safetensors: latents, and the metadata beside them, where
        it is. `Pipeline.decode` makes frames of it. Raises UsageError."""
        path = Path(checked_path("path", path)).expanduser()
        latents, about = load_latents(path), _read_metadata(sidecar(path))
        return cls(
            frames=None,
            latents=latents,
            seed=about.get("seed"),
            fps=about.get("fps", FPS),
            timings={},
            metadata=about,
        )

    def _repr_html_(self) -> str:
        """Inline videos for notebooks, side by side, with prompt and seed."""
        if self.frames is None:
            return f"<pre>{html.escape(repr(self))}</pre>"
        with tempfile.TemporaryDirectory() as folder:
            tags = []
            for i in range(len(self)):
                path = video.write(Path(folder) / f"{i}.mp4", self.pixels(i), fps=self.fps, crf=20)
                data = base64.b64encode(path.read_bytes()).decode()
                tags.append(_figure(data, self.frames.shape[3], self._caption(i)))
        return _side_by_side(tags, self.frames.shape[3])

    def _caption(self, index: int) -> str:
        about = self.about(index)
        prompt = next(iter(about.get("prompts", ())), "")
        sample = f", sample {about['index']}" if about.get("num_samples", 1) > 1 else ""
        return f"{prompt} (seed {about.get('seed', self.seed)}{sample})".strip()


class _Metadata(TypedDict, total=False):
    """What a result reads of metadata; other names in it are free."""

    model: str
    prompts: list[str]
    seed: int | list[int] | None
    num_samples: int
    index: int
    fps: int


def _read_metadata(path: Path) -> dict[str, Any]:
    """The metadata beside a file; nothing where there is none. Raises UsageError for damage."""
    if not path.is_file():
        return {}
    try:
        about = json_object(path.read_bytes())
        wrong = mismatch(about, _Metadata)
        if wrong or about.get("num_samples", 1) < 1 or about.get("fps", 1) < 1:
            raise ValueError(wrong or "its num_samples or fps is less than 1")
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{path} cannot be read", str(error), "remove it: the latents do without"
        ) from error
    return about


def _figure(data: str, width: int, caption: str) -> str:
    """One video as HTML, small ones enlarged with hard pixels. data: an mp4 in base64."""
    style = "width:100%;image-rendering:pixelated"
    shown = max(width, SHOWN_WIDTH)
    return (
        f'<figure style="margin:0;max-width:{shown}px"><video controls autoplay loop muted'
        f' playsinline style="{style}" src="data:video/mp4;base64,{data}"></video>'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def _side_by_side(figures: list[str], width: int) -> str:
    """Figures as HTML, as many in a row as there is room for at half their size."""
    shown = max(width, SHOWN_WIDTH)
    columns = f"repeat(auto-fit,minmax(min(100%,{shown // 2}px),1fr))"
    style = f"display:grid;grid-template-columns:{columns};gap:12px"
    return f'<div style="{style};max-width:{len(figures) * shown}px">{"".join(figures)}</div>'


def sidecar(path: Path) -> Path:
    """fox.mp4 -> fox.mp4.json: no other file's name."""
    return path.with_name(path.name + ".json")


def check_save(path: Path, *, fps: float, crf: int, metadata: bool, overwrite: bool) -> None:
    """Everything that stands in the way of `Result.save`, found before a long run: UsageError."""
    checked_path("path", path)
    if path.suffix == ".safetensors":
        refuse_existing(path, overwrite)
    else:
        video.check_target(path, fps, crf, overwrite)
    if metadata:
        _check_sidecar(sidecar(path), overwrite)
    refuse_unwritable(path)


def _check_sidecar(path: Path, overwrite: bool) -> None:
    """Raises UsageError where metadata cannot be written to a path, which nobody has given: what
    lies there is replaced only where tdjax wrote it."""
    checked_path("the path of the metadata", path)
    if not os.path.lexists(path) or (overwrite and _is_sidecar(path)):
        return
    raise UsageError(
        f"{path} exists",
        "the video's metadata goes there"
        + (", and this is not what tdjax writes" if overwrite else ""),
        "give another name, " + ("or" if overwrite else "`overwrite`, or") + " `metadata` off",
    )


def _is_sidecar(path: Path) -> bool:
    """Whether a file is metadata as `Result.about` has it."""
    try:
        return path.is_file() and json_object(path.read_bytes()).keys() >= {"index", "fps"}
    except (OSError, ValueError):
        return False


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Writes or replaces a sidecar in one step."""
    write_text(path, json.dumps(values, indent=1) + "\n")


def save_latents(path: Path, latents: np.ndarray, overwrite: bool = False) -> None:
    """Writes normalised latents [1 t h w c] of a finished video as a safetensors file, marked as
    such. Raises UsageError."""
    from safetensors.numpy import save_file

    with written(path, overwrite) as part:
        save_file({"latents": np.ascontiguousarray(latents)}, part, metadata=embeds.FINISHED)


def load_latents(path: Path) -> np.ndarray:
    """Returns latents [b t h w c] of finished videos. Raises UsageError for other files."""
    if path.suffix != ".safetensors":
        raise UsageError(
            f"{path} is not .safetensors",
            "a result is loaded from its latents, which are all that a decoder needs",
            "save it as .safetensors",
        )
    latents = embeds.read_latents(path)
    if latents.ndim != 5:
        raise UsageError(
            f"{path} holds an array of {latents.ndim} axes",
            "latents are [b t h w c]",
            'write it with result.save("x.safetensors")',
        )
    return latents


def metadata_of(name: str, request: Request, components: Mapping[str, Component]) -> dict[str, Any]:
    """Returns everything needed to make the same video again, as JSON values; arrays that were
    given stand as their sha256. It is published with the video: files stand as their names, no
    folder of this machine is in it."""
    import jax

    lora = {
        name: [
            [Path(file).name, weight] for file, weight in (*each.lora, *each.adapters.chosen.files)
        ]
        for name, each in components.items()
        if each.lora or each.adapters.chosen.files
    }
    return {
        "tdjax": tdjax.__version__,
        "model": name,
        "prompts": list(request.prompts),
        "negative_prompt": request.negative_prompt,
        "seed": list(request.seed) if isinstance(request.seed, tuple) else request.seed,
        "num_samples": request.num_samples,
        "fit": request.fit,
        "given": request.digests(),
        "lora": lora,
        "size": to_dict(request.size),
        "sampler": to_dict(request.sampler),
        "transformer": to_dict(components["dit"].config),
        "vae_dtype": components["vae"].config.policy.compute,
        "files": {name: component.fingerprint() for name, component in components.items()},
        "versions": {"jax": jax.__version__, "python": platform.python_version()},
        "device": jax.local_devices()[0].device_kind,
    }


def joined(videos: list[np.ndarray]) -> np.ndarray:
    """Returns videos [1 ...] as one array; a single one, of which there may be hundreds of
    megabytes, is not copied."""
    return videos[0] if len(videos) == 1 else np.concatenate(videos)
