"""Names of the videos of a command: templates, names given by rows, names that are taken."""

import contextlib
import datetime
import json
import os
import socket

import numpy as np
import pytest

from tdjax import files
from tdjax.errors import UsageError
from tdjax.generate import outputs
from tdjax.generate.arguments import parse
from tdjax.generate.jobs import Job
from tdjax.generate.outputs import (
    Files,
    Task,
    assign,
    check_early,
    check_template,
    claimed,
    targets,
)
from tdjax.media.video import read_video, write
from tdjax.pipeline.result import sidecar
from tdjax.progress import Stages

TODAY = datetime.date.today()
FACTS = {"tdjax": "1", "transformer": {}, "prompts": ["a"], "seed": 0, "size": {"frames": 5}}


def assigned(args, jobs, session=None, notes=None):
    note = (lambda text: None) if notes is None else notes.append
    return assign(args, "demo", jobs, note, lambda job: FACTS, session)


def made_before(path, **others):
    path.write_bytes(b"video")
    facts = {**FACTS, "fps": 16, "index": 0, "timings": {"denoise": 1.0}, **others}
    sidecar(path).write_text(json.dumps(facts))


def row(tmp_path, *options):
    args = parse(["--prompt_file", "p.csv", "--num_samples", "2", *options])
    return args, [Job(prompt="a", seed=0, out=str(tmp_path / "v.gif"))]


def names(template, *options, job=None):
    args = parse([*(["--save_path", template] if template else []), *options])
    check_template(template or "x", args.format)
    return [str(p) for p in targets(args, "demo", job or Job(prompt="A fox, red", seed=7, row=3))]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("v_{index:03d}.gif", "v_000.gif"),
        ("{seed:05d}_{row:02d}.gif", "00007_03.gif"),
        ("v_{date:%Y%m%d}.gif", f"v_{TODAY:%Y%m%d}.gif"),
        ("{date}_{model}_{prompt_slug}.gif", f"{TODAY}_demo_a-fox-red.gif"),
        ("take {{2}}.gif", "take {2}.gif"),
    ],
)
def test_templates(template, expected):
    assert names(template) == [expected]


def test_samples_are_numbered():
    assert names("v.gif", "--num_samples", "2") == ["v_0.gif", "v_1.gif"]
    assert names("v{index:02d}.gif", "--num_samples", "2") == ["v00.gif", "v01.gif"]
    assert names("v.gif", "--num_samples", "2", "--grid") == ["v.gif"]


@pytest.mark.parametrize("out", ["a {fox}.gif", "{0}.gif", "open{.gif", "{seed}.gif", "}{"])
def test_the_name_of_a_row_is_not_a_template(out):
    job = Job(prompt="a fox", seed=7, out=out)
    assert names(None, "--prompt_file", "p.csv", job=job) == [out]
    assert names("{seed}.gif", "--prompt_file", "p.csv", job=job) == [out]


def test_two_rows_of_one_name_are_refused(tmp_path):
    jobs = [Job(prompt=p, seed=0, out=str(tmp_path / "v.gif"), row=i) for i, p in enumerate("ab")]
    with pytest.raises(UsageError, match="two videos would be written"):
        assigned(parse(["--prompt_file", "p.csv"]), jobs)


@pytest.mark.parametrize("other", ["v.gif", "./x/../v.gif", "{here}/v.gif", "{here}//./v.gif"])
def test_two_spellings_of_one_name_are_one(tmp_path, monkeypatch, other):
    monkeypatch.chdir(tmp_path)
    outs = ("v.gif", other.format(here=tmp_path))
    jobs = [Job(prompt="a", seed=0, out=out, row=i) for i, out in enumerate(outs)]
    with pytest.raises(UsageError, match="two videos would be written"):
        assigned(parse(["--prompt_file", "p.csv"]), jobs)


INPUTS = [
    *("--latents", "--prompt_embeds", "--dit_path", "--vae_path", "--text_encoder_path"),
    *("--high_noise_model_path", "--low_noise_model_path", "--lora", "--lora_low", "--image"),
]


@pytest.mark.parametrize("option", INPUTS)
@pytest.mark.parametrize("place", ["a.{kind}", "x/../a.{kind}", "{here}/a.{kind}"])
def test_an_input_is_not_replaced(tmp_path, monkeypatch, option, place):
    monkeypatch.chdir(tmp_path)
    kind = "gif" if option == "--image" else "safetensors"
    (tmp_path / "x").mkdir()
    path = tmp_path / f"a.{kind}"
    path.write_bytes(b"mine")
    given = f"{path}:0.5" if "lora" in option else str(path)
    out = place.format(kind=kind, here=tmp_path)
    args = parse([option, given, "-o", out, "--overwrite"])
    with pytest.raises(UsageError, match="is the input"):
        check_early(args)
    job = Job(prompt="a", seed=0, out=out, image=given if option == "--image" else None)
    with pytest.raises(UsageError, match="is the input"):
        assigned(args, [job])
    assert path.read_bytes() == b"mine"


def test_the_index_goes_on_where_rows_would_meet(tmp_path):
    args = parse(["--prompt_file", "p.txt", "-o", f"{tmp_path}/x_{{index}}.gif", "--num_samples=2"])
    jobs = [Job(prompt=prompt, seed=0, row=row) for row, prompt in enumerate("abc", 1)]
    made = [[path.name for path in task.paths] for task in assigned(args, jobs)]
    assert made == [["x_0.gif", "x_1.gif"], ["x_2.gif", "x_3.gif"], ["x_4.gif", "x_5.gif"]]
    for name in ("x_0.gif", "x_1.gif", "x_2.gif"):  # the second row was interrupted
        made_before(tmp_path / name)
    again = assigned(args, jobs)
    assert [[path.name for path in task.paths] for task in again] == made[1:]


def test_many_rows_find_their_names_at_once(tmp_path, monkeypatch):
    """Not each from the beginning: ten thousand of them would look at fifty million names."""
    asked, numbered = [], outputs._numbered
    monkeypatch.setattr(outputs, "_numbered", lambda *a: asked.append(1) or numbered(*a))
    args = parse(["--prompt_file", "p.txt", "-o", f"{tmp_path}/x_{{index}}.gif"])
    rows = [Job(prompt="a", seed=0, row=row) for row in range(1, 301)]
    made = [task.paths[0].name for task in assigned(args, rows)]
    assert made == [f"x_{index}.gif" for index in range(300)] and len(asked) < 1000


@pytest.mark.parametrize("template", [None, "out/x_{index}.gif", "x_{seed}_{index:02d}.gif"])
def test_in_a_session_the_index_goes_on(tmp_path, monkeypatch, template):
    monkeypatch.chdir(tmp_path)
    args = parse(["--serve", *(["-o", template] if template else [])])
    session = {}
    made = []
    for row in (1, 2, 3):
        job = Job(prompt="a", seed=0, row=row)
        (path,) = assigned(args, [job], session)[0].paths
        path.parent.mkdir(exist_ok=True)
        path.touch()
        made.append(path)
    expected = [template or "output/{model}_{seed}_{index}.mp4"] * 3
    assert [str(path) for path in made] == [
        text.format(model="demo", seed=0, index=index) for index, text in enumerate(expected)
    ]
    job = Job(prompt="a", seed=0, row=1)  # another session, beside the files of the first
    (path,) = assigned(args, [job], {})[0].paths
    assert str(path) == expected[0].format(model="demo", seed=0, index=3)


def test_a_name_that_the_file_system_cannot_have_is_found_before_anything_runs(tmp_path):
    for length in (251, 256, 300):
        job = Job(prompt="a", seed=0, out=str(tmp_path / f"{'n' * (length - 4)}.gif"))
        with pytest.raises(OSError, match="too long"):
            assigned(parse([]), [job])


def test_a_row_is_done_where_its_videos_were_made_so(tmp_path):
    args, jobs = row(tmp_path)
    for name in ("v_0.gif", "v_1.gif"):
        made_before(tmp_path / name)
    assert not assigned(args, jobs)


OTHERS = [{"prompts": ["b"]}, {"seed": 1}, {"size": {"frames": 9}}, {"fps": 24}]


@pytest.mark.parametrize("other", OTHERS, ids=lambda other: next(iter(other)))
def test_a_row_of_other_videos_is_made_anew(tmp_path, other):
    args, jobs = row(tmp_path)
    made_before(tmp_path / "v_0.gif")
    made_before(tmp_path / "v_1.gif", **other)
    notes = []
    (task,) = assigned(args, jobs, notes=notes)
    assert task.overwrite and len(notes) == 1
    assert next(iter(other)).rstrip("s") in notes[0] and "made anew" in notes[0]


def test_other_software_is_no_other_video(tmp_path):
    args, jobs = row(tmp_path)
    for name in ("v_0.gif", "v_1.gif"):
        made_before(tmp_path / name, tdjax="0", versions={"jax": "0"}, device="another")
    assert not assigned(args, jobs)


def test_empty_files_are_not_done_and_foreign_ones_stay(tmp_path):
    args, jobs = row(tmp_path)
    for name in ("v_0.gif", "v_1.gif"):
        (tmp_path / name).touch()
    assert assigned(args, jobs)[0].overwrite
    (tmp_path / "v_0.gif").write_bytes(b"somebody's")
    with pytest.raises(UsageError, match="v_0.gif exists"):
        assigned(args, jobs)
    (tmp_path / "v_1.gif").write_bytes(b"somebody's")
    notes = []
    assert not assigned(args, jobs, notes=notes) and "nothing says how" in notes[0]
    without, _ = row(tmp_path, "--metadata", "off")
    assert not assigned(without, jobs, notes=notes) and "skipped" in notes[1]


@contextlib.contextmanager
def other_process(path, monkeypatch):
    """Another process, which lives, makes a file."""
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "getpid", os.getppid)
        with files.claimed([path]) as mine:
            assert mine
            patch.undo()
            yield


def test_a_default_name_gives_way_to_another_process(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    job = Job(prompt="a", seed=0)
    (task,) = assigned(parse([]), [job])
    with other_process(task.paths[0], monkeypatch):
        with claimed(parse([]), task, print) as paths:
            assert [path.name for path in paths] == ["demo_0_0-2.mp4"]
        assert not list(tmp_path.rglob("*.mp4"))
    task.paths[0].touch()  # the other one is done
    with claimed(parse([]), task, print) as paths:
        assert [path.name for path in paths] == ["demo_0_0-2.mp4"]
    assert [path.name for path in (tmp_path / "output").iterdir()] == ["demo_0_0.mp4"]


def test_a_name_that_was_asked_for_is_refused_and_a_row_skipped(tmp_path, monkeypatch):
    path, job = tmp_path / "v.gif", Job(prompt="a", seed=0, out=str(tmp_path / "v.gif"))
    task = Task(job=job, paths=[path], overwrite=False)
    notes = []
    with other_process(path, monkeypatch):
        with (
            pytest.raises(UsageError, match="made by another process"),
            claimed(parse(["-o", str(path)]), task, print),
        ):
            pass
        with claimed(parse(["--prompt_file", "p.csv"]), task, notes.append) as paths:
            assert paths is None and "skipped" in notes[0]
    with claimed(parse(["-o", str(path)]), task, print) as paths:
        assert paths == [path]
    assert not list(tmp_path.iterdir())


def test_the_mark_of_a_process_that_is_gone_counts_for_nothing(tmp_path):
    with files.claimed([tmp_path / "v.gif"]) as mine:
        (mark,) = tmp_path.iterdir()
        assert mine
        with files.claimed([tmp_path / "v.gif"]) as again:  # by another thread
            assert not again
    mark.write_text(f"{socket.gethostname()} {2**22 + 1} 00000000")
    with files.claimed([tmp_path / "v.gif"]) as mine:
        assert mine
    assert not list(tmp_path.iterdir())


def test_a_preview_is_there_until_the_video_is(tmp_path, capsys):
    args = parse(["-o", str(tmp_path / "v.mp4"), "--preview", "--num_samples", "2"])
    size = {"frames": 5, "height": 32, "width": 32}
    paths, there = [tmp_path / f"v_{i}.mp4" for i in (0, 1)], tmp_path / "v_0_preview.mp4"
    stages = Stages(False)
    with Files(args, stages, paths, {"size": size}, overwrite=False) as made:
        stages.next_video()
        for step, shade in enumerate((20, 200, 90), 1):
            made.listen["on_preview"](step, np.full((2, 4, 4, 3), shade, np.uint8))
            frames = read_video(there)  # a pixel for each latent is shown larger
            assert frames.shape == (2, 16, 16, 3) and abs(int(frames.mean()) - shade) < 8
        stages.next_video()
        made.listen["on_preview"](1, np.zeros((5, 32, 32, 3), np.uint8))
        assert read_video(tmp_path / "v_1_preview.mp4").shape == (5, 32, 32, 3)
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().err.count(str(there)) == 1


def test_a_preview_takes_no_other_files_place(tmp_path):
    """Not even where the video itself may be replaced; one that a killed run has left is."""
    there = tmp_path / "v_preview.mp4"
    save = ["-o", str(tmp_path / "v.mp4"), "--preview"]
    for metadata in (None, "somebody's"):
        write(there, np.zeros((2, 32, 32, 3), np.uint8), metadata=metadata, overwrite=True)
        for more in ([], ["--overwrite"]):
            with pytest.raises(UsageError, match="v_preview.mp4 exists"):
                assigned(parse([*save, *more]), [Job(prompt="a", seed=0)])
    there.write_bytes(b"a text of that name")
    with pytest.raises(UsageError, match="v_preview.mp4 exists"):
        assigned(parse([*save, "--overwrite"]), [Job(prompt="a", seed=0)])
    there.unlink()
    args, size = parse(save), {"frames": 5, "height": 32, "width": 32}
    made = Files(args, Stages(False), [tmp_path / "v.mp4"], {"size": size}, overwrite=False)
    made.listen["on_preview"](1, np.zeros((5, 32, 32, 3), np.uint8))  # and no end
    assert there.exists() and assigned(args, [Job(prompt="a", seed=0)])
