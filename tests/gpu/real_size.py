"""`python -m tdjax.generate` on files of the published layouts at real size; prints one table of stages.

    python tests/gpu/real_size.py 1.3B FOLDER     writes 16 GB; 480p, 81 frames, 4 steps: dense, SLA, int8; see RUNS
    python tests/gpu/real_size.py 14B FOLDER      writes 40 GB at a time; one step at 720p: T2V 14B, one I2V A14B expert

The first run of a configuration starts with empty caches, the others find them filled.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
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
    "known prompt, tiles": ["--vae", "tiled"],
}
PROMPT = (
    "A red fox trots through fresh snow at the edge of a birch forest, breath steaming in the cold morning air, low golden "
    "sunlight between the trunks, camera tracking beside it at walking pace, shallow depth of field"
)


def write(folder: Path, *names: str) -> None:
    subprocess.run([sys.executable, HERE / "published.py", folder, *names], check=True)


def tokenizer(folder: Path) -> None:
    """Ids inside the real vocabulary; the real tokenizer is not ours to ship."""
    from tdjax.train.tiny import captions
    from tdjax.train.tiny.tokenizer import build

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
    command = [sys.executable, "-m", "tdjax.generate", *argv, "--prompt", PROMPT, "--json", "--timings", "--save_path", str(out)]
    command += ["--compile_cache_dir", str(cache), "--overwrite", "-v"]
    start = time.perf_counter()
    own = os.environ | {"TDJAX_CACHE": str(cache / "tdjax")}  # prompt embeddings too begin with nothing and end with the configuration
    done = subprocess.run(command, capture_output=True, text=True, env=own)
    seconds = time.perf_counter() - start
    print(f"\n== {label}: {seconds:.1f} s from start to file, exit code {done.returncode}", flush=True)
    print(done.stderr[-6000:], flush=True)
    return {"label": label, "seconds": round(seconds, 1), "rc": done.returncode, "result": json.loads(done.stdout or "null")}


def small(folder: Path, out: Path, cache: Path) -> list[dict]:
    write(folder, "TurboWan2.1-T2V-1.3B-480P", "TurboWan2.1-T2V-1.3B-480P-quant", *BASE)
    tokenizer(folder)
    plain, quant = (str(folder / f"TurboWan2.1-T2V-1.3B-480P{s}.pth") for s in ("", "-quant"))
    rows = []
    for label, argv in (
        ("dense", ["--model", plain, "--attention_type", "original"]),
        ("sla", ["--model", plain, "--attention_type", "sla"]),
        ("int8 sagesla", ["--model", quant, "--attention_type", "sagesla"]),
    ):
        shutil.rmtree(cache, ignore_errors=True)
        for run, more in RUNS.items():
            rows.append(generate(f"1.3B {label}, {run}", out / f"{label.replace(' ', '_')}.mp4", *argv, *more, cache=cache))
    return rows


def large(folder: Path, out: Path, cache: Path) -> list[dict]:
    write(folder, *BASE)
    tokenizer(folder)
    photo = folder / "photo.png"
    photograph().save(photo)
    rows = []
    for name, argv in (
        ("TurboWan2.1-T2V-14B-720P", []),
        ("TurboWan2.2-I2V-A14B-high-720P", ["--image_path", str(photo)]),
    ):
        write(folder, name)
        dit = folder / f"{name}.pth"
        argv = [*argv, "--dit_path", str(dit), "--vae_path", str(folder / f"{BASE[0]}.pth"), "--resolution", "720p", "--num_steps", "1"]
        argv += ["--text_encoder_path", str(folder / f"{BASE[1]}.pth"), "--tokenizer_path", str(folder / "tokenizer.json")]
        rows.append(generate(f"{name}, one step at 720p", out / f"{name}.mp4", *argv, cache=cache))
        dit.unlink()
    return rows


def main() -> int:
    which, folder = sys.argv[1], Path(sys.argv[2])
    out = folder / "out"
    out.mkdir(parents=True, exist_ok=True)
    rows = {"1.3B": small, "14B": large}[which](folder, out, folder / "compiled")
    print("\n".join(json.dumps(row) for row in rows))
    return max(row["rc"] for row in rows)


if __name__ == "__main__":
    sys.exit(main())
