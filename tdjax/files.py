"""Files and folders that appear complete or not at all, refusals before any work, and names that
come close.

Nothing is removed that tdjax did not write: a file gives way only where the caller was told to
overwrite it, a folder only where `owned` recognises it by what is in it, and no link is followed.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import hashlib
import math
import os
import re
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from tdjax.config.values import shown
from tdjax.errors import UsageError

LONGEST = 200  # characters of a word that is compared with names
WRITING = 60  # seconds, more than a line takes to be written
FULL = 2**20  # bytes: less is free on a disk that a write has just filled
SKEW = 3600  # seconds by which the clocks of machines that share a folder may differ
_OWN = secrets.token_hex(4)  # tells this process from an earlier one with its number
_OS_ERROR = re.compile(r"\[os_error_code='(\d+)'\]")  # as TensorStore says it
_ADDRESS = re.compile("[A-Za-z][A-Za-z0-9+.-]+:/")  # also of a path, which has one slash of two
_PART = re.compile(r"\.tdjax-(?P<host>.+)-(?P<pid>\d+)-[0-9a-f]{8}\.part")


def near(word: str, names: Iterable[str], count: int = 1, cutoff: float = 0.6) -> list[str]:
    """Returns the names that are most like a word, the nearest first; with cutoff 0 there is one
    whenever there are names."""
    text = word if isinstance(word, str) else shown(word)
    return difflib.get_close_matches(text[:LONGEST], list(names), count, cutoff)


def near_files(path: Path) -> str:
    """The names beside a missing file that are most like it, as the last line of an error."""
    names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    found = near(path.name, names, 3)
    return f"in {path.parent} there is: {', '.join(found)}" if found else "check the path"


def refuse_existing(
    path: Path, overwrite: bool, owned: Callable[[Path], bool] | None = None
) -> None:
    """Raises UsageError where `path` exists and may not be replaced: before any work, and again
    when the work is done; OSError where the file system cannot have such a name.

    owned: whether a folder holds what tdjax wrote there and nothing else. Other folders that are
           not empty, and links to folders, are never replaced.
    """
    if str(path) == "-":
        raise UsageError(
            "'-' stands for standard output",
            "files are written whole, under a name",
            "give the name of a file",
        )
    if _ADDRESS.match(str(path)):
        raise UsageError(
            f"{path} is an address",
            "files are written to folders of this machine",
            "give the name of a file, and copy it there",
        )
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return
    if _is_stream(path):
        raise UsageError(
            f"{path} is a device or a pipe",
            "files are written whole, under a name",
            "give the name of a file",
        )
    if not overwrite:
        full = path.is_dir() and any(path.iterdir())
        foreign = full and not (owned is not None and owned(path))
        more = f"for example {path / 'NAME'}" if foreign else "or `overwrite`"
        raise UsageError(
            f"{path} exists", "nothing is overwritten by itself", f"give another name, {more}"
        )
    if not path.is_dir():
        return
    if path.is_symlink():
        raise UsageError(
            f"{path} is a link to a folder",
            "neither a link nor what it leads to is replaced",
            f"give another name, or {path.resolve()} itself",
        )
    names = sorted(p.name for p in path.iterdir())
    if names and not (owned is not None and owned(path)):
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        raise UsageError(
            f"{path} is a folder that holds {', '.join(names[:4])}{more}",
            "only a folder that tdjax wrote, with nothing else in it, is replaced",
            f"give another name, for example {path / 'NAME'}",
        )


def _is_stream(path: Path) -> bool:
    """Whether a name that is there is that of a device, a pipe or an open stream, such as
    /dev/stdout, which leads to a file where output is redirected."""
    if path.is_symlink() and os.readlink(path).startswith("/proc/"):
        return True
    return path.exists() and not path.is_file() and not path.is_dir()


def refuse_unwritable(target: Path) -> None:
    """Raises UsageError where nothing can be written under a name: tried in the nearest folder that
    is there, before any work; nothing of it stays."""
    target = Path(os.path.abspath(target))
    folder = next((p for p in target.parents if os.path.lexists(p)), target)
    try:
        with tempfile.TemporaryDirectory(prefix=".tdjax-", dir=folder):
            pass
    except OSError as error:
        raise UsageError(
            f"{target} cannot be written",
            f"{folder}: {error.strerror or error}",
            "give a path in a folder that can be written",
        ) from error


def refuse_inputs(target: Path, inputs: Iterable[Path]) -> None:
    """Raises UsageError where writing `target` would replace an input or a folder that holds
    one."""
    place = target.resolve()
    for given in inputs:
        source = given.resolve()
        if os.path.lexists(target) and (source == place or place in source.parents):
            where = "is the input" if source == place else f"holds the input {given}"
            raise UsageError(
                f"{target} {where}",
                "an input is not replaced by what is made from it",
                "give another name",
            )


@contextlib.contextmanager
def written(
    target: str | Path,
    overwrite: bool = False,
    owned: Callable[[Path], bool] | None = None,
    size: int = 0,
) -> Iterator[Path]:
    """A path to write to, which becomes `target` when the block ends well and vanishes when it
    does not: `target` is never half there, and on disk before it has its name.

    The path has the target's name, by whose suffix libraries choose a format, in a hidden folder
    beside it. Raises UsageError as `refuse_existing`, OSError where the disk is full.

    size: bytes that will be written, where they are known: without room for them nothing begins.
    """
    refuse_existing(Path(target), overwrite, owned)
    target = Path(os.path.abspath(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(target.parent)
    _check_room(target, size)
    token = secrets.token_hex(4)
    folder = target.with_name(f".tdjax-{socket.gethostname()}-{os.getpid()}-{token}.part")
    folder.mkdir()
    part = folder / target.name
    try:
        with _disk_full(target):
            yield part
            if part.is_file():  # safetensors makes a file that its owner alone can read
                part.chmod(folder.stat().st_mode & 0o666)
            _flush(part)
        refuse_existing(target, overwrite, owned)  # somebody may have come in between
        if not target.is_dir():
            os.replace(part, target)
            return
        replaced = folder / "replaced"  # a folder with files in it cannot be replaced in one step
        os.replace(target, replaced)
        try:
            os.replace(part, target)
        except OSError:
            os.replace(replaced, target)
            raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def claimed(targets: Iterable[Path]) -> Iterator[bool]:
    """Whether these files are this process's to make: False where another one is making any of
    them. They stay so until the block ends, or the process does."""
    held: list[Path] = []
    try:
        yield all(_claim(target, held) for target in targets)
    finally:
        for mark in held:
            mark.unlink(missing_ok=True)


def _claim(target: Path, held: list[Path]) -> bool:
    """Whether a hidden mark beside a target could be made, which is then among those held."""
    target = Path(os.path.abspath(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    name = hashlib.sha256(target.name.encode(errors="surrogatepass")).hexdigest()[:16]
    mark = target.with_name(f".tdjax-{name}.claim")
    if mark in held:
        return True
    if mark.exists() and _abandoned(mark):
        mark.unlink(missing_ok=True)
    try:
        descriptor = os.open(mark, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    held.append(mark)
    with open(descriptor, "w", encoding="utf-8") as file:
        file.write(f"{socket.gethostname()} {os.getpid()} {_OWN}")
    return True


def _abandoned(mark: Path) -> bool:
    """Whether the process of this host that made a mark is gone. A mark that does not say who made
    it is being written, which takes no time, or its process was killed meanwhile."""
    try:
        words = mark.read_text(encoding="utf-8", errors="replace").split()
        since = mark.stat().st_mtime
    except OSError:  # it was removed
        return False
    if len(words) != 3 or not re.fullmatch("[0-9]{1,19}", words[1]):
        return abs(time.time() - since) > WRITING
    host, pid, token = words
    if host != socket.gethostname() or not Path("/proc/self").exists():
        return False  # nothing says here which processes are alive
    if int(pid) == os.getpid():
        return token != _OWN  # one of a process before, which had the same number
    return not Path(f"/proc/{pid}").exists()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds a folder for this process until the block ends, or the process does, on whatever host.

    Raises UsageError, which names the other process, where one holds it already. File systems
    without locks let everybody in.
    """
    if os.name != "posix":
        yield
        return
    import fcntl  # other systems have none

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".tdjax.lock", "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UsageError(
                f"{folder} is in use",
                f"by {file.read(LONGEST).strip() or 'another process'}",
                "wait for it, stop it, or give another folder; processes that are to work together"
                " are told so (docs: Several GPUs)",
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def by_last_use(folder: Path, pattern: str) -> list[tuple[Path, os.stat_result]]:
    """Returns the files of a cache and their facts, the least recently used first: they are touched
    when used. What was used in the future, by a clock that has been put right since, comes before
    all: it would never go otherwise."""
    found = []
    for path in folder.glob(pattern):
        with contextlib.suppress(OSError):  # another process may have removed it
            found.append((path, path.stat()))
    soon = time.time() + SKEW
    used = lambda facts: facts.st_mtime if facts.st_mtime <= soon else -math.inf
    return sorted(found, key=lambda row: (used(row[1]), row[1].st_mtime_ns, row[0].name))


def trim(folder: Path, pattern: str, limit: int) -> None:
    """Removes the least recently used files of a cache until the rest has at most `limit` bytes."""
    entries = by_last_use(folder, pattern)
    size = sum(facts.st_size for _, facts in entries)
    for path, facts in entries:
        if size <= limit:
            break
        path.unlink(missing_ok=True)
        size -= facts.st_size


def write_text(target: Path, text: str) -> None:
    """Writes or replaces a small file in one step."""
    with written(target, overwrite=True) as part:
        part.write_text(text, encoding="utf-8")


def _flush(path: Path) -> None:
    """Waits until a file, or every file of a folder, is on disk: after a crash of the machine a
    name without its content would be taken for a complete file."""
    for file in path.rglob("*") if path.is_dir() else (path,):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _remove_abandoned(folder: Path) -> None:
    """Removes what killed runs on this host left in a folder."""
    if not Path("/proc/self").exists():
        return  # nothing says here which processes are alive
    for part in folder.glob(".tdjax-*.part"):
        match = _PART.fullmatch(part.name)
        here = match is not None and match["host"] == socket.gethostname()
        if here and not Path(f"/proc/{match['pid']}").exists() and not part.is_symlink():
            shutil.rmtree(part, ignore_errors=True)
    for mark in folder.glob(".tdjax-*.claim"):
        if _abandoned(mark):
            mark.unlink(missing_ok=True)


def _check_room(target: Path, size: int) -> None:
    """Raises OSError where `size` bytes are more than the disk, or this user's limit for one file,
    allows."""
    refused = errno.ENOSPC if shutil.disk_usage(target.parent).free < size else 0
    if os.name == "posix":
        import resource  # other systems have none

        limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
        if limit != resource.RLIM_INFINITY and limit < size:
            refused = errno.EFBIG
    if refused:
        raise OSError(refused, os.strerror(refused), str(target))


@contextlib.contextmanager
def _disk_full(target: Path) -> Iterator[None]:
    """Libraries report what the system refuses in many ways, a full disk above all; here it is an
    OSError with its number."""
    try:
        yield
    except Exception as error:
        known = isinstance(error, OSError) and error.errno is not None
        code = _OS_ERROR.search(str(error))
        if not known and code:
            number = int(code[1])
            raise OSError(number, os.strerror(number), str(target)) from error
        if not known and shutil.disk_usage(target.parent).free < FULL:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target)) from error
        raise
