"""Commands that are stopped at random moments, and that find the disk full, with what must hold
afterwards: under a final name only whole files with the bits of an undisturbed run, nothing foreign
touched, nothing hidden left once the next run is done, and that run works.

Many of them, which takes hours or is left to run:

    PYTHONPATH=.:tests python tests/faults/kills.py 200 [seed] [command ...]
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from shard_cases import samples

from tdjax.checkpoints import demo, orbax
from tdjax.train import checkpoints
from tdjax.train.shards import write_shard

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
ENDED = {0, 2, 130, 143, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT}
UNBORN = "Fatal Python error: init"  # Ctrl-C before Python itself had started: nothing of ours ran
PROMPTS = ("a red circle moves left", "a blue square moves right, black background")
SETTINGS = (
    "model.dit.dim=16 model.dit.heads=2 model.dit.layers=1 model.dit.ffn_dim=16"
    " model.dit.in_channels=4 model.dit.out_channels=4 model.dit.text_dim=6 model.dit.text_len=7"
    " model.dit.patch=1,1,1 data.frames=2 data.batch=2 loss.dropout=0 run.steps=6 run.save_every=2"
    " run.log_every=1 run.keep=0"
)


@dataclasses.dataclass(frozen=True)
class Job:
    """A command whose results lie below `out`.

    argv:  its words; again: those of the run after a kill. whole: {name: what stands for the
           values} of what is there under a final name.
    often: words after which it writes more of the same, as it may where it is stopped: a run of
           training saves.
    """

    name: str
    argv: tuple[str, ...]
    again: tuple[str, ...]
    whole: Callable[[Path], dict[str, str]]
    often: tuple[str, ...] = ()


def files(out: Path) -> dict[str, str]:
    """{name: digest} of the files of a folder; of a sidecar, without the seconds that it took."""
    found = {}
    for path in out.glob("[!.]*"):
        data = path.read_bytes()
        if path.suffix == ".json":
            facts = json.loads(data)
            facts.pop("timings")
            data = json.dumps(facts, sort_keys=True).encode()
        found[path.name] = hashlib.sha256(data).hexdigest()
    return found


def arrays(leaves: dict[str, np.ndarray | jax.Array]) -> str:
    found = hashlib.sha256()
    for name, array in sorted(leaves.items()):
        found.update(f"{name} {array.dtype} {array.shape}".encode() + np.asarray(array).tobytes())
    return found.hexdigest()


def converted(out: Path) -> dict[str, str]:
    """{name: digest} of the checkpoints in a folder, each opened and read."""
    found = {}
    for folder in out.glob("[!.]*"):
        found[folder.name] = arrays(orbax.named_leaves(orbax.restore(folder)[1]))
    return found


def trained(out: Path) -> dict[str, str]:
    """{step: digest} of a run's checkpoints, each opened and read."""
    found = {}
    for step in checkpoints.steps(out / "run"):
        folder = checkpoints.folder(out / "run", step)
        manifest = checkpoints.inspect(folder)
        checkpoints.check_files(folder / "state", manifest["files"], "")
        with contextlib.closing(ocp.Checkpointer(ocp.PyTreeCheckpointHandler())) as reader:
            found[str(step)] = arrays(reader.restore(folder / "state"))
    return found


def jobs(folder: Path) -> list[Job]:
    """The commands: one video, a file of prompts, a conversion, a run of training."""
    shards = folder / "shards"
    shards.mkdir()
    write_shard(shards / "shard_000000.tar", samples(0, 4))
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS) + "\n")
    small = ("--num_frames", "5", "--num_steps", "1", "--seed", "1")
    video = ("tdjax.generate", "--prompt", PROMPTS[0], *small, "--save_path", "out/fox.mp4")
    batch = ("tdjax.generate", "--prompt_file", str(prompts), *small)
    batch += ("--save_path", "out/{index}.mp4")
    train = ("tdjax.train", "fm-tiny", f"data.path={shards}", "run.folder=out/run")
    train += tuple(SETTINGS.split())
    vae = ("convert", str(demo.folder() / "vae"), "out/vae")
    return [
        Job("generate", video, (*video, "--overwrite"), files),
        Job("batch", batch, batch, files),
        Job("convert", vae, (*vae, "--overwrite"), converted),
        Job("train", train, (*train, "--resume"), trained, ("run.save_every=1",)),
    ]


class Harness:
    """Runs jobs below a folder of its own, and counts."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.rng = folder, random.Random(seed)
        self.counts: collections.Counter[str] = collections.Counter()
        self.known: dict[str, str] = {}  # of the last `baseline`
        self.foreign = {  # beside the files of ours, in every folder that a command writes to
            folder / "cache" / "prompts" / "notes.safetensors.txt": b"mine",
            folder / "cache" / "thesis.tex": b"mine as well",
            folder / "work" / "out" / "poem.txt": b"not a video",
        }
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("JAX_")},
            "TDJAX_CACHE": str(folder / "cache"),
            "HF_HUB_OFFLINE": "1",
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": os.pathsep.join(sys.path),
        }

    @property
    def work(self) -> Path:
        return self.folder / "work"

    def clear(self) -> None:
        """An empty place to work, with files of somebody else."""
        shutil.rmtree(self.work, ignore_errors=True)
        for path, data in self.foreign.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)

    def start(self, argv: tuple[str, ...], limit: int | None = None) -> subprocess.Popen:
        """A command; limit: bytes of the largest file that it may write."""

        def prepare():
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored by what a shell left behind
            if limit is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        return subprocess.Popen(
            [sys.executable, "-m", *argv],
            cwd=self.work,
            env=self.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=prepare,
        )

    def finish(self, argv: tuple[str, ...]) -> None:
        """A run that nobody disturbs, and that must work."""
        run = self.start(argv)
        _, said = run.communicate(timeout=600)
        assert run.returncode == 0, f"{argv}: exit code {run.returncode}\n{said[-2000:]}"
        hidden = [str(p) for end in ("part", "claim") for p in self.folder.rglob(f".tdjax-*.{end}")]
        assert not hidden, f"left behind: {hidden}"

    def baseline(self, job: Job) -> tuple[dict[str, str], float]:
        """(what an undisturbed run writes, its seconds with warm caches)."""
        self.clear()
        self.finish((*job.argv, *job.often))
        self.known = self.whole(job)
        self.clear()
        start = time.perf_counter()
        self.finish(job.argv)
        seconds, want = time.perf_counter() - start, self.whole(job)
        assert want.items() <= self.known.items(), f"{job.name}: two runs give two results"
        return want, seconds

    def whole(self, job: Job) -> dict[str, str]:
        """What lies under final names, without what is somebody else's."""
        mine = {path.name for path in self.foreign}
        for path, data in self.foreign.items():
            assert path.read_bytes() == data, f"{path} was touched"
            if self.work in path.parents and job.whole is not files:
                path.unlink()
        found = job.whole(self.work / "out")
        for path, data in self.foreign.items():
            path.write_bytes(data)
        return {name: value for name, value in found.items() if name not in mine}

    def check(self, job: Job) -> dict[str, str]:
        """What is there: every final name has the bits of an undisturbed run."""
        found = self.whole(job)
        for name, value in found.items():
            assert self.known.get(name) == value, f"{job.name}: {name} is not what it should be"
        return found

    def check_done(self, job: Job, want: dict[str, str]) -> None:
        """All that an undisturbed run writes is there, and what else is there is right as well."""
        missing = want.keys() - self.check(job).keys()
        assert not missing, f"{job.name}: the next run did not make {', '.join(sorted(missing))}"

    def kill(self, job: Job, argv: tuple[str, ...], seconds: float) -> bool:
        """Starts a command and stops it at a random moment; False where it had ended before."""
        run = self.start(argv)
        number = self.rng.choice(SIGNALS)
        try:
            _, said = run.communicate(timeout=self.rng.uniform(0, seconds))
        except subprocess.TimeoutExpired:
            run.send_signal(number)
            _, said = run.communicate(timeout=120)
        if run.returncode == -signal.SIGSEGV:  # threads of XLA, taken down in their work
            self.counts["crashes on the way out"] += 1
        elif UNBORN in said:
            self.counts["stopped before Python ran"] += 1
            return True
        else:
            assert run.returncode in ENDED, f"{job.name}: {run.returncode}\n{said[-2000:]}"
        self.counts["tracebacks"] += "Traceback" in said
        self.counts[f"{job.name} {number.name}"] += run.returncode != 0
        return run.returncode != 0

    def kills(
        self, job: Job, want: dict[str, str], seconds: float, count: int, chain: int = 4
    ) -> None:
        """`count` kills in chains on one folder; after each, what is there is whole, and after a
        chain the next run works and gives the bits of the undisturbed one.

        want, seconds: of `baseline`.
        """
        done = length = 0
        while done < count:
            if not length:
                self.clear()
            start = time.perf_counter()
            killed = self.kill(job, job.again if length else job.argv, seconds)
            self.check(job)
            done, length = done + killed, length + 1
            if killed and length < chain and done < count:
                continue
            if not killed and length == 1:
                seconds = min(seconds, time.perf_counter() - start)  # the machine has less to do
            self.finish(job.again)
            self.check_done(job, want)
            self.counts[f"{job.name} resumed"] += 1
            length = 0

    def full_disk(self, job: Job, want: dict[str, str], limit: int) -> None:
        """A command that may write files of `limit` bytes at most: three lines, and as after a
        kill."""
        self.clear()
        run = self.start(job.argv, limit)
        _, said = run.communicate(timeout=600)
        assert run.returncode in (0, 2), f"{job.name}: exit code {run.returncode}\n{said[-2000:]}"
        assert "Traceback" not in said, said[-2000:]
        self.counts[f"{job.name} full disk, exit {run.returncode}"] += 1
        self.check(job)
        self.finish(job.again)
        self.check_done(job, want)


def main(argv: list[str]) -> int:
    count, seed = int(argv[0]), int(argv[1]) if len(argv) > 1 else 0
    with tempfile.TemporaryDirectory() as folder:
        harness, failed = Harness(Path(folder), seed), 0
        every = jobs(Path(folder))
        for job in every if not argv[2:] else [j for j in every if j.name in argv[2:]]:
            start = time.perf_counter()
            try:
                want, seconds = harness.baseline(job)
                harness.kills(job, want, seconds, count // len(every))
                harness.full_disk(job, want, 2000)
            except AssertionError as error:
                failed += 1
                print(f"FAILED {error}")
            print(f"{job.name}: {time.perf_counter() - start:.0f} s", flush=True)
        for name, number in sorted(harness.counts.items()):
            print(f"{number:5} {name}")
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
