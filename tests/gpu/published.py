"""Files in the exact layout of the published checkpoints, filled with random values of sensible
scale.

`python tests/gpu/published.py FOLDER MANIFEST...` writes FOLDER/<MANIFEST>.pth with torch.save, as
the official tools do, unless it is there. The numbers mean nothing, but every key, shape and dtype,
the container, the sizes on disk and the work are those of the real files.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch

MANIFESTS = Path(__file__).resolve().parent.parent / "manifests"


def scale(key: str, shape: list[int]) -> tuple[float, float]:
    """(mean, deviation): variance-preserving products, unit norms, small modulation and biases."""
    if key.endswith(
        (
            "norm.weight",
            "norm1.weight",
            "norm2.weight",
            "norm3.weight",
            "norm_q.weight",
            "norm_k.weight",
            "gamma",
        )
    ):
        return 1.0, 0.05
    if "modulation" in key or key.endswith("bias"):
        return 0.0, 0.02
    if "token_embedding" in key:
        return 0.0, 1.0
    if "pos_embedding" in key:
        return 0.0, 0.5
    fan_in = math.prod(shape[1:])
    return 0.0, 1.0 / math.sqrt(fan_in)


def tensor(key: str, shape: list[int], dtype: str | None, device: str) -> torch.Tensor:
    if dtype == "int8":
        return torch.randint(-127, 128, shape, dtype=torch.int8, device=device).cpu()
    if key.endswith(".scale"):  # of int8 weights: uniform int8 has deviation 73
        return torch.full(shape, 1.0 / (73.0 * math.sqrt(shape[1] * 128)), dtype=torch.float32)
    mean, deviation = scale(key, shape)
    kind = torch.float32 if dtype == "float32" else torch.bfloat16
    return (torch.randn(shape, device=device, dtype=kind) * deviation + mean).cpu()


def write(folder: Path, name: str, device: str) -> None:
    path = folder / f"{name}.pth"
    if path.exists():
        return
    manifest = json.loads((MANIFESTS / f"{name}.json").read_text())
    start = time.perf_counter()
    state = {
        key: tensor(key, spec["shape"], spec["dtype"], device)
        for key, spec in manifest["tensors"].items()
    }
    torch.save(state, part := path.with_suffix(".part"))
    part.rename(path)
    print(
        f"{path.name}: {path.stat().st_size / 2**30:.2f} GiB in"
        f" {time.perf_counter() - start:.0f} s",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("manifest", nargs="+")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    for name in args.manifest:
        write(args.folder, name, "cuda" if torch.cuda.is_available() else "cpu")


if __name__ == "__main__":
    main()
