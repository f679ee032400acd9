"""Runs of a tiny network over eight fake devices, and over one: python eight_devices.py DATA OUT,
with the flags of a test in the environment. Leaves OUT/<name of the run>/metrics.jsonl."""

import gc
import sys
from pathlib import Path

import jax
from run_cases import training_run, words

# rcm over copies, without the second call of the teacher; sla in two parts, heads over tp and sp
RUNS = {
    "rcm": ("rcm-1.3b", ["loss.warmup=0", "loss.frequency=2", "loss.guidance=1", "run.steps=2"]),
    "sla": ("sla-1.3b", ["run.steps=2", "loss.target=data", "loss.accumulate=2"]),
}
MESHES = {"rcm": "dp=2,fsdp=2,sp=2", "sla": "fsdp=2,tp=2,sp=2"}


def main(data: Path, out: Path) -> None:
    jax.config.update("jax_default_matmul_precision", "highest")
    gc.collect()  # as in conftest: looking for cycles while tracing is a tenth of the time
    gc.freeze()
    gc.set_threshold(50_000)
    for name, (preset, own) in RUNS.items():
        for mesh in ("auto", MESHES[name]):
            folder = out / f"{name}-{mesh}"
            fixed = [f"run.folder={folder}", f"run.mesh={mesh}", f"model.weights={data / 'dense'}"]
            fixed += ["run.log_every=1", "run.save_every=100", "optimizer.eps=1e-3"]
            fixed.append("data.batch=8")
            training_run(preset, *words(data, *own, *fixed)).train(resume=False)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
