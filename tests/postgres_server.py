"""A PostgreSQL server of its own for tests, in a folder that goes with it."""

import contextlib
import importlib.util
import os
import pwd
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

USER = "postgres"  # the server refuses to run as root


def binaries() -> Path | None:
    """The folder of the server's programs, or None; Debian keeps them beside the PATH."""
    found = shutil.which("initdb")
    folders = [Path(found).resolve().parent] if found else []
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((each for each in folders if (each / "postgres").exists()), None)


def missing() -> str:
    """Why no server can be started here; nothing where one can."""
    if importlib.util.find_spec("psycopg") is None:
        return "psycopg is not installed"
    if binaries() is None:
        return "PostgreSQL's server (initdb, postgres) is not installed"
    if os.getuid() == 0 and USER not in {entry.pw_name for entry in pwd.getpwall()}:
        return f"PostgreSQL does not run as root, and there is no user {USER}"
    return ""


@contextlib.contextmanager
def running():
    """The address of a server's database. It is reached by a socket in its folder, so that servers
    of several test processes are not in each other's way; what is written is not flushed."""
    folder, programs = Path(tempfile.mkdtemp(prefix="pg")), binaries()
    who = {"user": USER, "extra_groups": []} if os.getuid() == 0 else {}
    if who:
        shutil.chown(folder, USER)
    who |= {"cwd": folder, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    data = [str(folder / "data")]
    init = ["--auth=trust", f"--username={USER}", "--no-sync", "--encoding=UTF8", "--locale=C"]
    process = None
    try:
        subprocess.run([programs / "initdb", "-D", *data, *init], check=True, **who)
        settings = ["-k", str(folder), "-c", "listen_addresses=", "-c", "fsync=off"]
        process = subprocess.Popen([programs / "postgres", "-D", *data, *settings], **who)
        ready = [programs / "pg_isready", "-q", "-h", str(folder)]
        end = time.monotonic() + 30
        while subprocess.run(ready).returncode:
            assert process.poll() is None and time.monotonic() < end, "it did not start"
            time.sleep(0.05)
        yield f"postgresql+psycopg://{USER}@/postgres?host={folder}"
    finally:
        if process is not None:
            process.send_signal(2)  # at once, whoever is connected
            process.wait(30)
        shutil.rmtree(folder, ignore_errors=True)
