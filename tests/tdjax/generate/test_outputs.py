"""Names of the videos of a command: templates, names given by rows, names that are taken."""

import datetime

import pytest

from tdjax.errors import UsageError
from tdjax.generate.arguments import parse
from tdjax.generate.jobs import Job
from tdjax.generate.outputs import assign, check_template, targets

TODAY = datetime.date.today()


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
        assign(parse(["--prompt_file", "p.csv"]), "demo", jobs, print)


def test_the_index_goes_on_where_rows_would_meet(tmp_path):
    args = parse(["--prompt_file", "p.txt", "-o", f"{tmp_path}/x_{{index}}.gif", "--num_samples=2"])
    jobs = [Job(prompt=prompt, seed=0, row=row) for row, prompt in enumerate("abc", 1)]
    made = [[path.name for path in paths] for _, paths in assign(args, "demo", jobs, print)]
    assert made == [["x_0.gif", "x_1.gif"], ["x_2.gif", "x_3.gif"], ["x_4.gif", "x_5.gif"]]
    for name in ("x_0.gif", "x_1.gif", "x_2.gif"):  # the second row was interrupted
        (tmp_path / name).touch()
    again = assign(args, "demo", jobs, lambda text: None)
    assert [[path.name for path in paths] for _, paths in again] == made[1:]


@pytest.mark.parametrize("template", [None, "out/x_{index}.gif", "x_{seed}_{index:02d}.gif"])
def test_in_a_session_the_index_goes_on(tmp_path, monkeypatch, template):
    monkeypatch.chdir(tmp_path)
    args = parse(["--serve", *(["-o", template] if template else [])])
    session = {}
    made = []
    for row in (1, 2, 3):
        job = Job(prompt="a", seed=0, row=row)
        ((_, (path,)),) = assign(args, "demo", [job], print, session)
        path.parent.mkdir(exist_ok=True)
        path.touch()
        made.append(path)
    expected = [template or "output/{model}_{seed}_{index}.mp4"] * 3
    assert [str(path) for path in made] == [
        text.format(model="demo", seed=0, index=index) for index, text in enumerate(expected)
    ]
    job = Job(prompt="a", seed=0, row=1)  # another session, beside the files of the first
    ((_, (path,)),) = assign(args, "demo", [job], print, {})
    assert str(path) == expected[0].format(model="demo", seed=0, index=3)


def test_a_name_that_the_file_system_cannot_have_is_found_before_anything_runs(tmp_path):
    for length in (251, 256, 300):
        job = Job(prompt="a", seed=0, out=str(tmp_path / f"{'n' * (length - 4)}.gif"))
        with pytest.raises(OSError, match="too long"):
            assign(parse([]), "demo", [job], print)
