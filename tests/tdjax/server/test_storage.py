"""Files in an object store: whole under their names, in parts, and gone."""

import contextlib
from pathlib import Path

import fsspec
import pytest

from tdjax.errors import UsageError
from tdjax.server import storage
from tdjax.server.storage import Storage


@pytest.fixture
def bucket(tmp_path):
    """A store, and what is in it."""
    fsspec.filesystem("memory").store.clear()
    (tmp_path / "video_a.1.mp4").write_bytes(bytes(range(100)))
    with contextlib.closing(Storage("memory://bucket/of/videos")) as opened:
        opened.put(tmp_path / "video_a.1.mp4")
        yield opened, fsspec.filesystem("memory").store


def test_a_file_has_one_name_and_comes_back(bucket, tmp_path):
    opened, stored = bucket
    assert list(stored) == ["/bucket/of/videos/video_a.1.mp4"]
    assert opened.size("video_a.1.mp4") == 100 and opened.size("video_b.1.mp4") == 0
    opened.fetch("video_a.1.mp4", tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == bytes(range(100))


def test_parts_are_read_a_piece_at_a_time(bucket, monkeypatch):
    monkeypatch.setattr(storage, "CHUNK", 7)
    pieces = list(bucket[0].read("video_a.1.mp4", 3, 20))
    assert b"".join(pieces) == bytes(range(3, 20)) and max(map(len, pieces)) == 7


def test_what_is_half_there_has_no_name(bucket, tmp_path, monkeypatch):
    opened, stored = bucket

    def broken(local, remote):
        stored[remote] = b"half"
        raise OSError("the connection is gone")

    monkeypatch.setattr(opened.fs, "put_file", broken)
    (tmp_path / "video_b.1.mp4").write_bytes(b"video")
    with pytest.raises(OSError, match="gone"):
        opened.put(tmp_path / "video_b.1.mp4")
    assert opened.size("video_b.1.mp4") == 0
    opened.close()
    assert list(stored) == ["/bucket/of/videos/video_a.1.mp4"]


def test_one_file_may_be_published_twice_at_a_time(bucket, tmp_path, monkeypatch):
    opened, stored = bucket
    real = opened.fs.mv

    def slow(part, name):
        monkeypatch.setattr(opened.fs, "mv", real)
        opened.put(tmp_path / "video_a.1.mp4")
        real(part, name)

    monkeypatch.setattr(opened.fs, "mv", slow)
    opened.put(tmp_path / "video_a.1.mp4")
    assert list(stored) == ["/bucket/of/videos/video_a.1.mp4"]


def test_files_are_removed_and_what_cannot_be_is_said(bucket, capsys, monkeypatch):
    opened, stored = bucket
    opened.remove(["video_none.1.mp4", "video_a.1.mp4"])
    opened.close()
    assert not stored and not capsys.readouterr().err
    with contextlib.closing(Storage("memory://bucket")) as other:
        monkeypatch.setattr(other.fs, "rm_file", lambda name: 1 / 0)
        other.remove(["video_a.1.mp4"])
    assert "video_a.1.mp4 cannot be removed from memory://bucket" in capsys.readouterr().err


def test_a_folder_is_written_into_as_it_is(tmp_path):
    for given in (str(tmp_path), f"file://{tmp_path}", tmp_path.as_uri()):
        assert storage.opened(given) == tmp_path
    assert storage.opened("~/x") == Path.home() / "x"
    with pytest.raises(UsageError, match="nowhere://bucket cannot be opened"):
        storage.opened("nowhere://bucket")
