"""A folder of videos: how they are kept, and the table of what was measured of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from einops import reduce

from tdjax.errors import UsageError
from tdjax.files import write_text, written
from tdjax.media import video
from tdjax.train.evaluate import distances, sheets

LATENTS = "latents"
SHEET, SHOWN, WIDTH = "sheet.png", 4, 200  # videos of a sheet, and pixels of a frame
COLUMNS = tuple(
    sheets.Column(key=key, title=title, form=form)
    for key, title, form in (
        ("videos", "videos", ".0f"),
        ("flicker", "temporal flickering (VBench)", ".4f"),
        ("motion", "motion in a quarter of a second", ".2%"),
        ("frechet", "latent Frechet distance", ".4g"),
        ("psnr", "PSNR, dB", ".2f"),
        ("ssim", "SSIM", ".4f"),
    )
)


def keep(folder: Path, name: str, frames: np.ndarray, latents: np.ndarray, fps: float = 16) -> None:
    """Writes a video, uint8 [T H W 3], and its latents f32[t h w c]."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / LATENTS).mkdir(exist_ok=True)
    with written(folder / LATENTS / f"{name}.npy", overwrite=True) as part, part.open("wb") as f:
        np.save(f, np.asarray(latents, np.float32))
    video.write(folder / f"{name}.mp4", frames, fps=fps, overwrite=True)


def there(folder: Path, name: str) -> bool:
    """Returns whether a video and its latents are in a folder."""
    return _file(folder, name).is_file() and (folder / LATENTS / f"{name}.npy").is_file()


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name}.mp4"


def write(folder: str | Path, videos: list[tuple[str, str, int]], against=None) -> Path:
    """Writes measures.json, table.md and sheet.png of the videos of a folder: (name, prompt, index)
    each. against: a folder of the same names. Returns the path of the table.

    Raises UsageError where a video is missing in one of them, or they differ in size.
    """
    folder = Path(folder)
    others = [] if against is None else [Path(against)]
    for place in (folder, *others):
        gone = [name for name, _, _ in videos if not _file(place, name).is_file()]
        if gone:
            raise UsageError(
                f"{place} lacks {len(gone)} of {len(videos)} videos",
                f"the first is {gone[0]}.mp4",
                "make them: name the model in the same command",
            )
    rows = [_measured(folder, others, *each) for each in videos]
    means = {
        key: float(np.mean([row[key] for row in rows]))
        for key in rows[0]
        if key not in ("name", "prompt")
    }
    means["videos"] = float(len(rows))
    names = [name for name, _, _ in videos]
    for other in others:
        sets = [_features(place, names) for place in (folder, other)]
        if all(sets):
            a, b = (distances.gaussian(np.concatenate(found)) for found in sets)
            means["frechet"] = distances.frechet(a, b)
    text = json.dumps({"means": means, "videos": rows}, indent=1, ensure_ascii=False)
    write_text(folder / "measures.json", text + "\n")
    title = folder.name if against is None else f"{folder.name} against {Path(against).name}"
    write_text(folder / "table.md", sheets.table([sheets.Row(name=title, values=means)], COLUMNS))
    strips = {
        f"{place.name}: {name}": _small(video.read_video(_file(place, name)))
        for name in names[:: max(1, len(names) // SHOWN)][:SHOWN]
        for place in (folder, *others)
    }
    with written(folder / SHEET, overwrite=True) as part:
        sheets.contact_sheet(part, strips)
    return folder / "table.md"


def _measured(folder: Path, others: list[Path], name: str, prompt: str, index: int) -> dict:
    frames = video.read_video(_file(folder, name))
    row = {
        "name": name,
        "prompt": prompt,
        "flicker": distances.flicker(frames),
        "motion": distances.motion(frames),
    }
    for other in others:
        their = video.read_video(_file(other, name))
        if their.shape != frames.shape:
            raise UsageError(
                f"{name}.mp4 is {_size(frames)} here and {_size(their)} in {other}",
                "only videos of one size can be compared",
                "make both with the same options",
            )
        row["psnr"] = distances.psnr(*(_unit(x)[None] for x in (frames, their)))
        row["ssim"] = distances.ssim(frames, their)
    return row


def _size(frames: np.ndarray) -> str:
    t, h, w, _ = frames.shape
    return f"{w}x{h}, {t} frames"


def _small(frames: np.ndarray) -> np.ndarray:
    """Frames of about WIDTH pixels, for a sheet: means of squares."""
    side = max(1, frames.shape[2] // WIDTH)
    height, width = (n - n % side for n in frames.shape[1:3])
    cut = frames[:, :height, :width].astype(np.float32)
    means = reduce(cut, "t (h a) (w b) c -> t h w c", "mean", a=side, b=side)
    return means.round().astype(np.uint8)


def _unit(frames: np.ndarray) -> np.ndarray:
    return frames.astype(np.float32) / 127.5 - 1


def _features(folder: Path, names: list[str]) -> list[np.ndarray]:
    """Of the latents of all videos; none where a folder of another origin has no latents."""
    files = [folder / LATENTS / f"{name}.npy" for name in names]
    if not all(file.is_file() for file in files):
        return []
    return [distances.latent_features(np.load(file)) for file in files]
