"""Runs of the training presets over one GPU and over several: `python -m tdjax.train` itself, on
random shards and weights, from its start to a step.

    python tests/gpu/train_run.py sla rcm --folder FOLDER --steps 5 --json rows.jsonl    two runs at
    the same time, each on a GPU of its own
    python tests/gpu/train_run.py sla --folder FOLDER --devices 2 --against rows.jsonl

Without other options: the 1.3B network, 480p latents, a global batch of 8 in parts of one clip a
device, 20 steps. A row of --json (JSON lines) has the seconds, losses and norms of every step, the
share of peak and the memory of the first device as metrics.jsonl has them, and the largest relative
difference to the same steps of the same run over fewer devices in --against, with the ratio of
their seconds.

A run is killed after its last step, or after --limit seconds: the checkpoint of the end, 21 to
27 GiB, is not written, and what was done until then is in the row. rCM begins where its warm-up
ends: a turn of the student, in 1, 2, ... simulated steps, and four of the critic. `--weights
runs/dense/dit --latents 9 8 8 --channels 8 --text 32 128`, with a small dense network, is what a
CPU shows.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tdjax.train import metrics
from tdjax.train.shards import write_shard

HERE = Path(__file__).resolve().parent
MANIFEST = "Wan-AI_Wan2.1-T2V-1.3B"
PRESET = {
    "sla": ["sla-1.3b"],
    "rcm": ["rcm-1.3b", "loss.warmup=0"],
}
LATENTS = (21, 60, 104)
SAMPLES = 16  # two batches: no step repeats the clips of the one before
FAKE = "--xla_force_host_platform_device_count"  # where there is no GPU


# -- what a run reads ------------------------------------------------------------------------------


def prepare(args) -> None:
    """Writes weights, shards and the negative embedding into the folder, unless they are there."""
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.weights is None:
        subprocess.run([sys.executable, HERE / "published.py", args.folder, MANIFEST], check=True)
        args.weights = args.folder / f"{MANIFEST}.pth"
    rng = np.random.default_rng(0)
    shard = args.folder / "shards" / "shard_000000.tar"
    if not shard.exists():
        shape = (*args.latents, args.channels)
        drawn = lambda *shape: rng.standard_normal(shape, np.float32)
        shard.parent.mkdir(exist_ok=True)
        write_shard(shard, ((drawn(*shape), drawn(*args.text), "noise") for _ in range(SAMPLES)))
        np.save(args.folder / "negative.npy", drawn(*args.text))


# -- runs ------------------------------------------------------------------------------------------


class Run:
    """One command on `devices` GPUs, the first of which is `first`."""

    def __init__(self, name: str, first: int, args):
        self.name = name
        self.args = args
        self.folder = args.folder / f"run-{name}-{args.devices}"
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        settings = [f"data.path={args.folder / 'shards'}", f"data.batch={args.batch}"]
        if name == "rcm":
            settings.append(f"data.negative={args.folder / 'negative.npy'}")
        settings += [f"model.weights={args.weights}", f"run.folder={self.folder / 'run'}"]
        settings += ["run.log_every=1", "run.steps=100000", "run.save_every=100000"]
        if args.devices > 1:
            settings.append(f"run.mesh=fsdp={args.devices}")
        words = [*PRESET[name], *settings, *args.settings, "-v"]
        env = os.environ | {
            "CUDA_VISIBLE_DEVICES": ",".join(str(first + i) for i in range(args.devices)),
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {FAKE}={args.devices}",
        }
        self.log = self.folder / "log"
        self.start = time.perf_counter()
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tdjax.train", *words], env=env, stdout=log, stderr=log
            )

    def steps(self) -> list[dict]:
        return metrics.read(self.folder / "run")[: self.args.steps]

    def over(self) -> bool:
        """Whether it has done its steps, has ended by itself, or has had its time."""
        late = time.perf_counter() - self.start > self.args.limit
        return late or self.process.poll() is not None or len(self.steps()) >= self.args.steps

    def end(self) -> dict:
        """Kills it and returns its row."""
        self.process.kill()
        self.process.wait()
        shutil.rmtree(self.folder / "run" / "shards", ignore_errors=True)
        seconds = since(self.start)
        return {"run": self.name, "devices": self.args.devices, "whole_s": seconds} | row(
            self.steps(), self.args
        )


def together(args) -> Iterator[Run]:
    """The runs as they end: those of one device at the same time, each on its own; others one after
    the other."""
    if args.devices > 1:
        for name in args.names:
            yield ended(Run(name, 0, args))
        return
    runs = [Run(name, first, args) for first, name in enumerate(args.names)]
    for run in runs:
        yield ended(run)


def ended(run: Run) -> Run:
    while not run.over():
        time.sleep(0.2)
    return run


# -- rows ------------------------------------------------------------------------------------------


def row(steps: list[dict], args) -> dict:
    """What the steps' reports say."""
    if not steps:
        return {"steps": 0}
    phases = [next(key for key in step if key.endswith("/loss")).split("/")[0] for step in steps]
    seconds = [round(1 / step["steps_per_second"], 4) for step in steps]
    each = lambda name: [step[f"{phase}/{name}"] for step, phase in zip(steps, phases, strict=True)]
    out = {
        "steps": len(steps),
        "batch": args.batch,
        "latents": args.latents,
        "seconds": means(phases, seconds),
        "bad": sum(map(sum, (each("bad_samples"), each("bad_gradients")))),
    }
    for name in ("share_of_peak", "tflops_per_second", "memory_gib", "peak_memory_gib"):
        values = [step[name] for step in steps[1:] or steps if name in step]
        if values:
            out[name] = round(max(values) if "memory" in name else float(np.mean(values)), 4)
    return out | {
        "phases": phases,
        "each_s": seconds,
        "losses": each("loss"),
        "norms": each("grad_norm"),
    }


def means(phases: list[str], seconds: list[float]) -> dict[str, float]:
    """{phase: mean}, without the first step of each if there are others."""
    by_phase: dict[str, list[float]] = {}
    for phase, spent in zip(phases, seconds, strict=True):
        by_phase.setdefault(phase, []).append(spent)
    return {
        phase: round(float(np.mean(times[1:] or times)), 4) for phase, times in by_phase.items()
    }


def compared(own: dict, rows: list[dict]) -> dict:
    """How far a row is from that of the same run over fewer devices, the last of them."""
    same = [
        other
        for other in rows
        if other["devices"] < own["devices"]
        and all(other.get(key) == own.get(key) for key in ("run", "batch", "latents"))
    ]
    if not same or not own["steps"]:
        return {}
    other = same[-1]
    count = min(own["steps"], other["steps"])
    pairs = lambda key: zip(own[key][:count], other[key][:count], strict=True)
    far = lambda key: max(abs(a - b) / abs(b) for a, b in pairs(key))
    before, now = (means(x["phases"][:count], x["each_s"][:count]) for x in (other, own))
    faster = {phase: round(before[phase] / seconds, 3) for phase, seconds in now.items()}
    return {
        "against": {
            "devices": other["devices"],
            "steps": count,
            "losses": far("losses"),
            "norms": far("norms"),
            "faster": faster,
        }
    }


def since(start: float) -> float:
    return round(time.perf_counter() - start, 1)


def rows_of(path: Path | None) -> list[dict]:
    return list(map(json.loads, path.read_text().splitlines())) if path and path.exists() else []


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="+", metavar="sla | rcm | key=value")
    parser.add_argument("--devices", type=int, default=1, help="GPUs of a run")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--limit", type=float, default=560, help="seconds of a run")
    parser.add_argument("--folder", type=Path, required=True, help="of weights and runs")
    parser.add_argument("--weights", help="in place of a file of random numbers")
    parser.add_argument("--latents", nargs=3, type=int, default=LATENTS)
    parser.add_argument("--channels", type=int, default=16)
    parser.add_argument("--text", nargs=2, type=int, default=(512, 4096), help="rows, width")
    parser.add_argument("--json", type=Path, help="rows are added to this file")
    parser.add_argument("--against", type=Path, help="rows of fewer devices")
    args = parser.parse_intermixed_args()
    args.names = [word for word in args.words if word in PRESET]
    args.settings = [word for word in args.words if word not in PRESET]
    args.latents = list(args.latents)
    if not args.names:
        parser.error(f"name a run: {', '.join(PRESET)}")
    start = time.perf_counter()
    prepare(args)
    print(f"prepared in {since(start)} s", flush=True)
    complete = True
    for run in together(args):
        result = run.end()
        result |= compared(result, rows_of(args.against))
        print(json.dumps(result), flush=True)
        if args.json:
            with args.json.open("a") as file:
                file.write(json.dumps(result) + "\n")
        if result["steps"] < args.steps:
            complete = False
            print(run.log.read_text()[-4000:], flush=True)
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())
