"""`tdjax generate` in two processes with two fake devices each: the videos of one device, files of
the first process alone, and how all come to an end."""

import json
import signal
import time

import hosts_cases
import numpy as np
import pytest
from hosts_cases import ends
from safetensors.numpy import load_file
from tolerances import assert_close

import tdjax
from tdjax.errors import UsageError
from tdjax.generate import __main__ as generate
from tdjax.generate import together
from tdjax.generate.arguments import parse

PROMPTS = ["a large red circle moves right quickly", "a small blue square stays on the left"]
MESH = ["--mesh", "sp=4"]
LOST = "an exchange with the other processes of this run failed"
ABORTED = "the JAX distributed service detected fatal errors"


@pytest.fixture(scope="module")
def start(dense_model, tmp_path_factory):
    """start(words of the command) -> two processes, which are gone afterwards."""
    few = "--model", dense_model, "--num_frames", 1, "--num_steps", 2
    with hosts_cases.command("tdjax.generate", tmp_path_factory.mktemp("cache")) as run:
        yield lambda *words, **options: run(*few, *words, **options)


def errors(stderr):
    """The lines of an error, without what libraries tell."""
    lines = stderr.splitlines()
    begins = [i for i, line in enumerate(lines) if line.startswith("error: ")]
    return lines[begins[0] : begins[0] + 3] if begins else []


def files(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def rows(start, tmp_path_factory):
    """(folder, what the processes said) of two rows of a file: latents of one, frames of one."""
    folder = tmp_path_factory.mktemp("two")
    outs = [folder / "first.safetensors", folder / "second.npy"]
    each = zip(PROMPTS, outs, (3, -1), strict=True)
    table = [{"prompt": p, "out": str(out), "seed": seed} for p, out, seed in each]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in table))
    return folder, ends(start("--prompt_file", path, *MESH))


@pytest.mark.slow
def test_two_processes_make_what_one_makes(dense_model, rows):
    """The seed that was drawn is that of the first, which alone prints and writes."""
    folder, done = rows
    assert [code for code, *_ in done] == [0, 0], done
    outs = [str(folder / name) for name in ("first.safetensors", "second.npy")]
    assert [hosts_cases.printed(out) for _, out, _ in done] == [outs, []]
    assert "tdjax: " in done[0][2] and "tdjax: " not in done[1][2]
    sidecars = ["first.safetensors.json", "second.npy.json"]
    assert files(folder) == sorted(["rows.jsonl", "first.safetensors", "second.npy", *sidecars])
    seed = json.loads((folder / "second.npy.json").read_text())["seed"]
    pipe = tdjax.load(dense_model, compile_cache=False)
    made = pipe(PROMPTS, seed=[3, seed], num_frames=1, num_steps=2)
    latents = tdjax.Result.load(outs[0]).latents
    assert_close(latents, made.latents[:1], "float32", "latents")
    difference = np.abs(np.load(outs[1]).astype(int) - made.frames[1])
    assert difference.max() <= 1 and (difference > 0).mean() < 1e-3


@pytest.mark.slow
def test_rows_that_are_done_are_skipped_by_both(rows, start):
    folder, _ = rows
    before = files(folder)
    done = ends(start("--prompt_file", folder / "rows.jsonl", *MESH))
    assert [(code, hosts_cases.printed(out)) for code, out, _ in done] == [(0, []), (0, [])], done
    assert done[0][2].count("is there already: skipped") == 2
    assert files(folder) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "mesh", "message"),
    [
        ("there.npy", "sp=4", "there.npy exists"),
        ("new.npy", "sp=3", "--mesh sp=3 has 3 devices"),
    ],
)
def test_what_the_first_refuses_ends_both(start, tmp_path, name, mesh, message):
    """One message, of the first, and its exit code from each."""
    (tmp_path / "there.npy").write_bytes(b"x")
    done = ends(start(PROMPTS[0], "--save_path", tmp_path / name, "--mesh", mesh))
    assert [code for code, *_ in done] == [2, 2], done
    assert message in errors(done[0][2])[0] and len(errors(done[0][2])) == 3
    assert errors(done[1][2]) == [] and files(tmp_path) == ["there.npy"]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "sent"), [(0, signal.SIGKILL), (1, signal.SIGTERM)])
def test_one_that_ends_or_is_lost_ends_the_other(start, tmp_path, number, sent):
    """Files that are there are whole. Latents: none of the two has a decoder."""
    outs = [str(tmp_path / f"{i}.safetensors") for i in range(200)]
    rows = [{"prompt": PROMPTS[0], "out": out} for out in outs]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    processes = start("--prompt_file", path, "--format", "latents", *MESH, lost=10)
    while not (tmp_path / "1.safetensors.json").exists():
        assert all(process.poll() is None for process in processes)
        time.sleep(0.02)
    processes[number].send_signal(sent)
    begun = time.monotonic()
    done = ends(processes)
    assert done[number][0] == (143 if sent == signal.SIGTERM else -sent), done[number]
    code, _, err = done[1 - number]
    assert (LOST in err and code == 1) or (ABORTED in err and code == -signal.SIGABRT), (code, err)
    assert time.monotonic() - begun < 60
    made = list(tmp_path.glob("*.safetensors"))
    shapes = {load_file(path)["latents"].shape for path in made}
    assert 1 < len(made) < 200 and shapes == {(1, 1, 4, 4, 8)}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--coordinator", "a:1"], "--coordinator is given without --processes and --process_id"),
        (["--process_id", "1"], "--process_id is given without --coordinator and --processes"),
        (["--processes", "0", "--process_id", "0", "--coordinator", "a:1"], "--processes is 0"),
    ],
)
def test_options_that_do_not_fit_together(capsys, words, message):
    assert generate.main(["a fox", *words]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--serve"], "--serve in several processes"),
        (["--ray", "2", "--prompt_file", "x.csv"], "--ray in several processes"),
        (["a fox", "--mesh", "xp=4"], "`mesh` xp=4: cannot read 'xp=4'"),
        (["a fox", "--num_frames", "6"], "num_frames is 6"),
    ],
)
def test_what_several_processes_do_not_do(words, message):
    with pytest.raises(UsageError) as error:
        together.check_early(parse(words))
    assert str(error.value).startswith(message) and len(str(error.value).splitlines()) == 3


def test_a_launcher_makes_one_of_several_where_a_mesh_is_given(monkeypatch):
    monkeypatch.setattr("tdjax.parallel.hosts.launcher", lambda: "slurm")
    assert generate.several(parse(["a fox", "--mesh", "auto"]))
    assert not generate.several(parse(["a fox"]))  # each makes its own
