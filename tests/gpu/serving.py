"""`python -m tdjax.server` at real size on two GPUs: clips a minute, latency, and what the service
costs beyond `pipe(...)`.

    python tests/gpu/serving.py FOLDER > rows.jsonl     T2V 1.3B at 480p, 81 frames, 4 steps, the
    fastest way; writes 16 GB to FOLDER, or uses what is there
    python tests/gpu/serving.py FOLDER --demo           the embedded model on CPUs, to try this out

Parts (`--parts`), each a JSON line, then one that compares them:

pipe     `pipe(...)` in a loop, frames to the host and no file: one process alone, then one on each
         of two GPUs at once; and the first one with `save` after each clip
one      the service with one worker: seconds of a clip that finds it idle, then clips that wait in
         the queue
two      the same with two workers
mesh     one worker over two GPUs (`--mesh sp=2`): seconds of a clip

A clip's prompt is a new one each time. clips_a_minute counts from the end of the first clip of
each worker to the end of the last: neither the start of the queue nor its last file is in it. The
numbers in the files are random, so the frames are noise: the worst case for the video encoder.
`--calm` makes the decoder's last layer small, and the frames nearly grey: about the best case.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import sqlite3
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path

import real_size

MODEL, (VAE, TEXT) = "TurboWan2.1-T2V-1.3B-480P", real_size.BASE
CALM = 0.03  # of the decoder's last layer
WAIT = 300  # seconds for a start with empty caches
PARTS = ("pipe", "one", "two", "mesh")


def prompt(demo: bool) -> str:
    """A prompt whose embeddings are in no cache."""
    words = "a large red circle moves right quickly on a gray background"
    return words if demo else f"{real_size.PROMPT}, take {uuid.uuid4().hex}"


def prepare(folder: Path, calm: bool) -> list[str]:
    """The options that open the model, whose files are written unless they are there."""
    real_size.write(folder, MODEL, VAE, TEXT)
    if not (folder / "tokenizer.json").exists():
        real_size.tokenizer(folder)
    words = ["--model", str(folder / f"{MODEL}.pth"), *real_size.FASTEST]
    if not calm:
        return words
    path = folder / "calm" / f"{VAE}.pth"
    if not path.exists():
        import torch

        state = torch.load(folder / f"{VAE}.pth", mmap=True)
        for key in ("decoder.head.2.weight", "decoder.head.2.bias"):
            state[key] = state[key] * CALM
        path.parent.mkdir(exist_ok=True)
        torch.save(state, path)
    return [*words, "--vae_path", str(path)]


def environment(folder: Path, device: int | None = None) -> dict[str, str]:
    """Caches of this measurement alone. device: the only GPU that is seen."""
    own = os.environ | {"TDJAX_CACHE": str(folder / "cache"), "PYTHONUNBUFFERED": "1"}
    return own if device is None else own | {"CUDA_VISIBLE_DEVICES": str(device)}


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# -- pipe(...) -------------------------------------------------------------------------------------


def loop(words: list[str]) -> None:
    """The process of the part `pipe`: {"clips", "file"} a line in, the seconds of each out."""
    from tdjax.server.__main__ import build_parser, worker_command
    from tdjax.server.worker import PipelineMaker

    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    args = build_parser().parse_args(words)
    maker = PipelineMaker(json.loads(worker_command(args)[-1]))
    maker.open()
    demo = maker.pipe.info.language is not None
    maker.pipe(prompt(demo))
    out.write("ready\n")
    out.flush()
    for line in sys.stdin:
        order, seconds = json.loads(line), []
        for seed in range(order["clips"]):
            start = time.perf_counter()
            result = maker.pipe(prompt(demo), seed=seed)
            if order["file"]:
                result.save(order["file"], overwrite=True)
            seconds.append(time.perf_counter() - start)
        last = {"seconds": seconds, "timings": result.timings, "shape": result.frames.shape}
        out.write(json.dumps(last) + "\n")
        out.flush()


class Loop:
    """One such process."""

    def __init__(self, words: list[str], folder: Path, device: int):
        command = [sys.executable, __file__, "--loop", *words]
        own = environment(folder, device)
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=own)

    def hear(self) -> str:
        line = self.process.stdout.readline()
        assert line, f"the loop ended with {self.process.wait()}"
        return line

    def send(self, clips: int, file: str = "") -> None:
        self.process.stdin.write(json.dumps({"clips": clips, "file": file}) + "\n")
        self.process.stdin.flush()

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait(60)


def pipe(words: list[str], args) -> Iterator[dict]:
    """Rows of `pipe(...)` alone, two at once, and with its file."""
    start = time.perf_counter()
    loops = [Loop(words, args.folder, device) for device in range(2)]
    try:
        for each in loops:
            each.hear()
        begun = time.perf_counter() - start
        for what, some, clips, file in (
            ("pipe", loops[:1], args.clips, ""),
            ("pipe", loops, args.clips, ""),
            ("pipe, then save", loops[:1], 3, str(args.folder / "pipe.mp4")),
        ):
            for each in some:
                each.send(clips, file)
            told = [json.loads(each.hear()) for each in some]
            medians = [statistics.median(one["seconds"]) for one in told]
            yield {
                "what": what,
                "processes": len(some),
                "clips": clips * len(some),
                "clips_a_minute": sum(60 * clips / sum(one["seconds"]) for one in told),
                "clip_s": medians,
                "stages_s": told[0]["timings"],
                "frames": told[0]["shape"],
                "start_s": begun,
            }
    finally:
        for each in loops:
            each.end()


# -- the service -----------------------------------------------------------------------------------


class Served:
    """`python -m tdjax.server` as a process, with jobs in a folder of its own."""

    def __init__(self, words: list[str], folder: Path, device: int | None = None):
        self.jobs = folder / "jobs"
        shutil.rmtree(self.jobs, ignore_errors=True)
        command = [sys.executable, "-m", "tdjax.server", *words, "--port", "0"]
        command += ["--folder", str(self.jobs), "--drain", "0"]
        own = environment(folder, device)
        start = time.perf_counter()
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=own)
        self.url = ""
        threading.Thread(target=self._read, daemon=True).start()
        self._until(lambda: self.url)
        self._until(self._ready)
        self.start = time.perf_counter() - start

    def _read(self) -> None:
        for line in self.process.stderr:
            note("  server: " + line.rstrip())
            found = re.search(r"http://[0-9.]+:[0-9]+", line)
            if found and not self.url:
                self.url = found[0]

    def _until(self, condition, pause: float = 0.02):
        end = time.monotonic() + WAIT
        while not (value := condition()):
            assert self.process.poll() is None, f"the server ended with {self.process.returncode}"
            assert time.monotonic() < end, "it took too long"
            time.sleep(pause)
        return value

    def _ready(self) -> bool:
        """Whether all workers are."""
        try:
            with urllib.request.urlopen(self.url + "/metrics") as answer:
                text = answer.read().decode()
        except OSError:
            return False
        ready = re.search(r"^tdjax_workers_ready ([0-9.]+)$", text, re.M)
        started = re.search(r"^tdjax_workers_started ([0-9.]+)$", text, re.M)
        return ready is not None and float(ready[1]) == float(started[1]) > 0

    def ask(self, path: str, body: dict | None = None) -> dict:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        with urllib.request.urlopen(
            urllib.request.Request(self.url + path, data, headers)
        ) as answer:
            return json.load(answer)

    def add(self, demo: bool) -> str:
        return self.ask("/v1/videos", {"prompt": prompt(demo), "seed": 1})["id"]

    def ended(self, id: str) -> None:
        ended = ("completed", "failed", "cancelled")
        one = lambda: self.ask(f"/v1/videos/{id}")
        job = self._until(lambda: (job := one())["status"] in ended and job, 0.01)
        assert job["status"] == "completed", job

    def rows(self, ids: list[str]) -> list[dict]:
        """What the store knows of jobs."""
        with contextlib.closing(sqlite3.connect(self.jobs / "jobs.sqlite3")) as db:
            db.row_factory = sqlite3.Row
            marks = ",".join("?" * len(ids))
            found = db.execute(f"SELECT * FROM tdjax_jobs WHERE id IN ({marks})", ids)
            return [dict(row) for row in found]

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(60)


def service(words: list[str], args, workers: int, mesh: str | None, queued: bool) -> dict:
    """A row of the service."""
    words = [*words, "--workers", str(workers), *(["--mesh", mesh] if mesh else [])]
    words += ["--queue", "1000", "--jobs", "1000"]
    served = Served(words, args.folder, 0 if workers == 1 and not mesh else None)
    row: dict = {"what": "service", "workers": workers, "mesh": mesh, "start_s": served.start}
    try:
        start = time.perf_counter()
        for _ in range(2):  # the first clip of a worker loads weights
            for id in [served.add(args.demo) for _ in range(workers)]:
                served.ended(id)
            row.setdefault("first_clip_s", time.perf_counter() - start)
        latency, ids = [], []
        for _ in range(args.single):
            start = time.perf_counter()
            ids.append(served.add(args.demo))
            served.ended(ids[-1])
            latency.append(time.perf_counter() - start)
        row["latency_s"] = latency
        if queued:
            number = args.clips * workers
            start = time.perf_counter()
            ids = [served.add(args.demo) for _ in range(number)]
            posted = time.perf_counter() - start
            for id in ids:
                served.ended(id)
            whole = time.perf_counter() - start
        found = served.rows(ids)
        if queued:
            ends = sorted(job["completed_at"] for job in found)
            begins = sorted(job["started_at"] for job in found)
            steady = ends[-1] - ends[workers - 1]
            row |= {
                "clips": number,
                "posted_s": posted,
                "whole_s": whole,
                "clips_a_minute": 60 * (number - workers) / steady,
                "clips_a_minute_whole": 60 * number / whole,
                "begins_s": [begin - begins[0] for begin in begins],
                "ends_s": [end - begins[0] for end in ends],
            }
        timings = [json.loads(job["result"])["timings"] for job in found]
        row["stages_s"] = {
            name: statistics.median(each.get(name, 0.0) for each in timings) for name in timings[0]
        }
        row["bytes"] = statistics.median(job["bytes"] for job in found)
        return row
    finally:
        served.stop()


# -- together --------------------------------------------------------------------------------------


def compared(rows: list[dict]) -> dict:
    """What is to be shown, of the rows that are there."""
    rate = {
        (row["what"], row.get("processes") or (row["workers"], row["mesh"])): row["clips_a_minute"]
        for row in rows
        if "clips_a_minute" in row
    }
    latency = {
        row["mesh"]: statistics.median(row["latency_s"])
        for row in rows
        if row["what"] == "service" and row["workers"] == 1
    }
    out: dict = {"what": "compared"}
    one, two = rate.get(("service", (1, None))), rate.get(("service", (2, None)))
    if one and two:
        out["two_workers_over_one"] = two / one  # 1.9 is wanted
    for number, served in ((1, one), (2, two)):
        alone = rate.get(("pipe", number))
        if alone and served:
            out[f"overhead_of_{number}_percent"] = 100 * (alone / served - 1)  # 5 is allowed
    if len(latency) == 2:
        out["one_gpu_over_mesh"] = latency[None] / latency["sp=2"]
    return out


def rounded(value):
    if isinstance(value, float):
        return round(value, 3)
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    return [rounded(each) for each in value] if isinstance(value, list) else value


def main() -> None:
    if sys.argv[1:2] == ["--loop"]:
        loop(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("folder", type=Path, help="of the files, compiled programs and jobs")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--clips", type=int, default=12, help="in a row, of each process")
    parser.add_argument("--single", type=int, default=3, help="clips that find the service idle")
    parser.add_argument("--calm", action="store_true", help="frames that are nearly grey")
    parser.add_argument("--demo", action="store_true", help="the embedded model")
    args = parser.parse_args()
    args.folder = args.folder.absolute()
    args.folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    words = ["--model", "demo"] if args.demo else prepare(args.folder, args.calm)
    words += ["--compile_cache_dir", str(args.folder / "compiled")]
    note(f"== files: {time.perf_counter() - start:.1f} s")
    rows: list[dict] = []

    def tell(row: dict) -> None:
        rows.append(row)
        print(json.dumps(rounded({"frames_are": "calm" if args.calm else "noise"} | row)))
        sys.stdout.flush()

    for part in args.parts:
        begun = time.perf_counter()
        if part == "pipe":
            for row in pipe(words, args):
                tell(row)
        elif part == "mesh":
            tell(service(words, args, 1, "sp=2", queued=False))
        else:
            tell(service(words, args, 1 if part == "one" else 2, None, queued=True))
        note(f"== {part}: {time.perf_counter() - begun:.1f} s")
    tell(compared(rows))


if __name__ == "__main__":
    main()
