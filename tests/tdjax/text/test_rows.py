"""Prompts of files as people have them, for every command that reads a set of them."""

import json

import pytest

from tdjax.errors import UsageError
from tdjax.text.rows import read_prompts

PROMPTS = ["a fox; it runs", "é\u2028two lines", "three"]

FILES = {
    "utf-8.csv": '"prompt"\n"a fox; it runs"\n"é\u2028two lines"\nthree\n'.encode(),
    "semicolons.csv": 'n;prompt\n1;"a fox; it runs"\n2;"é\u2028two lines"\n3;three\n'.encode(),
    "tabs.tsv": "prompt\tn\na fox; it runs\t1\né\u2028two lines\t2\nthree\t3\n".encode("utf-16"),
    "mark.json": b"\xef\xbb\xbf" + json.dumps(PROMPTS).encode(),
    "rows.JSONL": "".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS).encode(),
}


@pytest.mark.parametrize("name", FILES)
def test_the_same_prompts_from_every_kind(tmp_path, name):
    (tmp_path / name).write_bytes(FILES[name])
    assert read_prompts(tmp_path / name) == PROMPTS


def test_lines_and_other_columns(tmp_path):
    (tmp_path / "p.txt").write_bytes(b"\xef\xbb\xbf# a comment\r\nOne \xe2\x80\xa8 line\r\n\r\ntwo")
    assert read_prompts(tmp_path / "p.txt") == ["One   line", "two"]
    (tmp_path / "v.json").write_text('[{"prompt_en": "a", "prompt": "b"}, {"prompt_en": "c"}]')
    assert read_prompts(tmp_path / "v.json", ("prompt", "prompt_en")) == ["b", "c"]


@pytest.mark.parametrize(
    ("name", "data", "told"),
    [
        ("p.cvs", b"a", "has the suffix '.cvs'"),
        ("p.csv", b"PK\x03\x04", "cannot be read\nit is a zip archive"),
        ("p.txt", b"caf\xe9", "line 1 is not UTF-8"),
        ("p.txt", b"\n\n", "holds no prompts"),
        ("p.json", b'["a", " "]', "row 2: no prompt"),
        ("p.json", b'[{"text": "a"}]', "row 1: no prompt"),
        ("p.txt", None, "does not exist"),
    ],
)
def test_what_cannot_be_read_is_told_in_three_lines(tmp_path, name, data, told):
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UsageError) as error:
        read_prompts(tmp_path / name)
    assert told in str(error.value) and str(error.value).count("\n") == 2
