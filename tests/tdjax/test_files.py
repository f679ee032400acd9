"""Files appear complete or not at all, and nothing is removed that tdjax did not write."""

import errno
import os
import shutil
import socket
from pathlib import Path

import pytest

from tdjax import files
from tdjax.errors import UsageError
from tdjax.files import near, near_files, refuse_existing, refuse_inputs, write_text, written


def yes(folder):
    return True


def test_the_name_appears_with_the_content(tmp_path):
    target = tmp_path / "deep" / "fox.mp4"
    with written(target) as part:
        assert part.name == target.name and not target.exists()
        part.write_bytes(b"fox")
    assert target.read_bytes() == b"fox" and os.listdir(target.parent) == ["fox.mp4"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_others_may_read_what_they_may_of_any_new_file(tmp_path, umask, mode):
    """Also of a library that makes files for their owner alone, as safetensors 0.8 does."""
    before = os.umask(umask)
    try:
        with written(tmp_path / "fox") as part:
            os.close(os.open(part, os.O_CREAT | os.O_WRONLY, 0o600))
    finally:
        os.umask(before)
    assert (tmp_path / "fox").stat().st_mode & 0o777 == mode


@pytest.mark.parametrize("name", ["s3://b/v.mp4", "gs://b/v.mp4", "file:///v.mp4", "hf://a/b"])
def test_addresses_are_no_names_of_files(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="is an address"), written(name):
        pass
    assert not os.listdir(tmp_path)
    for name in ("a:b.mp4", "c/s3:/v.mp4"):
        refuse_existing(Path(name), overwrite=False)


def test_a_folder_appears_with_the_content(tmp_path):
    with written(tmp_path / "x") as part:
        (part / "deep").mkdir(parents=True)
        (part / "deep" / "a").write_text("a")
    assert (tmp_path / "x" / "deep" / "a").read_text() == "a" and os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, SystemExit])
def test_what_fails_leaves_what_was_there(tmp_path, error):
    (tmp_path / "old").write_text("old")
    for name, options in (("new", {}), ("old", {"overwrite": True})):
        with pytest.raises(error), written(tmp_path / name, **options) as part:
            part.write_text("half")
            raise error
    assert os.listdir(tmp_path) == ["old"] and (tmp_path / "old").read_text() == "old"


def test_what_exists_is_refused(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "folder", "link"):
        with pytest.raises(UsageError, match="exists.*\n.*\n.*`overwrite`"):
            refuse_existing(tmp_path / name, overwrite=False)
        with pytest.raises(UsageError), written(tmp_path / name):
            pytest.fail("the block ran")
    refuse_existing(tmp_path / "absent", overwrite=False)
    refuse_existing(tmp_path / "file" / "below", overwrite=False)


def test_a_file_that_appears_meanwhile_is_not_replaced(tmp_path):
    with pytest.raises(UsageError, match="exists"), written(tmp_path / "x") as part:
        part.write_text("mine")
        (tmp_path / "x").write_text("theirs")
    assert (tmp_path / "x").read_text() == "theirs" and os.listdir(tmp_path) == ["x"]


def test_only_folders_that_are_recognised_are_replaced(tmp_path):
    folder = tmp_path / "keep"
    folder.mkdir()
    (folder / "thesis.tex").write_text("mine")
    for owned in (None, lambda found: found != folder):
        with pytest.raises(UsageError, match="thesis.tex(.|\n)*keep/NAME"):
            refuse_existing(folder, overwrite=True, owned=owned)
        with pytest.raises(UsageError), written(folder, overwrite=True, owned=owned):
            pytest.fail("the block ran")
    assert (folder / "thesis.tex").read_text() == "mine"
    with written(folder, overwrite=True, owned=yes) as part:
        part.mkdir()
        (part / "new").touch()
    assert os.listdir(folder) == ["new"] and os.listdir(tmp_path) == ["keep"]


def test_an_empty_folder_may_be_filled(tmp_path):
    (tmp_path / "x").mkdir()
    with written(tmp_path / "x", overwrite=True) as part:
        part.mkdir()
        (part / "new").touch()
    assert os.listdir(tmp_path / "x") == ["new"]


def test_links_are_not_followed(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "kept").touch()
    (tmp_path / "link").symlink_to(tmp_path / "far")
    with pytest.raises(UsageError, match="is a link to a folder(.|\n)*far itself"):
        refuse_existing(tmp_path / "link", overwrite=True, owned=yes)
    (tmp_path / "file").write_text("kept")
    (tmp_path / "short").symlink_to(tmp_path / "file")
    write_text(tmp_path / "short", "new")
    assert (tmp_path / "file").read_text() == "kept" and (tmp_path / "short").read_text() == "new"
    assert os.listdir(tmp_path / "far") == ["kept"]


def test_inputs_are_not_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("model/dit/manifest.json", "a.safetensors", "other/x"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    Path("link").symlink_to("model")
    for target, given in (
        ("model", "model/dit"),
        ("model", "model/dit/manifest.json"),
        ("model", str(tmp_path / "model" / "dit")),
        ("model", "link/dit"),
        ("link", "model/dit"),
        ("model", "other/../model/dit"),
        ("model/dit", "model/dit"),
        ("a.safetensors", "./a.safetensors"),
        (".", "model"),
    ):
        with pytest.raises(UsageError, match="an input is not replaced"):
            refuse_inputs(Path(target), [Path("other/x"), Path(given)])
    for target in ("model/new", "new", "other"):
        refuse_inputs(Path(target), [Path("model"), Path("a.safetensors")])


def test_what_killed_runs_left_is_removed(tmp_path):
    host = socket.gethostname()
    gone = [f".tdjax-{host}-999999999-0123abcd.part"]
    kept = [
        f".tdjax-{host}-{os.getppid()}-0123abcd.part",
        ".tdjax-elsewhere-999999999-0123abcd.part",
        f".tdjax-{host}-999999999-0123abcd.part.old",
        ".tdjax-notes.part",
        ".fox.part",
    ]
    for name in gone + kept:
        (tmp_path / name / "params").mkdir(parents=True)
    link = f".tdjax-{host}-999999998-0123abcd.part"
    (tmp_path / link).symlink_to(tmp_path / kept[0])
    write_text(tmp_path / "x", "x")
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, link, "x"])


@pytest.mark.parametrize("error", [ValueError("2 written"), RuntimeError("os error 28"), OSError()])
def test_a_full_disk_is_told_whatever_the_library_says(tmp_path, monkeypatch, error):
    def fail():
        with written(tmp_path / "x") as part:
            part.write_text("half")
            raise error

    with pytest.raises(type(error)) as raised:
        fail()
    assert raised.value is error
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 0))
    with pytest.raises(OSError, match="No space left") as raised:
        fail()
    assert raised.value.errno == errno.ENOSPC and not os.listdir(tmp_path)


def test_a_name_that_is_too_long_is_found_before_the_work(tmp_path):
    with pytest.raises(OSError, match="too long"):
        refuse_existing(tmp_path / ("n" * 256), overwrite=False)
    name = "n" * 251 + ".mp4"  # the longest name can be written
    write_text(tmp_path / name, "x")
    assert os.listdir(tmp_path) == [name]


def test_content_is_on_disk_before_the_name(tmp_path, monkeypatch):
    synced = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_ino) or real(fd))
    with written(tmp_path / "x") as part:
        part.mkdir()
        for name in "ab":
            (part / name).write_text(name)
    write_text(tmp_path / "c", "c")
    assert set(synced) == {(tmp_path / name).stat().st_ino for name in ("x/a", "x/b", "c")}


def test_names_that_come_close(tmp_path):
    assert near("sd", ["sde", "ode", "sdxl", "euler"], 2) == ["sde", "sdxl"]
    assert near("x", ["sde"]) == [] and near("x", ["sde"], cutoff=0) == ["sde"]
    assert near("x", []) == []
    (tmp_path / "photo.jpg").touch()
    assert near_files(tmp_path / "phot.jpg") == f"in {tmp_path} there is: photo.jpg"
    assert near_files(tmp_path / "none" / "x") == "check the path"


def test_a_folder_is_locked_for_one_process(tmp_path):
    """Another process, here another opening of the same lock, is told who has it."""
    with files.locked(tmp_path / "run"):
        with pytest.raises(UsageError) as error, files.locked(tmp_path / "run"):
            pass
        what, why, _ = str(error.value).splitlines()
        assert what == f"{tmp_path / 'run'} is in use"
        assert why == f"by process {os.getpid()} on {socket.gethostname()}"
    with files.locked(tmp_path / "run"):
        pass


YEARS = {"1970": 1, "2100": 4102444800}


@pytest.mark.parametrize("year", YEARS)
@pytest.mark.parametrize(
    "said", [b"", b"host", b"\xff\xfe", b"host x y", b"a " + b"9" * 20 + b" b"]
)
def test_a_claim_that_nobody_finished_is_no_claim(tmp_path, year, said):
    """Its process was killed between the name and the content."""
    target = tmp_path / "fox.mp4"
    with files.claimed([target]) as mine:
        assert mine
        (mark,) = tmp_path.glob(".tdjax-*.claim")
        mark.write_bytes(said)
        with files.claimed([target]) as other:
            assert not other, "it is being written"
        os.utime(mark, (YEARS[year],) * 2)
        with files.claimed([target]) as other:
            assert other
    assert not list(tmp_path.iterdir())


def test_a_folder_of_other_things_is_not_offered_for_replacement(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UsageError, match="exists\n.*\n.*/NAME") as error:
        refuse_existing(tmp_path, overwrite=False, owned=lambda path: False)
    assert "overwrite`" not in str(error.value)
    with pytest.raises(UsageError, match="`overwrite`"):
        refuse_existing(tmp_path, overwrite=False, owned=lambda path: True)


@pytest.mark.parametrize("overwrite", [False, True])
def test_devices_and_pipes_are_no_files(tmp_path, overwrite):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "out").symlink_to("/dev/null")
    (tmp_path / "redirected").touch()
    with open(tmp_path / "redirected") as file:
        (tmp_path / "stream").symlink_to(f"/proc/self/fd/{file.fileno()}")
        with pytest.raises(UsageError, match="is a device or a pipe"):
            refuse_existing(tmp_path / "stream", overwrite)
    for path in (tmp_path / "pipe", tmp_path / "out", Path("/dev/null")):
        with pytest.raises(UsageError, match="is a device or a pipe"), written(path, overwrite):
            pytest.fail("the block ran")
    assert (tmp_path / "out").is_symlink() and Path("/dev/null").is_char_device()
    with pytest.raises(UsageError, match="standard output"):
        refuse_existing(Path("-"), overwrite)
