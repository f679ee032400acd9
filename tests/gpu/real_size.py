"""`python -m tdjax.generate` on files of the published layouts at real size, from the start of the
process to the video.

    python tests/gpu/real_size.py 1.3B FOLDER   writes 16 GB; text to video at 480p: the fastest
                                                way, the int8 file, dense
    python tests/gpu/real_size.py 14B FOLDER    writes 26 GB; text to video at 720p, the int8 file
    python tests/gpu/real_size.py A14B FOLDER   writes 41 GB; image to video at 720p, the int8 files
                                                of both experts

All are 81 frames in 4 steps. The first run of a configuration starts with empty caches, the others
find them filled. The numbers in the files are random, so the frames are noise: the worst case for
the video encoder. Files that are in FOLDER already are used again.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parent
BASE = ("Wan2.1_VAE", "models_t5_umt5-xxl-enc-bf16")
RUNS = {
    "cold": [],
    "known prompt": [],
    "new prompt": ["--prompt_cache", "off"],
    "new prompt, whole text encoder": ["--prompt_cache", "off", "--text_encoder_device", "device"],
    "new prompt, low memory": ["--prompt_cache", "off", "--low_memory"],
    "known prompt, tiles": [
        "--vae",
        "tiled",
    ],  # has hung: programs for tiles were compiled beside a first step from the cache
    "cold, tiles": ["--vae", "tiled"],
}
FEW = ("cold", "new prompt", "new prompt, low memory")
LIMIT = 240  # seconds of one run; one that hangs says in its last lines where
FASTEST = ["--attention_type", "sagesla", "--quant", "int8_channel"]
PROMPT = (
    "A red fox trots through fresh snow at the edge of a birch forest, breath steaming in the cold"
    " morning air, low golden sunlight between the trunks, camera tracking beside it at walking"
    " pace, shallow depth of field"
)


def write(folder: Path, *names: str) -> None:
    subprocess.run([sys.executable, HERE / "published.py", folder, *names], check=True)


def tokenizer(folder: Path) -> None:
    """Ids inside the real vocabulary; the real tokenizer is not ours to ship."""
    from tdjax.train.tiny.data import captions
    from tdjax.train.tiny.data.tokenizer import build

    build(captions.vocabulary()).save(str(folder / "tokenizer.json"))


def photograph(width: int = 1600, height: int = 900) -> Image.Image:
    """Sky, sun, hills and grain."""
    y, x = np.mgrid[:height, :width] / np.array([height, width]).reshape(2, 1, 1)
    image = np.stack([0.35 + 0.4 * y, 0.55 + 0.25 * y, 0.95 - 0.15 * y], -1)
    image += np.exp(-(((x - 0.72) ** 2 * 3 + (y - 0.22) ** 2) / 0.008))[..., None] * [0.6, 0.5, 0.2]
    for level, shade in ((0.55, 0.55), (0.68, 0.4), (0.8, 0.25)):
        ridge = level + 0.05 * np.sin(7 * x + 9 * level) + 0.02 * np.sin(23 * x + 40 * level)
        image = np.where((y > ridge)[..., None], np.array([0.7, 0.9, 0.6]) * shade, image)
    image += np.random.default_rng(0).normal(0, 0.015, image.shape)
    return Image.fromarray((np.clip(image, 0, 1) * 255).astype(np.uint8))


def generate(label: str, out: Path, *argv: str, cache: Path) -> dict:
    """One command, timed from outside; its own stages and memory from --timings."""
    limited = ["timeout", "-s", "ABRT", str(LIMIT), sys.executable, "-X", "faulthandler"]
    command = [
        *limited,
        "-m",
        "tdjax.generate",
        *argv,
        "--prompt",
        PROMPT,
        "--json",
        "--timings",
        "--save_path",
        str(out),
    ]
    command += ["--compile_cache_dir", str(cache), "--overwrite", "-v"]
    start = time.perf_counter()
    own = os.environ | {
        "TDJAX_CACHE": str(cache / "tdjax")
    }  # prompt embeddings too begin with nothing and end with the configuration
    done = subprocess.run(command, capture_output=True, text=True, env=own)
    seconds = time.perf_counter() - start
    print(
        f"\n== {label}: {seconds:.1f} s from start to file, exit code"
        f" {done.returncode}\n{done.stderr[-5000:]}",
        flush=True,
    )
    peaks = [
        float(line.split("│")[3].split()[0])
        for line in done.stderr.splitlines()
        if line.count("GiB") == 2 and "│" in line
    ]
    result = json.loads(done.stdout) if done.returncode == 0 else {}
    row = {
        "label": label,
        "seconds": round(seconds, 1),
        "rc": done.returncode,
        "device_peak_gib": max(peaks, default=None),
    }
    return row | {"result": result}


def runs(
    name: str, names: Iterable[str], out: Path, argv: list[str], cache: Path
) -> Iterator[dict]:
    """The runs of one configuration, the first with empty caches."""
    shutil.rmtree(cache, ignore_errors=True)
    for run in names:
        yield generate(f"{name}, {run}", out, *argv, *RUNS[run], cache=cache)


def paths(folder: Path, *names: str) -> list[str]:
    return [str(folder / f"{name}.pth") for name in names]


def small(folder: Path, out: Path, cache: Path) -> Iterator[dict]:
    names = ("TurboWan2.1-T2V-1.3B-480P", "TurboWan2.1-T2V-1.3B-480P-quant")
    write(folder, *names, *BASE)
    tokenizer(folder)
    plain, quant = paths(folder, *names)
    fastest = ["--model", plain, *FASTEST]
    yield from runs(
        "1.3B sagesla int8_channel", list(RUNS)[:-1], out / "fastest.mp4", fastest, cache
    )
    yield from runs(
        "1.3B sagesla, int8 file",
        FEW[:2],
        out / "int8.mp4",
        ["--model", quant, "--attention_type", "sagesla"],
        cache,
    )
    yield from runs(
        "1.3B dense",
        FEW[:2],
        out / "dense.mp4",
        ["--model", plain, "--attention_type", "original"],
        cache,
    )
    yield from runs("1.3B sagesla int8_channel", list(RUNS)[-1:], out / "tiles.mp4", fastest, cache)


def large(folder: Path, out: Path, cache: Path) -> Iterator[dict]:
    name = "TurboWan2.1-T2V-14B-720P-quant"
    write(folder, name, *BASE)
    tokenizer(folder)
    yield from runs(
        "14B 720p", FEW, out / "large.mp4", ["--model", *paths(folder, name), *FASTEST], cache
    )


def experts(folder: Path, out: Path, cache: Path) -> Iterator[dict]:
    names = [f"TurboWan2.2-I2V-A14B-{noise}-720P-quant" for noise in ("high", "low")]
    write(folder, *names, *BASE)
    tokenizer(folder)
    photograph().save(folder / "photo.png")
    high, low = paths(folder, *names)
    argv = [
        "--high_noise_model_path",
        high,
        "--low_noise_model_path",
        low,
        "--image_path",
        str(folder / "photo.png"),
        *FASTEST,
    ]
    argv += [
        word
        for part, path in zip(("vae", "text_encoder"), paths(folder, *BASE), strict=True)
        for word in (f"--{part}_path", path)
    ]
    argv += ["--tokenizer_path", str(folder / "tokenizer.json"), "--resolution", "720p"]
    yield from runs("A14B 720p", FEW, out / "experts.mp4", argv, cache)


def table(rows: list[dict]) -> str:
    """Seconds by the clock, the peak of the device, and the stages that took a tenth of a second or
    more."""
    lines = []
    for row in rows:
        stages = ", ".join(
            f"{name} {seconds:.2f}"
            for name, seconds in row["result"].get("timings", {}).items()
            if seconds >= 0.1
        )
        lines.append(
            f"{row['label']:48} {row['seconds']:6.1f} s  {row['device_peak_gib'] or 0:6.2f} GiB "
            f" {stages}"
        )
    return "\n".join(lines)


def main() -> int:
    which, folder = sys.argv[1], Path(sys.argv[2])
    out = folder / "out"
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for row in {"1.3B": small, "14B": large, "A14B": experts}[which](
        folder, out, folder / f"compiled-{which}"
    ):
        rows.append(row)
        (folder / f"rows-{which}.json").write_text(json.dumps(rows, indent=1))
    print(table(rows))
    return max(row["rc"] for row in rows)


if __name__ == "__main__":
    sys.exit(main())
