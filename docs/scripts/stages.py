"""The chart of docs/performance.md: where the time of a clip goes, from docs/bench/pipeline.jsonl.
`python docs/scripts/stages.py` (matplotlib)."""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Patch

FOLDER = Path(__file__).resolve().parent.parent
SMALL, LARGE = "turbowan2.1-t2v-1.3b-480p", "turbowan2.1-t2v-14b-720p"
ORIGINAL = "original step: dense, float, guided"
COLOURS = {
    "text": "#882255",
    "denoise": "#0072b2",
    "vae decode": "#e69f00",
    "rest": "#b8b8b8",
    "mp4": "#009e73",
}
LABELS = {"vae decode": "VAE decode", "rest": "rest", "mp4": "until the file is complete"}
KINDS = {  # of attention and of linear layers
    "dense, float": "dense, bfloat16",
    "sla, float": "SLA, bfloat16",
    "sagesla, int8_channel": "SageSLA, int8 by rows",
}
INK, FAINT = "#222222", "#dddddd"
SAID = {
    "va": "center",
    "color": INK,
    "fontsize": 9,
    "bbox": {"facecolor": "white", "edgecolor": "none", "pad": 1},
}


def read() -> tuple[dict[tuple[str, str, str], float], str]:
    """(model, stage, what) -> seconds, and the device with its date."""
    rows = [json.loads(line) for line in (FOLDER / "bench/pipeline.jsonl").read_text().splitlines()]
    (machine,) = {f"{row['device']}, {row['date']}" for row in rows}
    return {(row["model"], row["stage"], row["what"]): row["ms"] / 1e3 for row in rows}, machine


def parts(seconds: dict, model: str, kind: str) -> dict[str, float]:
    """Medians of the stages, what the whole takes beside them, and what a file takes beyond the
    frames, where that was measured."""
    found = {
        stage: seconds[model, stage, f"in the pipeline, {kind}"]
        for stage in ("text", "denoise", "vae decode")
    }
    whole = seconds[model, "end to end", f"prompt to frames on the host, {kind}"]
    found["rest"] = whole - sum(found.values())
    if (file := seconds.get((model, "end to end", f"prompt to mp4, {kind}"))) is not None:
        found["mp4"] = file - whole
    return found


def bar(axes, y: int, found: dict[str, float], hatch: str | None = None) -> None:
    left, wide = 0.0, axes.get_xlim()[1]
    for name, each in found.items():
        axes.barh(
            y,
            each,
            left=left,
            height=0.62,
            color=COLOURS[name],
            edgecolor="white",
            linewidth=0.8,
            hatch=hatch,
        )
        if each > 0.055 * wide and hatch is None:
            axes.text(
                left + each / 2,
                y,
                f"{each:.2f}",
                ha="center",
                va="center",
                color=INK if name == "vae decode" else "white",
                fontsize=9,
            )
        left += each
    frames = left - found.get("mp4", 0)
    note = f"{frames:.2f} s to frames" + (f", {left:.2f} s to an mp4" if "mp4" in found else "")
    axes.text(left + 0.012 * wide, y, f"{left:.1f} s of steps alone" if hatch else note, **SAID)


def panel(
    axes, title: str, wide: float, bars: dict[str, tuple[dict[str, float], str | None]]
) -> None:
    axes.set(
        xlim=(0, wide),
        yticks=range(len(bars)),
        yticklabels=list(bars),
        ylim=(len(bars) - 0.5, -0.5),
    )
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0, labelsize=9, colors=INK)
    axes.grid(axis="x", color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    for y, (found, hatch) in enumerate(bars.values()):
        bar(axes, y, found, hatch)


def draw(path: Path) -> Path:
    seconds, machine = read()
    small = {name: (parts(seconds, SMALL, kind), None) for kind, name in KINDS.items()}
    fastest = "sagesla, int8_channel"
    long = {
        "1.3B original, 50 guided steps": (
            {"denoise": 50 * seconds[SMALL, "step", ORIGINAL]},
            "///",
        ),
        "1.3B SageSLA, int8, 4 steps": (
            {k: v for k, v in parts(seconds, SMALL, fastest).items() if k != "mp4"},
            None,
        ),
        "14B SageSLA, int8, 4 steps (720p)": (parts(seconds, LARGE, fastest), None),
    }
    figure, (above, below) = plt.subplots(
        2, 1, figsize=(9.6, 4.9), layout="constrained", facecolor="white"
    )
    panel(above, f"1.3B, 480p, 81 frames, 4 steps, everything in memory ({machine})", 6.0, small)
    panel(below, "the same beside the original and 14B at 720p: another scale", 66.0, long)
    below.set_xlabel("seconds", fontsize=9, color=INK)
    keys = [Patch(color=colour, label=LABELS.get(name, name)) for name, colour in COLOURS.items()]
    keys.append(
        Patch(
            facecolor=COLOURS["denoise"],
            edgecolor="white",
            hatch="///",
            label="computed: 50 x one step",
        )
    )
    figure.legend(handles=keys, loc="outside lower center", ncols=6, frameon=False, fontsize=9)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    return path


if __name__ == "__main__":
    print(draw(FOLDER / "images/stages.png"))
