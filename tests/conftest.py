"""Strict numerics for every test: no implicit dtype promotion, true float32 products, four fake CPU
devices."""

import os

from compiling import LONG, QUICK

FLAGS = ["--xla_force_host_platform_device_count=4", LONG, *QUICK]
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS])

import ctypes  # noqa: E402
import gc  # noqa: E402
import itertools  # noqa: E402
import json  # noqa: E402
import signal  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402

import forked  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

from tdjax.checkpoints.compiled import WORTH_KEEPING, keep_programs  # noqa: E402
from tdjax.files import trim  # noqa: E402

# Bytecode is kept, also that of processes that tests start, where the environment asks for none:
# it is half of the time of collecting, and a sixth of each command's start.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_traceback_in_locations_limit", 0)  # programs are not debugged here

# Where the tests run in the background their commands would not hear of Ctrl-C.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

GROWN = 3 * 2**27  # bytes more of a worker for which the programs of finished modules are dropped
DROPPED = pytest.StashKey[int]()  # bytes of a worker when that was done, or begun
KEPT = 2**30  # bytes of compiled programs that lie there from earlier sessions

# Small checkpoints under published names, and folders of small models.
pytest_plugins = ("published_fixtures", "model_fixtures")

REPOSITORY = Path(__file__).resolve().parent.parent
# Of a script that lies in this folder, where Python would look first and find tests/tdjax.
SCRIPTS = {"PYTHONPATH": f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'tests'}"}
GOLDEN = (Path(__file__).parent / "golden", REPOSITORY.parent / "shared" / "golden")
MANIFESTS = (Path(__file__).parent / "manifests", REPOSITORY.parent / "shared" / "manifests")


def find(name, folders):
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    pytest.skip(f"{name} is too large for the repository and not beside it")


class Golden:
    """One file of golden vectors: `g["in/x"]` is an array, `g.config` the JSON, `g.weights()` the
    state dict."""

    def __init__(self, path):
        self.path = path
        with np.load(path) as z:
            self.arrays = {k: z[k] for k in z.files}
        self.config = (
            json.loads(bytes(self.arrays.pop("config"))) if "config" in self.arrays else {}
        )

    def __getitem__(self, key):
        return self.arrays[key]

    def __contains__(self, key):
        return key in self.arrays

    def keys(self, prefix=""):
        return [k for k in self.arrays if k.startswith(prefix)]

    def weights(self, prefix="w/"):
        return {k[len(prefix) :]: v for k, v in self.arrays.items() if k.startswith(prefix)}


@pytest.fixture(scope="session")
def golden():
    """golden(name) -> Golden, from tests/golden or the shared folder beside the checkout."""
    cache = {}

    def load(name):
        if name not in cache:
            cache[name] = Golden(find(f"{name}.npz", GOLDEN))
        return cache[name]

    return load


@pytest.fixture(scope="session")
def manifest():
    """manifest(name) -> the parsed JSON of a published checkpoint's key list."""
    return lambda name: json.loads(find(f"{name}.json", MANIFESTS).read_text())


@pytest.fixture(scope="session", autouse=True)
def compile_cache(pytestconfig, tmp_path_factory):
    """Programs compiled once, whichever test asks first, in this process or one that it starts, in
    this session or an earlier one. `pytest --cache-clear` drops them."""
    if pytestconfig.pluginmanager.hasplugin("cacheprovider"):
        folder = pytestconfig.cache.mkdir("compiled")
    else:
        folder = tmp_path_factory.mktemp("compiled")
    trim(folder, "*-*", KEPT)
    assert keep_programs(folder) is None
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = str(WORTH_KEEPING)


@pytest.fixture(scope="session", autouse=True)
def forked_processes():
    """None outlives the session."""
    yield
    forked.stop()


@pytest.fixture
def no_compile_cache(monkeypatch):
    """Processes of a test find no program that another test has compiled."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")


@pytest.fixture(scope="session", autouse=True)
def no_executables():
    """None are read from disk, but where a test asks for that: what a test has put in the place of
    a constant would be missing in them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tdjax.pipeline.executables.folder", lambda: None)
        yield


@pytest.fixture(scope="module", autouse=True)
def module_of_programs(request):
    """Programs of a module are compiled in little time, and run in more: most run once. Modules
    marked `optimized`, which run theirs for long, have them at the level of `LONG`.

    Afterwards none is kept where a worker has grown since the last time: compiled programs are most
    of what it holds. This fixture is set up before any other of its module, and so comes last, when
    their values are gone."""
    quick = request.node.get_closest_marker("optimized") is None
    jax.config.update("jax_disable_most_optimizations", quick)
    yield
    if sys.platform == "linux" and resident_bytes() < request.config.stash[DROPPED] + GROWN:
        return
    jax.clear_caches()
    gc.collect()
    request.config.stash[DROPPED] = resident_bytes()


def resident_bytes() -> int:
    """Memory that this process needs (Linux; 0 elsewhere): what was freed is given back before, as
    the allocator otherwise keeps up to half a gigabyte of it."""
    if sys.platform != "linux":
        return 0
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(scope="session", autouse=True)
def cache_folder_of_the_session(tmp_path_factory):
    """Nor does what a fixture of a module or the session opens."""
    os.environ["TDJAX_CACHE"] = str(tmp_path_factory.mktemp("tdjax"))


@pytest.fixture(scope="session")
def cache_folders(tmp_path_factory):
    """Paths where nothing lies yet. pytest would make a folder for each, and look through all those
    before to number it."""
    parent = tmp_path_factory.mktemp("caches")
    return (parent / str(number) for number in itertools.count())


@pytest.fixture(autouse=True)
def own_cache_folder(cache_folders, monkeypatch):
    """No test sees what another one, or the user, has left in tdjax's cache folder."""
    monkeypatch.setenv("TDJAX_CACHE", str(next(cache_folders)))


@pytest.fixture
def key():
    return jax.random.key(0)


def pytest_collection_finish(session):
    """Python's search for cycles passes over what is there by now, modules and tests, and is made
    less often: a tenth of the suite's time."""
    session.config.stash[DROPPED] = resident_bytes()
    gc.collect()
    gc.freeze()
    gc.set_threshold(forked.OBJECTS)


def pytest_collection_modifyitems(items):
    if any(d.platform == "gpu" for d in jax.devices()):
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
