"""Prompt files as people have them: every row is read as it was meant, or refused with its
number."""

import io
import json
import subprocess
import sys

import pytest

from tdjax.errors import UsageError
from tdjax.generate.arguments import parse
from tdjax.generate.jobs import read_jobs

FOX, HEN = "a fox runs", "a hen, which is red"


@pytest.fixture
def jobs(tmp_path):
    """jobs(name, content, *options): the jobs of a prompt file with that content, and the notes."""

    def read(name, content, *options):
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        notes = []
        return read_jobs(parse(["--prompt_file", str(path), *options]), None, notes.append), notes

    return read


def prompts(result):
    return [job.prompt for job in result[0]]


def test_rows_over_the_options_of_the_command(jobs):
    assert prompts(jobs("p.txt", "# comment\na fox\n\na hen\n")) == ["a fox", "a hen"]
    rows, _ = jobs("p.csv", "prompt,seed,out\na fox,7,fox.mp4\na hen,,\n", "--seed", "3")
    assert [(j.prompt, j.seed, j.out) for j in rows] == [
        ("a fox", 7, "fox.mp4"),
        ("a hen", 3, None),
    ]
    line = json.dumps({"prompt": "a fox", "num_frames": 5, "image": None}) + "\n"
    assert [(j.num_frames, j.image) for j in jobs("p.jsonl", line)[0]] == [(5, None)]


TABLES = {
    "commas": f'prompt,seed\n{FOX},1\n"{HEN}",2\n',
    "semicolons": f"prompt;seed\n{FOX};1\n{HEN};2\n",
    "tabs": f"prompt\tseed\n{FOX}\t1\n{HEN}\t2\n",
    "capitals and blanks": f'Prompt, Seed \n{FOX}, 1\n"{HEN}",2\n',
    "rows without values": f'\nprompt,seed\n{FOX},1\n,\n\n"{HEN}",2\n,\n',
    "numbers of pandas": f',prompt,seed\n0,{FOX},1.0\n1,"{HEN}",2.0\n',
    "carriage returns": f'prompt,seed\r\n{FOX},1\r\n"{HEN}",2\r\n',
    "quotes everywhere": f'"prompt","seed"\n"{FOX}","1"\n"{HEN}","2"\n',
}


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_tables_of_spreadsheets(jobs, kind, encoding):
    rows, _ = jobs("p.CSV", TABLES[kind].encode(encoding))
    assert [(j.prompt, j.seed, j.row) for j in rows] == [(FOX, 1, 1), (HEN, 2, 2)]


@pytest.mark.parametrize("line", ["sep=;\n", '"sep=;"\r\n', "sep=|\r\n", "sep=\t\n"])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_table_may_say_what_separates_its_columns(jobs, line, encoding):
    mark = line.strip('"\r\n')[-1]
    text = f"{line}prompt{mark}seed\n{FOX}{mark}3.00\n"
    rows, _ = jobs("p.csv", text.encode(encoding))
    assert [(job.prompt, job.seed) for job in rows] == [(FOX, 3)]


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ("prompt,sede\na,1\n", "sede"),
        ("prompt,seed\na,x\n", "seed is 'x'"),
        ("prompt,seed\na,1.5\n", "whole numbers"),
        ("seed\n1\n", "no prompt"),
        ("prompt\n", "no prompts"),
        ("", "no prompts"),
        ("prompt\na circle, red\n", "between double quotes"),
        ('prompt,seed\n"a fox,1\na hen,2\n', "unexpected end"),
        ("prompt,prompt\na,b\n", "twice"),
        ("prompt;seed\na fox;1.000\n", "seed is '1.000'"),
        (b"PK\x03\x04" + bytes(99), "zip archive.*spreadsheets"),
        ("prompt\na fox\n".encode("utf-16-le"), "line 1 holds the character 0"),
        ("prompt\na fox\n".encode("utf-32"), "the character 0"),
        ("prompt\ncaf\xe9\n".encode("cp1252"), "line 2 is not UTF-8.*0xe9.*save the file"),
    ],
)
def test_a_table_that_is_not_clear_is_refused(jobs, content, word):
    with pytest.raises(UsageError, match=word):
        jobs("p.csv", content)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.json", json.dumps([{"prompt": FOX}, {"prompt": HEN}])),
        ("p.json", json.dumps([FOX, HEN])),
        ("p.JSONL", f'{{"prompt": "{FOX}"}}\n\n"{HEN}"\n'),
        ("p.ndjson", f'{{"prompt": "{FOX}"}}\r\n{{"prompt": "{HEN}"}}'),
        ("p.tsv", f"prompt\n{FOX}\n{HEN}\n"),
        ("p.TXT", f"{FOX}\n{HEN}\n"),
        ("prompts", f"{FOX}\n{HEN}\n"),
    ],
)
def test_kinds_of_files(jobs, name, content):
    assert prompts(jobs(name, content)) == [FOX, HEN]


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("p.xlsx", "x", r"\.csv"),
        ("p.md", "x", "one prompt a line"),
        ("p.txt", "prompt,seed\na fox,1\n", "name it .csv"),
        ("p.txt", '[\n{"prompt": "a"}\n]', "name it .json"),
        ("p.json", '{"prompt": "a"}', "not a list"),
        ("p.json", "[1]", "not a table row"),
        ("p.jsonl", '{"prompt": ["a"]}', "prompt is"),
        ("p.jsonl", '{"prompt": "a", "seed": true}', "seed is True"),
        ("p.jsonl", '{"prompt": "a"', "cannot be read"),
        ("p.jsonl", '{"prompt": "a", "seed": 1, "seed": 2}', "twice"),
        ("p.json", '[{"prompt": "a", "prompt": "b"}]', "twice"),
        ("p.txt", "a fox\na \0 hen", "line 2 holds the character 0"),
        ("p.ods", "x", "save the table as .csv"),
    ],
)
def test_files_of_another_kind_are_refused(jobs, name, content, word):
    with pytest.raises(UsageError, match=word):
        jobs(name, content)


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\v", "\f", "\x1c"])
def test_only_new_lines_end_a_line(jobs, mark):
    assert prompts(jobs("p.txt", f"a fox{mark}runs\n")) == [FOX]
    row = json.dumps({"prompt": f"a fox{mark}runs"}, ensure_ascii=False)
    assert prompts(jobs("p.jsonl", row)) == [f"a fox{mark}runs"]


def test_half_an_emoji_becomes_a_replacement_character(jobs):
    rows, notes = jobs("p.jsonl", '{"prompt": "a fox \\ud83d"}\n{"prompt": "\\ud83d\\ude00"}\n')
    assert [job.prompt for job in rows] == ["a fox \ufffd", "\U0001f600"]
    assert len(notes) == 1 and notes[0].startswith("row 1 ")
    (job,) = read_jobs(parse(["--prompt", "caf\udce9"]))
    assert job.prompt == "caf\ufffd"


def test_minus_one_draws_a_seed_in_a_row(jobs):
    rows, notes = jobs("p.csv", "prompt,seed\na,-1\nb,-1\nc,4\n")
    assert rows[2].seed == 4 and all(0 <= job.seed < 2**31 for job in rows)
    assert notes == [f"row {job.row}: seed {job.seed}" for job in rows[:2]]


def test_paths_of_rows_take_a_tilde(jobs, monkeypatch):
    monkeypatch.setenv("HOME", "/data/home")
    (job,), _ = jobs("p.csv", "prompt,image,out\na,~/x.png,~/v.gif\n")
    assert (job.image, job.out) == ("/data/home/x.png", "/data/home/v.gif")


def test_pipes_are_files():
    code = (
        "import sys; from tdjax.generate.__main__ import check_early; from tdjax.generate.jobs"
        " import read_jobs; from tdjax.generate.arguments import parse; args = parse(sys.argv[1:]);"
        " check_early(args); print([job.prompt for job in read_jobs(args)])"
    )
    for name in ("/dev/stdin", "-"):
        done = subprocess.run(
            [sys.executable, "-c", code, "--prompt_file", name],
            input=f"{FOX}\n{HEN}\n".encode(),
            capture_output=True,
            timeout=60,
        )
        assert done.stdout.decode() == f"{[FOX, HEN]}\n", done.stderr.decode()


def test_a_prompt_from_standard_input(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(b"a caf\xe9\n"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", stream)
    assert read_jobs(parse(["--prompt", "-"]))[0].prompt == "a caf\ufffd"
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(UsageError, match="standard input is closed"):
        read_jobs(parse(["--prompt", "-"]))
