"""Processes of `python WORDS` that begin with jax and tdjax imported, which is 1.4 seconds of each
start: a server that has imported them, and done nothing else, forks one for every command."""

import functools
import gc
import multiprocessing
import os
import runpy
import sys
import tempfile
from multiprocessing import forkserver
from unittest import mock

from jax._src import cache_key

IMPORTED = [
    "tdjax.generate.__main__",
    "tdjax.generate.together",
    "tdjax.pipeline.load",
    "tdjax.pipeline.pipeline",
    "tdjax.train.__main__",
    "tdjax.train.run",
]

OBJECTS = 50_000  # new ones after which Python looks for cycles


class Forked:
    """Such a process, with the methods of subprocess.Popen that tests use."""

    def __init__(self, words, env):
        self._said = [tempfile.NamedTemporaryFile() for _ in range(2)]  # noqa: SIM115 - see `communicate`
        names = [file.name for file in self._said]
        context = server(frozenset(jax_variables(env).items()))
        self._process = context.Process(target=_run, args=(words, dict(env), *names))
        self._process.start()
        self._texts = None

    def poll(self):
        """None while it runs, then its exit code, negative that of the signal which ended it."""
        return self._process.exitcode

    returncode = property(poll)

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self._process.pid, number)

    def kill(self):
        if self.poll() is None:
            self._process.kill()

    def communicate(self, timeout=None):
        """(stdout, stderr), once it has ended."""
        self._process.join(timeout)
        if self.poll() is None:
            raise TimeoutError(f"it still runs after {timeout} s")
        if self._texts is None:
            self._texts = tuple(file.read().decode(errors="replace") for file in self._said)
            for file in self._said:
                file.close()
        return self._texts


def jax_variables(env):
    """Those which jax reads where it is imported: they are the server's, and the same for all."""
    return {name: value for name, value in env.items() if name.startswith("JAX_")}


@functools.cache
def server(variables):
    """The context of processes of the server, which is started with these variables."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    with mock.patch.dict(os.environ, dict(variables)):
        forkserver.ensure_running()
    return context


def stop():
    """Ends the server, if there is one, whose processes count as this one's children then."""
    forkserver._forkserver._stop()


def _run(words, env, out, err):
    """What `python WORDS` does, in an environment, with files for what it says."""
    assert jax_variables(env) == jax_variables(os.environ), "the server has other variables of jax"
    for name, number in ((out, 1), (err, 2)):
        file = os.open(name, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(env)
    # A program has one key in all processes of a run, as on GPUs: one compiles it. Without this the
    # key says which devices are this process's own.
    cache_key._hash_accelerator_config = cache_key._hash_devices
    gc.freeze()  # what is imported stays
    gc.set_threshold(OBJECTS)
    if words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")
