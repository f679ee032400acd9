"""Compiled programs on disk, as executables: a process that finds one neither traces nor lowers
nor compiles it. They lie in the folder of JAX's own cache, and are there where that one is on.

An entry is found by all that its program depends on. What cannot be told in words (a function that
is not of this package, say) is not kept: a wrong program would be worse than a slow start.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib
import os
import pickle
import platform
import re
import secrets
import sys
import time
import types
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from jax.experimental import serialize_executable
from jax.sharding import Mesh, NamedSharding

from tdjax.checkpoints.compiled import WORTH_KEEPING
from tdjax.errors import UsageError
from tdjax.files import trim, written

FORMAT = 2
SUFFIX, MARK = ".executable", ".passed"  # of entries, and of what is remembered
LIMIT = 2**32  # bytes of all entries
# The backend of kernels for Hopper: as it is imported it says where its library is, which programs
# with such kernels ask for when they are loaded.
MOSAIC = "jax.experimental.mosaic.gpu"
DIGEST = 32  # bytes of a sha256, with which an entry begins

# What programs are made of: rooms of this package, all of the kernels, and libraries.
ROOMS = ("models", "sampling", "parallel", "pipeline", "config")
FILES = ("precision.py", "presets.py")
LIBRARIES = ("jax", "jaxlib", "flax", "numpy", "ml_dtypes", "einops")
OWN = ("tdjax", "pallas_kernels")
# Modules whose functions are traced, by the beginnings of their names.
TRACED = re.compile(
    r"(pallas_kernels|tdjax\.(models|sampling|parallel)"
    r"|tdjax\.pipeline\.(compilation|denoising|preview|streaming))\b"
)

# On a mesh, what is exchanged travels while other layers run, and between GPUs of one host by their
# copy engines: a step of 1.3B on two H200 took 96.6 ms without, 93.0 with both. Kernels between two
# exchanges are few, and go into a graph all the same: 92.2 to 91.0 ms, with blocks taken by number.
MESH_OPTIONS = {
    "xla_gpu_enable_latency_hiding_scheduler": True,
    "xla_gpu_use_memcpy_local_p2p": True,
    "xla_gpu_graph_min_graph_size": 2,
}

MANY = 1000  # entries of a table that is looked through

# What a source says at the left margin: values of names, functions and classes, and names that it
# gives to what comes from elsewhere.
_VALUE = re.compile(r"^(\w+)(?:: [^=\n]+)? = (.*?)(?=^[^\s)\]}]|\Z)", re.MULTILINE | re.DOTALL)
_DEFINED = re.compile(r"^(?:def|class) (\w+)", re.MULTILINE)
_RENAMED = re.compile(r"\bas (\w+)")
# Variables that compilers read, but for those that JAX itself sets as it lowers Mosaic kernels, and
# when memory is taken.
_VARIABLES = re.compile(
    r"(XLA|LIBTPU|TRITON|CUDNN|NVIDIA|TF)_(?!PYTHON_CLIENT_PREALLOCATE$)"
    r"|MOSAIC_(?!GPU_(CUDA_ROOT|RUNTIME_LIB_PATH|NVSHMEM_\w+)$)"
)
_ELSEWHERE = re.compile("jax_(compilation_cache|persistent_cache|log|traceback)")  # not in programs
_NAMELESS = re.compile(r" at 0x|\.\.\.")  # an object without a text, or a text that was cut
_CHANGING = re.compile("(cpu MHz|bogomips)", re.IGNORECASE)


class _Unnamed(Exception):
    """Something has no text that stands for it in every process."""


@dataclasses.dataclass(frozen=True, eq=False)
class Asked:
    """A program as it is asked for: a function, its arguments (arrays or shapes), its static
    arguments, which arguments are donated, where results lie, and the mesh around it."""

    function: Callable
    args: tuple
    static: dict[str, Any]
    donate: tuple[int, ...] = ()
    out_shardings: Any = None
    mesh: Mesh | None = None

    @property
    def devices(self) -> list[jax.Device]:
        return [jax.local_devices()[0]] if self.mesh is None else list(self.mesh.devices.flat)

    def compile(self, **options: Any) -> jax.stages.Compiled:
        """Returns the executable, made by JAX. options: of XLA, beside those of a mesh."""
        # Of the function itself, not of a closure: jax then has what another pipeline of this
        # process has made.
        jitted = jax.jit(
            self.function,
            static_argnames=tuple(self.static),
            donate_argnums=self.donate,
            out_shardings=self.out_shardings,
        )
        options = options if self.mesh is None else MESH_OPTIONS | options
        given = {"compiler_options": options} if options else {}
        with contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh):
            return jitted.lower(*self.args, **self.static).compile(**given)


def made(asked: Asked) -> jax.stages.Compiled:
    """Returns the executable of a program: from disk, or compiled, and then kept there."""
    path = _path(asked)
    if path is None:
        return asked.compile()
    found = _read(path, asked)
    if found is not None:
        return found
    began = time.time()
    apart = asked.devices[0].platform == "cpu"
    compiled = asked.compile(**_apart() if apart else {})
    if time.time() - began >= WORTH_KEEPING:
        _keep(path, asked, compiled)
    if apart:
        _remove_double(path.parent, asked.function.__name__, began)
    return compiled


def folder() -> Path | None:
    """Where entries lie; None where JAX keeps nothing, or not in a folder."""
    place = jax.config.jax_compilation_cache_dir  # pyright: ignore
    on = jax.config.jax_enable_compilation_cache  # pyright: ignore
    if not place or not on or "://" in place or jax.process_count() > 1:
        return None
    return Path(place)


def key_of(*what: Any, devices: Sequence[jax.Device]) -> str | None:
    """Returns a hash of what is asked for, these devices, and all of this process that programs
    depend on; None where something of it cannot be told."""
    sources = _sources()
    try:
        if sources is None or _edited() or any(map(_is_changed, _traced())):
            return None
        text = _text((*what, sources, *_surroundings(devices)))
    except (_Unnamed, OSError):  # or a source has gone
        return None
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def mark_of(what: str, names: Collection[str]) -> Path | None:
    """Returns the file that says that something has passed on a device like the default one, with
    this driver, these versions and sources; None where nothing is kept."""
    place, devices = folder(), jax.local_devices()[:1]
    key = None if place is None else key_of(what, sorted(names), devices=devices)
    return None if place is None or key is None else place / f"{what}-{key}{MARK}"


def remembered(mark: Path | None) -> bool:
    """Whether `remember` was called for the same before."""
    if mark is None:
        return False
    try:
        return mark.read_bytes() == _digest(mark, b"")
    except OSError:
        return False


def remember(mark: Path | None) -> None:
    """Writes a mark, where that is possible."""
    if mark is None:
        return
    with contextlib.suppress(OSError, UsageError), written(mark, overwrite=True) as part:
        part.write_bytes(_digest(mark, b""))


# -- entries ---------------------------------------------------------------------------------------


def _path(asked: Asked) -> Path | None:
    """The entry of a program, or None where it is not kept."""
    place = folder()
    if place is None:
        return None
    leaves, structure = jax.tree.flatten(asked.args)
    if not all(_is_own(kind) for kind in _kinds(structure)):
        return None
    what = (
        *("program", asked.function, asked.static, asked.donate, asked.out_shardings, asked.mesh),
        str(structure),
        [(x.shape, x.dtype, _weak(x), getattr(x, "sharding", None)) for x in leaves],
    )
    key = key_of(*what, devices=asked.devices)
    return None if key is None else place / f"{asked.function.__name__}-{key}{SUFFIX}"


def _read(path: Path, asked: Asked) -> jax.stages.Compiled | None:
    """The executable of an entry; None where it is not there or damaged."""
    try:
        data = path.read_bytes()
        if data[:DIGEST] != _digest(path, data[DIGEST:]):
            return None
        serialized, out_tree, mosaic = pickle.loads(zlib.decompress(data[DIGEST:]))
        if mosaic:
            importlib.import_module(MOSAIC)
        compiled = serialize_executable.deserialize_and_load(
            serialized,
            jax.tree.structure((asked.args, {})),
            out_tree,
            backend=asked.devices[0].client,
            execution_devices=asked.devices,
        )
        with contextlib.suppress(OSError):
            os.utime(path)
    except Exception:  # noqa: BLE001
        # whatever a backend raises: the program is compiled, and replaces it
        return None
    return compiled


def _keep(path: Path, asked: Asked, compiled: jax.stages.Compiled) -> None:
    """Writes an entry; where that is not possible, the next process compiles too."""
    shardings = jax.tree.leaves((compiled.input_shardings, compiled.output_shardings))
    if any(sharding.device_set != set(asked.devices) for sharding in shardings):
        return  # it would not be loaded to where it ran
    try:
        serialized, _, out_tree = serialize_executable.serialize(compiled)
        entry = serialized, out_tree, MOSAIC in sys.modules
        data = zlib.compress(pickle.dumps(entry), level=1)
        with written(path, overwrite=True, size=len(data)) as part:
            part.write_bytes(_digest(path, data) + data)
        trim(path.parent, f"*-{'[0-9a-f]' * 64}{SUFFIX}", LIMIT)
    except Exception:  # noqa: BLE001
        # a backend that cannot, a full disk, a folder of somebody else: none of it stops a run
        return


def _digest(path: Path, data: bytes) -> bytes:
    """Of an entry's content under its own name."""
    return hashlib.sha256(path.name.encode() + data).digest()


def _apart() -> dict[str, Any]:
    """How a program for the CPU is compiled that will be kept: not by JAX's own cache.

    An executable that was read from there cannot be serialised again: what comes out lacks
    functions (jax 0.10.2 and 0.11.2; those of GPUs can). A number that only GPUs heed makes JAX
    look for a program that it cannot have.
    """
    number = secrets.randbelow(2**31)
    return {"xla_gpu_auto_spmd_partitioning_memory_budget_gb": number}


def _remove_double(place: Path, name: str, began: float) -> None:
    """Removes what JAX has kept of a program that is apart, which nobody will ask for."""
    with contextlib.suppress(OSError):
        for path in place.glob(f"jit_{name}-{'[0-9a-f]' * 64}-cache"):
            if path.stat().st_mtime >= began:
                path.unlink()


# -- what an entry depends on ----------------------------------------------------------------------


def _text(value: Any) -> str:
    """The same text for the same value in every process; raises _Unnamed where there is none."""
    if isinstance(value, Mesh):
        return f"{value!r} {value.axis_types} {value.device_ids.tolist()}"
    if isinstance(value, NamedSharding):
        return f"{value!r} {_text(value.mesh)}"
    if isinstance(value, types.FunctionType):
        return _name(value)
    if isinstance(value, dict):
        value = sorted(value.items())
    if isinstance(value, tuple | list):
        return f"({', '.join(map(_text, value))})"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
        return f"{type(value)}{_text(fields)}"
    text = repr(value)
    if _NAMELESS.search(text):
        raise _Unnamed
    return text


def _name(function: types.FunctionType) -> str:
    """Of a function that stands in a module of ours under its name: not of a closure, nor of one
    that was put in its place."""
    module = sys.modules.get(function.__module__)
    name = function.__qualname__
    if not _is_own(function) or getattr(module, name, None) is not function:
        raise _Unnamed
    return f"{function.__module__}.{name}"


def _weak(x: Any) -> bool:
    return bool(getattr(x, "weak_type", False))


def _surroundings(devices: Sequence[jax.Device]) -> Iterator[Any]:
    """Versions, devices and settings."""
    client = devices[0].client
    yield FORMAT, sys.version, _versions()
    yield client.platform, client.platform_version, [(d.id, d.device_kind) for d in devices]
    yield len(client.devices()), _machine(client.platform)
    yield {name: value for name, value in os.environ.items() if _VARIABLES.match(name)}
    yield [argument for argument in sys.argv if argument.startswith("--xla")]
    settings = jax.config.values.copy().items()
    yield {name: str(value) for name, value in settings if not _ELSEWHERE.match(name)}
    yield str(jax.sharding.get_abstract_mesh())


@functools.cache
def _versions() -> tuple[str, ...]:
    """Of libraries, and of what JAX calls for a kind of device."""
    plugins = {entry.dist for entry in metadata.entry_points(group="jax_plugins") if entry.dist}
    return (
        *(f"{name} {metadata.version(name)}" for name in LIBRARIES),
        *sorted(f"{dist.name} {dist.version}" for dist in plugins),
    )


@functools.cache
def _machine(kind: str) -> str:
    """The processor, for which programs of the CPU are made; else the driver."""
    with contextlib.suppress(OSError):
        if kind != "cpu":
            return Path("/proc/driver/nvidia/version").read_text()
        first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
        return "\n".join(line for line in first if not _CHANGING.match(line))
    return str(platform.uname())  # with the name of the machine


def _files() -> list[Path]:
    """The sources of programs."""
    root = Path(__file__).parents[1]
    folders = [root.with_name("pallas_kernels"), *(root / room for room in ROOMS)]
    found = [path for each in folders for path in each.rglob("*.*")]
    found += [root / name for name in FILES]
    return sorted(path for path in found if path.suffix in (".py", ".json"))


@functools.cache
def _sources() -> str | None:
    """A hash of all sources; None where they are not there as files."""
    found = hashlib.sha256()
    try:
        for path in (files := _files()):
            found.update(f"{path} {path.stat().st_size}\n".encode(errors="surrogatepass"))
            found.update(path.read_bytes())
    except OSError:
        return None
    return found.hexdigest() if files else None


def _started() -> float:
    """When this process began; where the system does not say, when this module was imported."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        words = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        since_boot = int(words[19]) / os.sysconf("SC_CLK_TCK")
        return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + since_boot
    return time.time()


_STARTED = _started()


def _edited() -> bool:
    """Whether a source has changed since this process began: it may run the one of before."""
    try:
        facts = [path.stat() for path in _files()]
    except OSError:
        return True
    return any(max(each.st_mtime, each.st_ctime) >= _STARTED for each in facts)


def _is_own(value: Any) -> bool:
    """Whether a class or function comes from this package, or from a library whose version is
    known."""
    root = (getattr(value, "__module__", None) or "").partition(".")[0]
    return root in OWN or root in LIBRARIES or root in sys.stdlib_module_names


def _kinds(structure: Any) -> Iterator[type]:
    """The classes of a pytree's nodes."""
    node = structure.node_data()
    if node is not None:
        yield node[0]
    for child in structure.children():
        yield from _kinds(child)


def _traced() -> list[types.ModuleType]:
    """The modules whose functions are traced, as far as they are imported."""
    # Copies, here and below, are made in one step; other threads import meanwhile.
    return [module for name, module in sys.modules.copy().items() if TRACED.match(name)]


def _is_changed(module: types.ModuleType) -> bool:
    """Whether somebody has put something in place of what is a module's, or among it: functions and
    classes of others, which are nowhere written down, or what is not as its source has it."""
    values = vars(module).copy()
    tables = [v.copy() for v in values.values() if type(v) is dict and len(v) < MANY]
    classes = [value for value in values.values() if isinstance(value, type) and _is_own(value)]
    ours = [dict(vars(each)) for each in classes if each.__module__ == module.__name__]
    code = lambda value: callable(value) and not isinstance(value, staticmethod)  # of NamedTuples
    foreign = lambda value: code(value) and not _is_own(value)
    if any(foreign(value) for each in (values, *tables, *ours) for value in each.values()):
        return True
    said = _said(str(module.__file__))
    return not all(said.of(module.__name__, name, value) for name, value in values.items())


@dataclasses.dataclass(frozen=True)
class _Said:
    """What a source says: constants that it writes out, the names that it defines, and names that
    it gives to what has another."""

    values: dict[str, Any]
    defined: frozenset[str]
    renamed: frozenset[str]

    def of(self, module: str, name: str, value: Any) -> bool:
        """Whether a value is what the source has under a name, as far as it says so."""
        if name in self.values:
            return type(value) is type(self.values[name]) and value == self.values[name]
        if name in self.defined:
            place = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
            return place == (module, name)
        if isinstance(value, type | types.ModuleType) or name in self.renamed:
            return True  # of libraries, whose classes may have other names inside
        return getattr(value, "__name__", name) == name


@functools.cache
def _said(path: str) -> _Said:
    """What a source says. Raises OSError where it is not there."""
    text = Path(path).read_text(encoding="utf-8")
    values, renamed = {}, set(_RENAMED.findall(text))
    for name, written_out in _VALUE.findall(text):
        renamed.add(name)
        with contextlib.suppress(Exception):  # it needs other names: only literals are evaluated
            values[name] = eval(written_out.strip(), {"__builtins__": {}})
    return _Said(values, frozenset(_DEFINED.findall(text)), frozenset(renamed))
