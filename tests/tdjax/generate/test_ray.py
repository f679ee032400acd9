"""Rows of a prompt file that are made by two processes of a Ray on this machine, against the same
command without it."""

import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest

from tdjax.errors import OutOfMemory
from tdjax.generate import __main__ as generate
from tdjax.generate.arguments import parse
from tdjax.generate.jobs import read_jobs
from tdjax.generate.outputs import Task

pytest.importorskip("ray")
from tdjax.generate import ray as rows  # noqa: E402

ROWS = "prompt,seed\n" + "".join(
    f"a {size} {colour} circle moves right quickly on a gray background,{seed}\n"
    for seed, (size, colour) in enumerate(
        (size, colour) for size in ("small", "large") for colour in ("red", "green", "blue")
    )
)
FLAGS = ["--prompt_file", "rows.csv", "--num_frames", "5", "--num_steps", "1"]
ACTORS = ["--ray", "2", "--ray_gpus", "0"]


def to(name, cache) -> list[str]:
    return ["--save_path", f"{name}/{{row}}.mp4", "--compile_cache_dir", cache]


def command(folder, name, *words) -> subprocess.CompletedProcess:
    """The command in a process of its own, for videos of a folder of that name."""
    environment = {
        **os.environ,
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "RAY_AUTH_MODE": "disabled",
    }
    line = [sys.executable, "-m", "tdjax.generate", *FLAGS, *words, *to(name, "compiled")]
    done = subprocess.run(
        line, cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done


def sidecar(path) -> dict:
    about = json.loads(path.read_text())
    del about["timings"]
    return about


@pytest.mark.slow  # four processes with jax, three of a Ray
def test_rows_of_a_cluster_are_those_of_one_process(tmp_path, monkeypatch):
    (tmp_path / "rows.csv").write_text(ROWS)
    paths = command(tmp_path, "one").stdout.replace("one/", "two/").splitlines()
    assert len(paths) == 6
    done = command(tmp_path, "two", *ACTORS)
    assert sorted(done.stdout.splitlines()) == paths
    assert sorted(os.listdir(tmp_path / "one")) == sorted(os.listdir(tmp_path / "two"))
    for path in (tmp_path / "one").glob("*.mp4"):
        other = tmp_path / "two" / path.name
        assert path.read_bytes() == other.read_bytes()
        assert sidecar(path.with_suffix(".mp4.json")) == sidecar(other.with_suffix(".mp4.json"))
    monkeypatch.chdir(tmp_path)
    args = parse([*FLAGS, *ACTORS, *to("two", "none")])
    todo, notes = rows._assigned(args, read_jobs(args), str(tmp_path))
    assert not todo and notes == [f"{path} is there already: skipped" for path in paths]


@pytest.mark.slow  # it compiles
def test_a_group_whose_process_was_lost_is_made_to_its_end(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.csv").write_text(ROWS)
    words = ["--model", str(model), "--width", "32", "--height", "32", "--save_path", "{row}.npy"]
    args = parse([*FLAGS, *words, *ACTORS, "--compile_cache_dir", "none", "-q"])
    todo, _ = rows._assigned(args, read_jobs(args), str(tmp_path))
    process = rows.Rows(args, [todo[:3], todo[3:4]], str(tmp_path))
    first = {"group": np.array([0])}
    made = process(first)
    assert made == {"said": ["1.npy\n2.npy\n3.npy\n"], "error": [b""]}
    files = {path.name: path.read_bytes() for path in tmp_path.glob("*.npy")}
    (tmp_path / "3.npy").unlink()
    before = (tmp_path / "1.npy").stat().st_mtime_ns
    assert process(first) == made
    assert files == {path.name: path.read_bytes() for path in tmp_path.glob("*.npy")}
    assert (tmp_path / "1.npy").stat().st_mtime_ns == before


def test_finding_out_what_is_done_takes_no_memory_of_a_gpu(model, tmp_path, monkeypatch):
    """That process has ended, or is about to, when others begin to make the rows on its GPU."""
    taken = []
    monkeypatch.setattr(generate.cli, "take_memory", lambda: taken.append("taken"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.csv").write_text(ROWS)
    args = parse([*FLAGS, "--model", str(model), *ACTORS, "--compile_cache_dir", "none", "-q"])
    todo, _ = rows._assigned(args, read_jobs(args), str(tmp_path))
    assert len(todo) == 6 and not taken
    rows.Rows(args, [todo], str(tmp_path))
    assert taken == ["taken"]


def test_the_error_of_a_row_comes_back_whole(model, tmp_path, monkeypatch):
    def fail(*arguments):
        print("1.npy")
        raise OutOfMemory("no room", "the device is full", "ask for less")

    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.csv").write_text(ROWS)
    args = parse([*FLAGS, "--model", str(model), *ACTORS, "--compile_cache_dir", "none", "-q"])
    task = Task(job=read_jobs(args)[0], paths=[tmp_path / "1.npy"], overwrite=False)
    process = rows.Rows(args, [[task]], str(tmp_path))
    monkeypatch.setattr(rows, "make_files", fail)
    made = process({"group": np.array([0])})
    error = pickle.loads(made["error"][0])
    assert made["said"] == ["1.npy\n"] and type(error) is OutOfMemory and error.exit_code == 4
    assert str(error) == "no room\nthe device is full\nask for less"


WRONG = {
    "--ray 2": "--ray without --prompt_file",
    "--ray 0 --prompt_file rows.csv": "--ray 0 --ray_gpus 1",
    "--ray 2 --ray_gpus -1 --prompt_file rows.csv": "--ray 2 --ray_gpus -1",
    "--ray 2 --dry_run --prompt_file rows.csv": "--ray beside --dry_run",
}


@pytest.mark.parametrize("words", WRONG)
def test_what_a_cluster_cannot_do_is_refused(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.csv").write_text(ROWS)
    assert generate.main(words.split()) == 2
    assert f"error: {WRONG[words]}\n" in capsys.readouterr().err
