"""The persistent cache of programs: on by default, also where jax has compiled before."""

import errno
import os
import subprocess
import sys
import zlib

import jax
import pytest

from tdjax.checkpoints import compiled
from tdjax.checkpoints.compiled import keep_programs


def test_what_was_set_for_jax_stays(tmp_path):
    before = jax.config.jax_compilation_cache_dir
    assert before and keep_programs() is None
    assert jax.config.jax_compilation_cache_dir == before


def test_a_folder_that_cannot_be_written_costs_a_line(tmp_path):
    (tmp_path / "file").touch()
    assert "is not writable" in keep_programs(tmp_path / "file" / "x")


LOADS = """
import sys, jax
jax.jit(lambda x: x + 1)(1)  # jax has settled that there is no cache
import tdjax
tdjax.load("demo", compile_cache=eval(sys.argv[1]))
print(jax.config.jax_compilation_cache_dir)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.jit(lambda x: x * 3)(1)
"""


@pytest.mark.slow
@pytest.mark.parametrize("given", ["True", "False", "'own'"])
def test_a_process_keeps_programs_after_load(tmp_path, given, no_compile_cache):
    env = {**os.environ, "TDJAX_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", LOADS, given], env=env, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    folder = {"True": tmp_path / "cache" / "compiled", "'own'": tmp_path / "own"}.get(given)
    if folder is None:
        assert done.stdout == "None\n"
    else:
        assert os.path.samefile(tmp_path / done.stdout.strip(), folder)
        assert any(path.name.endswith("-cache") for path in folder.iterdir())


def path(folder, name):
    """An entry as JAX names them."""
    return folder / f"{name}-{'0f' * 32}-cache"


def entries(folder, **contents):
    for name, data in contents.items():
        path(folder, name).write_bytes(data)


def kept(folder):
    """The entries that stay where the cache is turned on."""
    probe = folder / ".probe"
    probe.touch()
    compiled._remove_damaged(folder, probe)
    return {entry.name.partition("-")[0] for entry in folder.glob("*-cache")}


def test_entries_that_were_cut_are_removed(tmp_path):
    whole = zlib.compress(os.urandom(3000))
    entries(
        tmp_path, empty=b"", whole=whole, cut=whole[:-1], half=whole[:99], other=b"\x28\xb5/\xfd"
    )
    entries(tmp_path, flipped=whole[:50] + bytes([whole[50] ^ 1]) + whole[51:])
    (tmp_path / "mine.txt").touch()
    assert kept(tmp_path) == {"whole", "other"}
    entries(tmp_path, later=b"")
    assert kept(tmp_path) == {"whole", "other"} and (tmp_path / "mine.txt").exists()


def test_an_entry_is_looked_at_once(tmp_path, monkeypatch):
    entries(tmp_path, a=zlib.compress(b"a"))
    os.utime(path(tmp_path, "a"), (1, 1))
    assert kept(tmp_path) == {"a"}
    monkeypatch.setattr(compiled, "_is_whole", lambda entry: pytest.fail("looked at again"))
    assert kept(tmp_path) == {"a"}


def test_a_mark_of_a_clock_that_was_ahead_hides_no_entry(tmp_path):
    entries(tmp_path, a=zlib.compress(b"a"))
    assert kept(tmp_path) == {"a"}
    os.utime(tmp_path / compiled.CHECKED, (4102444800,) * 2)
    entries(tmp_path, cut=b"")
    assert kept(tmp_path) == {"a"}
    entries(tmp_path, cut=b"")
    assert kept(tmp_path) == {"a"}


def test_nothing_else_in_the_folder_is_touched(tmp_path):
    """A user's own folder may be given, or one that holds the caches of other programs."""
    (tmp_path / "xml-cache").write_text("x as zlib begins")
    (tmp_path / "empty-cache").touch()
    path(tmp_path, "folder").mkdir()
    (tmp_path / "mine").touch()
    path(tmp_path, "link").symlink_to("mine")
    before = sorted(tmp_path.iterdir())
    kept(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / compiled.CHECKED])


def test_a_look_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def fail(folder, probe):
        raise PermissionError(errno.EACCES, "no")

    monkeypatch.setattr(compiled, "_remove_damaged", fail)
    assert "is not writable (no)" in keep_programs(tmp_path)
    assert not list(tmp_path.iterdir())
