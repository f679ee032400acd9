"""Videos with their captions, as people keep them."""

import json

import pytest

from tdjax.errors import UsageError
from tdjax.train.encode.items import read_items


@pytest.fixture
def folder(tmp_path):
    """Four videos, one of them in a folder, and an image."""
    place = tmp_path / "clips"
    (place / "more").mkdir(parents=True)
    for name in ("b.mp4", "a.MOV", "more/c.webm", "d.png", "notes.md", ".hidden.mp4"):
        (place / name).touch()
    return place


def pairs(items):
    return {item.name: item.text for item in items}


def test_text_beside_the_videos(folder):
    (folder / "a.txt").write_bytes("\ufeffa fox,\r\nrunning\n".encode())
    (folder / "more/c.txt").write_text("a hen")
    (folder / "d.txt").write_text("  \n")
    items = read_items(folder, None)
    assert pairs(items) == {
        "a.MOV": "a fox, running",
        "b.mp4": None,
        "d.png": None,
        "more/c.webm": "a hen",
    }
    assert [item.name for item in items] == sorted(pairs(items))
    assert [item.is_image for item in items] == [False, False, True, False]


def test_a_caption_that_is_not_utf8_is_the_trouble_of_one(folder):
    (folder / "a.txt").write_bytes("caf\xe9".encode("cp1252"))
    (folder / "b.txt").write_text("a hen")
    by_name = {item.name: item for item in read_items(folder, None)}
    assert by_name["a.MOV"].text is None and "not UTF-8 (byte 0xe9)" in by_name["a.MOV"].trouble
    assert by_name["b.mp4"].text == "a hen" and not by_name["b.mp4"].trouble


TABLES = {
    "commas.csv": 'path,text\na.MOV,"a fox, red"\nmore/c.webm,a hen\n',
    "semicolons.csv": "file_name;caption\na.MOV;a fox, red\nmore/c.webm;a hen\n",
    "tabs.tsv": "video\tprompt\tscore\na.MOV\ta fox, red\t3\n./more/c.webm\ta hen\t4\n",
    "lines.jsonl": "\n".join(
        json.dumps({"Path": name, "Text": text, "score": 1.5})
        for name, text in (("a.MOV", "a fox, red"), ("c.webm", "a hen"))
    ),
    "stems.csv": 'path,text\na,"a fox, red"\nmore/c,a hen\n',
}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_tables_of_captions(folder, tmp_path, name, encoding):
    (tmp_path / name).write_bytes(TABLES[name].encode(encoding))
    found = pairs(read_items(folder, tmp_path / name))
    assert found == {"a.MOV": "a fox, red", "b.mp4": None, "d.png": None, "more/c.webm": "a hen"}


def test_a_table_of_videos(folder):
    (folder / "t.csv").write_text("path,text\nmore/c.webm,a hen\na.MOV,\nnone.mp4,a cat\n")
    items = read_items(folder / "t.csv", None)
    assert [(i.path, i.text) for i in items] == [
        (folder / "more/c.webm", "a hen"),
        (folder / "a.MOV", None),
        (folder / "none.mp4", "a cat"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("t.csv", "file;prompt2\na.MOV;x\n", "row 1 has no"),
        ("t.csv", "path\na.MOV\n", "row 1 has no text"),
        ("t.jsonl", '{"path": 3, "text": "x"}', "path is 3"),
        ("t.jsonl", '{"path": "a.MOV", "text": [1]}', "text is"),
        ("t.jsonl", "[]", "row 1 has no path"),
        ("t.csv", 'path,text\na.MOV,"x\n', "cannot be read"),
        ("t.csv", b"path,text\na.MOV,caf\xe9\n", "not UTF-8"),
        ("t.csv", "path,text\n", "holds no rows"),
        ("t.xlsx", "", "suffix '.xlsx'"),
        ("t.csv", "path,text\n,x\n", "has no path"),
    ],
)
def test_tables_that_are_refused(folder, name, content, words):
    file = folder / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError, match=words) as error:
        read_items(file, None)
    assert len(str(error.value).splitlines()) == 3


def test_folders_that_are_refused(folder, tmp_path):
    (tmp_path / "other.csv").write_text("path,text\nz.mp4,x\n")
    with pytest.raises(UsageError, match="names none of the videos"):
        read_items(folder, tmp_path / "other.csv")
    with pytest.raises(UsageError, match="clips"):
        read_items(tmp_path / "clip", None)
    with pytest.raises(UsageError, match="does not exist"):
        read_items(folder, tmp_path / "othe.csv")
    with pytest.raises(UsageError, match="leave `captions` away"):
        read_items(tmp_path / "other.csv", tmp_path / "other.csv")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="has no videos"):
        read_items(tmp_path / "empty", None)
