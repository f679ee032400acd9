"""What a call of the pipeline returns: frames, latents, seed, timings, and how to save and show
them."""

from __future__ import annotations

import base64
import dataclasses
import json
import platform
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import tdjax
from tdjax.config import to_dict
from tdjax.errors import UsageError
from tdjax.files import refuse_existing, refuse_unwritable, write_text, written
from tdjax.media import video

if TYPE_CHECKING:  # files are named and refused before jax is there
    from tdjax.pipeline.components import Component
    from tdjax.pipeline.request import Request


@dataclasses.dataclass
class Result:
    """One call's videos.

    frames:   uint8 [b T H W 3] (output_type "uint8"), float32 in [0, 1] ("float"), or None
              ("latent").
    latents:  float32 [b t h w c], normalised, on the host.
    seed:     the seed, or None where the caller gave a key.
    timings:  seconds by stage. metadata: everything needed to run it again, JSON values only.
    warnings: lines that a user should know, which also went to the logger "tdjax".
    """

    frames: np.ndarray | None
    latents: np.ndarray
    seed: int | None
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
        return frames if frames.dtype == np.uint8 else np.round(frames * 255).astype(np.uint8)

    def frame(self, i: int = 0, index: int = 0):
        """Frame i of one video as a PIL image."""
        from PIL import Image

        return Image.fromarray(self.pixels(index)[i])

    def save(
        self,
        path,
        *,
        index: int = 0,
        fps: int | None = None,
        crf: int = 17,
        metadata: bool = True,
        overwrite: bool = False,
    ) -> Path:
        """Write one video; the suffix chooses the form (.mp4 .webm .mkv .gif .npy, .safetensors =
        latents, no suffix = png folder).

        With `metadata` a sidecar `<file>.json` is written beside it. Files appear under their name
        only when complete.
        """
        path, fps = Path(path), fps or self.fps
        check_save(path, fps=fps, crf=crf, metadata=metadata, overwrite=overwrite)
        about = {**self.metadata, "index": index, "fps": fps}
        if path.suffix == ".safetensors":
            save_latents(path, self.latents[index : index + 1], overwrite)
        else:
            video.write(
                path,
                self.pixels(index),
                fps=fps,
                crf=crf,
                metadata=json.dumps(about) if metadata else None,
                overwrite=overwrite,
            )
        if metadata:
            write_json(sidecar(path), about)
        return path

    def _repr_html_(self) -> str:
        """Inline video for notebooks."""
        if self.frames is None:
            return f"<pre>{self!r}</pre>"
        with tempfile.TemporaryDirectory() as folder:
            tags = []
            for i in range(len(self)):
                path = video.write(Path(folder) / f"{i}.mp4", self.pixels(i), fps=self.fps, crf=20)
                data = base64.b64encode(path.read_bytes()).decode()
                tags.append(
                    "<video controls autoplay loop muted"
                    f' src="data:video/mp4;base64,{data}"></video>'
                )
        return "\n".join(tags)


def sidecar(path: Path) -> Path:
    """fox.mp4 -> fox.mp4.json: no other file's name."""
    return path.with_name(path.name + ".json")


def check_save(path: Path, *, fps: float, crf: int, metadata: bool, overwrite: bool) -> None:
    """Everything that stands in the way of `Result.save`, found before a long run: UsageError."""
    if path.suffix == ".safetensors":
        refuse_existing(path, overwrite)
    else:
        video.check_target(path, fps, crf, overwrite)
    if metadata and sidecar(path).exists() and not overwrite:
        raise UsageError(
            f"{sidecar(path)} exists",
            "the video's metadata goes there",
            "give another name, `overwrite`, or `metadata` off",
        )
    refuse_unwritable(path)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Writes or replaces a sidecar in one step."""
    write_text(path, json.dumps(values, indent=1) + "\n")


def save_latents(path: Path, latents: np.ndarray, overwrite: bool = False) -> None:
    """Writes normalised latents [1 t h w c] as a safetensors file. Raises UsageError."""
    from safetensors.numpy import save_file

    with written(path, overwrite) as part:
        save_file({"latents": np.ascontiguousarray(latents)}, part)


def metadata_of(name: str, request: Request, components: Mapping[str, Component]) -> dict[str, Any]:
    """Returns everything needed to make the same video again, as JSON values; arrays that were
    given stand as their sha256. It is published with the video: files stand as their names, no
    folder of this machine is in it."""
    import jax

    lora = {
        name: [[Path(file).name, weight] for file, weight in each.lora]
        for name, each in components.items()
        if each.lora
    }
    return {
        "tdjax": tdjax.__version__,
        "model": name,
        "prompts": list(request.prompts),
        "negative_prompt": request.negative_prompt,
        "seed": request.seed,
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
