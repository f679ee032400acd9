"""Runs of a tiny network over eight fake devices: python eight_devices.py DATA OUT, with the flags
of a test in the environment. Leaves OUT/<name of the run>/metrics.jsonl."""

import sys
from pathlib import Path

from run_cases import training_run, words

# rcm: the student in its warm-up and after it, and the critic, without the second call of the
# teacher. sla: in two parts.
RUNS = {
    "rcm": ("rcm-1.3b", ["loss.warmup=1", "loss.frequency=3", "loss.guidance=1"]),
    "sla": ("sla-1.3b", ["run.steps=2", "loss.target=data", "loss.accumulate=2"]),
}
# rcm over copies, what a turn does not use on the host; sla with heads over tp and sp
OVER_EIGHT = {
    "rcm": ["run.mesh=dp=2,fsdp=2,sp=2", "loss.offload=true", "run.steps=4"],
    "sla": ["run.mesh=fsdp=2,tp=2,sp=2"],
}


def run_of(name: str, data: Path, folder: Path, *more: str):
    """One of RUNS, as it is to be trained."""
    preset, own = RUNS[name]
    fixed = [f"run.folder={folder}", f"model.weights={data / 'dense'}", "run.log_every=1"]
    fixed += ["optimizer.eps=1e-3", "data.batch=8"]
    return training_run(preset, *words(data, *own, *fixed, *more))


def main(data: Path, out: Path) -> None:
    for name, more in OVER_EIGHT.items():
        run_of(name, data, out / name, "run.save_every=100", *more).train(resume=False)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
