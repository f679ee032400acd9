"""The chart of several GPUs in docs/performance.md: how many times as fast as one GPU two of a host
are, from docs/bench/gpus.jsonl. `python docs/scripts/gpus.py` (matplotlib)."""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FOLDER = Path(__file__).resolve().parent.parent
SMALL, LARGE = "turbowan2.1-t2v-1.3b-480p", "turbowan2.1-t2v-14b-720p"
FAST = "sagesla, int8_channel"
FRAMES = f"prompt to frames on the host, {FAST}"
INK, FAINT, BLUE, ORANGE = "#222222", "#dddddd", "#0072b2", "#e69f00"
# What a bar is called, the mesh, and what its rows have; the last of such rows count.
BARS = {
    "14B 720p, a step, Mosaic": ("sp=2", {"model": LARGE, "what": FAST, "impl": "mosaic"}),
    "1.3B 480p, a step, Triton": ("sp=2", {"model": SMALL, "what": FAST, "impl": "triton"}),
    "1.3B 480p, a step, Mosaic": ("sp=2", {"model": SMALL, "what": FAST, "impl": "mosaic"}),
    "VAE decode, 480p": ("sp=2", {"model": SMALL, "stage": "vae decode", "what": "81 frames"}),
    "VAE encode, 480p": ("sp=2", {"model": SMALL, "stage": "vae encode", "what": "81 frames"}),
    "1.3B 480p, prompt to frames, Mosaic": (
        "sp=2",
        {"model": SMALL, "what": FRAMES, "impl": "mosaic"},
    ),
    "1.3B 480p, a guided step, dense": (
        "cfg=2",
        {"model": SMALL, "what": "original step: dense, float, guided"},
    ),
    "1.3B 480p, two prompts to frames": (
        "dp=2",
        {"model": SMALL, "stage": "two prompts to frames"},
    ),
}
TRAINING = {"sla": "training sla-1.3b, a step", "student": "training rcm-1.3b, a step"}


def milliseconds(rows: list[dict], mesh: str | None, wanted: dict) -> float:
    fits = lambda row: all(row.get(key) == value for key, value in wanted.items())
    return [row["ms"] for row in rows if "ms" in row and row.get("mesh") == mesh and fits(row)][-1]


def read() -> dict[str, tuple[float, float, str]]:
    """{bar: (seconds on one, on two, the mesh)}."""
    rows = [json.loads(line) for line in (FOLDER / "bench/gpus.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "code" not in row]
    found = {}
    for name, (mesh, wanted) in BARS.items():
        one, two = (milliseconds(rows, each, wanted) / 1e3 for each in (None, mesh))
        found[name] = (one, two, mesh)
    for row in rows:
        for phase, ratio in row.get("against", {}).get("faster", {}).items():
            if phase in TRAINING:
                own = row["seconds"][phase] if phase == "sla" else row["each_s"][0]
                found[TRAINING[phase]] = (ratio * own, own, "fsdp=2")
    return found


def draw(path: Path) -> Path:
    found = read()
    figure, axes = plt.subplots(figsize=(9.6, 4.2), layout="constrained", facecolor="white")
    for y, (one, two, mesh) in enumerate(found.values()):
        ratio = one / two
        colour, ink = (ORANGE, INK) if mesh == "fsdp=2" else (BLUE, "white")
        axes.barh(y, ratio, height=0.62, color=colour)
        times = [f"{t * 1e3:.0f} ms" if one < 1 else f"{t:.2f} s" for t in (one, two)]
        axes.text(ratio - 0.02, y, f"{ratio:.2f}x", va="center", ha="right", color=ink)
        axes.text(0.03, y, f"{mesh}: {times[0]} to {times[1]}", va="center", color=ink, size=9)
    axes.set(
        xlim=(0, 2.05),
        yticks=range(len(found)),
        yticklabels=list(found),
        ylim=(len(found) - 0.5, -0.5),
    )
    axes.axvline(2, color=INK, linewidth=0.8, linestyle=":")
    axes.set_title("Two NVIDIA H200 of a host against one, 2026-11-30", loc="left", fontsize=10)
    axes.set_xlabel("times as fast as one GPU", fontsize=9, color=INK)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0, labelsize=9, colors=INK)
    axes.grid(axis="x", color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    return path


if __name__ == "__main__":
    print(draw(FOLDER / "images/gpus.png"))
