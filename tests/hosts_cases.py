"""Commands started as two processes that work together, with two fake devices each; and one process
with more."""

import contextlib
import os
import socket

from compiling import QUICK
from conftest import SCRIPTS
from forked import Forked

COMMAND = """
import importlib, sys
from tdjax import cli
from tdjax.parallel import hosts
name, hosts.LOST_SECONDS, *words = sys.argv[1], int(sys.argv[2]), *sys.argv[3:]
cli.run(lambda: importlib.import_module(f"{name}.__main__").main(words))
"""


def start(module, cache, *words, lost=60):
    """Two processes of `python -m MODULE WORDS`. lost: seconds of silence after which a process is
    taken for lost."""
    port = free_port()
    together = ["--coordinator", f"localhost:{port}", "--processes", "2", "--process_id"]
    line = ["-c", COMMAND, module, str(lost), *map(str, words), *together]
    return [started([*line, str(i)], cache) for i in range(2)]


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def started(words, cache, devices=2):
    """One process of `python WORDS`."""
    env = os.environ | {
        "XLA_FLAGS": " ".join([f"--xla_force_host_platform_device_count={devices}", *QUICK]),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
        "JAX_PLATFORMS": "cpu",
        "JAX_SHARE_BINARY_BETWEEN_HOSTS": "true",
        "JAX_SHARE_BINARY_BETWEEN_HOSTS_TIMEOUT_MS": "120000",
        "JAX_TRACEBACK_IN_LOCATIONS_LIMIT": "0",
        "TDJAX_CACHE": str(cache),
        **SCRIPTS,
    }
    return Forked([*map(str, words)], env)


@contextlib.contextmanager
def command(module, cache):
    """start(words) -> two processes of `python -m MODULE`, which are gone afterwards."""
    started = []

    def run(*words, **options):
        processes = start(module, cache, *words, **options)
        started.extend(processes)
        return processes

    yield run
    for process in started:
        process.kill()
        process.communicate()


def ends(processes):
    """[(code, stdout, stderr)] of both."""
    out = [process.communicate(timeout=900) for process in processes]
    return [(p.returncode, *texts) for p, texts in zip(processes, out, strict=True)]


def output(script, cache, *words, devices):
    """What a script prints that runs by itself, over so many devices."""
    process = started([script, *words], cache, devices)
    out, err = process.communicate(timeout=900)
    assert process.returncode == 0, err
    return out


def printed(stdout):
    """The paths that a command printed; gloo says there, from several threads, who is connected."""
    return [line for line in stdout.splitlines() if line.startswith("/")]
