"""Several processes, each with the devices of its host, as one run: how they find each other, and
what they agree on.

Every process runs the same program on the same arguments; arrays lie over the devices of all of
them. What is written is written by the first process, or by all into one folder of a shared file
system.
"""

from __future__ import annotations

import collections
import contextlib
import importlib.util
import os
import re
import secrets
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tdjax.config.values import shown
from tdjax.errors import TdjaxError, UsageError, first_line
from tdjax.files import locked, written
from tdjax.progress import say

CONNECT_SECONDS = 300  # a process waits so long for the others to start
LOST_SECONDS = 60  # without a sign of life of a process, so long, the others end
MOST = 10**5  # processes

# What launchers tell the processes they start: jax's name for the launcher, and the variables of
# the number of processes, of those on this host.
_LAUNCHERS = (
    ("slurm", "SLURM_NTASKS", "SLURM_STEP_TASKS_PER_NODE"),
    ("ompi", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("mpi4py", "PMI_SIZE", "MPI_LOCALNRANKS"),
    ("k8s", "JOB_COMPLETION_INDEX", ""),
)
T = TypeVar("T")

_SLURM_STEP = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")


class OtherProcessError(TdjaxError):
    """What ended another process of the run ends this one. told: that one says why, and all end
    together, with its exit code."""

    exit_code = 1
    told = False


# -- finding each other ----------------------------------------------------------------------------


def check(coordinator: str | None, processes: int | None, process_id: int | None) -> None:
    """Raises UsageError unless all three are given, or none, and they fit together."""
    given = {"coordinator": coordinator, "processes": processes, "process_id": process_id}
    missing = [name for name, value in given.items() if value in (None, "")]
    if len(missing) == len(given):
        return
    if missing:
        there = next(name for name in given if name not in missing)
        raise UsageError(
            f"`{there}` is given without " + " and ".join(f"`{name}`" for name in missing),
            "`coordinator` is HOST:PORT of the first process, `processes` how many there are,"
            " `process_id` the number of this one, from 0",
            "give all three, or none where SLURM, Open MPI or a Kubernetes Job starts the"
            " processes",
        )
    if not re.fullmatch(r"(\[[0-9a-fA-F:]+\]|[^\s:/]+):[0-9]{1,5}", str(coordinator)):
        raise UsageError(
            f"`coordinator` is {shown(str(coordinator))}",
            "it is HOST:PORT, where the first process listens and all others reach it",
            "for example node001:12345",
        )
    if not 1 <= processes <= MOST:
        raise UsageError(
            f"`processes` is {processes}",
            "it is the number of processes that are started together",
            "give one for each host, or one for each device",
        )
    if not 0 <= process_id < processes:
        raise UsageError(
            f"`process_id` is {process_id}",
            f"with {processes} processes it is 0 to {processes - 1}, another one in each",
            "number the processes from 0",
        )


def launcher() -> str | None:
    """Returns jax's name of what started several processes of which this is one: "slurm", "ompi",
    "mpi4py" or "k8s"; None where it is alone.

    The shell of an allocation is alone: only what `srun` starts has the variables of a step.
    """
    for name, count, _ in _LAUNCHERS:
        value = os.environ.get(count, "")
        if name == "k8s":
            if value and "KUBERNETES_SERVICE_HOST" in os.environ and _installed("kubernetes"):
                return name
        elif value.isdigit() and int(value) > 1:
            if name == "slurm" and not all(key in os.environ for key in _SLURM_STEP):
                continue
            if name == "ompi" and "OMPI_MCA_orte_hnp_uri" not in os.environ:
                name = "mpi4py"  # Open MPI 5 says less than jax reads
            if name == "mpi4py" and not _installed("mpi4py"):
                raise UsageError(
                    f"MPI started {value} processes and mpi4py is not installed",
                    "by it they find each other",
                    "install mpi4py, or give `coordinator`, `processes` and `process_id`",
                )
            return name
    return None


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def join(
    coordinator: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
    seconds: int = CONNECT_SECONDS,
) -> int:
    """Makes this process one of a run of several, before anything of jax runs; returns how many
    there are. Without arguments the launcher says who they are, and a process that none started is
    alone.

    coordinator: HOST:PORT of the first process. seconds: how long it is waited for.
    Raises UsageError for arguments that do not fit together, and where the others are not reached.
    """
    check(coordinator, processes, process_id)
    method, devices = "deactivate", None
    if not coordinator:
        method = launcher()
        if method is None:
            return 1
        if _one_on_this_host(method):
            devices = []  # all of the host: jax would take the first alone
    # A signal is answered by the command, which asks the other processes.
    jax.config.update("jax_enable_preemption_service", False)
    what = "the processes did not find each other"
    if coordinator:
        what = f"`coordinator` {coordinator} was not reached by all processes"
    fix = (
        "start all processes together, with the same `coordinator` and `processes`, each with its"
        " own `process_id`; the port must be open, and free on the first host"
    )
    try:
        with _ends_after(seconds, UsageError(what, f"it was waited for {seconds} s", fix)):
            jax.distributed.initialize(
                coordinator or None,
                processes,
                process_id,
                local_device_ids=devices,
                cluster_detection_method=method,
                initialization_timeout=seconds + 60,
                heartbeat_timeout_seconds=LOST_SECONDS,
            )
    except (RuntimeError, ValueError, OSError) as error:
        raise UsageError(what, first_line(error), fix) from error
    return jax.process_count()


@contextlib.contextmanager
def _ends_after(seconds: int, error: TdjaxError) -> Iterator[None]:
    """Ends the process with an error unless the block ends before: jax itself would abort it, with
    a trace of its native code."""

    def end() -> None:
        say(f"error: {error}")
        os._exit(error.exit_code)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _one_on_this_host(method: str) -> bool:
    variable = next(here for name, _, here in _LAUNCHERS if name == method)
    return re.fullmatch(r"1(\(x\d+\))?", os.environ.get(variable, "")) is not None


def leave() -> None:
    """Ends this process's part in good order: it waits for the others to come to their end. A
    process that goes without it is taken for lost, and the others end."""
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()


@contextlib.contextmanager
def lost() -> Iterator[None]:
    """Within the block, what jax raises where another process has gone becomes an
    OtherProcessError; alone, nothing changes. Where jax notices by itself, after LOST_SECONDS
    without a sign of life, it ends the process."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        raise OtherProcessError(
            "an exchange with the other processes of this run failed",
            first_line(error),
            "what the process that ended first wrote says why; start all again, with --resume where"
            " checkpoints are to be gone on from",
        ) from error


# -- agreeing --------------------------------------------------------------------------------------


def first() -> bool:
    """Returns whether this is the process that writes and speaks for all."""
    return jax.process_index() == 0


def agreed(make: Callable[[], str]) -> str:
    """Returns make() of the first process in every one. What it raises there is raised there, and
    OtherProcessError in the others."""
    if jax.process_count() == 1:
        return make()
    failure, told = None, b""
    if first():
        try:
            told = make().encode(errors="surrogateescape")
        except BaseException as error:
            failure = error
    given = len(told) if failure is None else -_code(failure)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(given)))
    if failure is not None:
        raise failure
    if size < 0:
        raise _told("the first process", -size)
    data = np.zeros(size, np.uint8)
    if first():
        data[:] = np.frombuffer(told, np.uint8)
    return bytes(of_first(data)).decode(errors="surrogateescape")


def every(make: Callable[[], T]) -> T:
    """Returns make() of this process, once all have come so far. Where it raises in some, the
    lowest of these raises what it has, and all others OtherProcessError. It must not wait for other
    processes by itself; alone it may be what starts the device."""
    if not jax.distributed.is_initialized() or jax.process_count() == 1:
        return make()
    failure, code = None, 0
    try:
        made = make()
    except BaseException as error:
        failure, code = error, _code(error)
    codes = gathered(np.int32(code))
    failed = np.flatnonzero(codes)
    if failure is not None and failed[0] == jax.process_index():
        raise failure
    if failed.size:
        number = int(failed[0])
        raise _told(f"process {number}" if number else "the first process", int(codes[number]))
    return made


def share_compile_cache() -> str | None:
    """Turns JAX's cache of compiled programs off unless all processes see the folder of the first;
    returns a line for the user where it does. Only the first writes there, and a compiler of GPUs
    waits for what the others have measured: not all have something to compile where caches differ.
    """
    if jax.process_count() == 1:
        return None
    place = jax.config.jax_compilation_cache_dir  # pyright: ignore
    told = agreed(lambda: _marked(place))
    here = bool(place and told) and (Path(place) / told).exists()
    shared = gathered(np.uint8(here)).all()
    if first() and told:
        (Path(place) / told).unlink(missing_ok=True)
    if shared or not gathered(np.uint8(bool(place))).any():
        return None
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    return (
        f"compile cache {place} is not one folder of all processes: going on without;"
        " `compile_cache` chooses another"
    )


def _marked(folder: str | None) -> str:
    """The name of a file that is made in a folder; empty where none can be."""
    if not folder:
        return ""
    name = f".probe-{secrets.token_hex(4)}"
    try:
        (Path(folder) / name).touch()
    except OSError:
        return ""
    return name


def of_first(array: np.ndarray) -> np.ndarray:
    """Returns an array of the first process, which has one of this shape and dtype in every one,
    bit by bit."""
    if jax.process_count() == 1 or not array.size:
        return array
    bits = np.ascontiguousarray(array).view(np.uint8)
    told = np.asarray(multihost_utils.broadcast_one_to_all(bits))
    return told.astype(np.uint8, copy=False).view(array.dtype).reshape(array.shape)


def gathered(array: np.ndarray) -> np.ndarray:
    """Returns [processes ...], an array of each, in every one."""
    return np.asarray(multihost_utils.process_allgather(array))


def _code(error: BaseException) -> int:
    """The exit code of a command that an error ends."""
    if isinstance(error, TdjaxError):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return 130
    return UsageError.exit_code if isinstance(error, OSError) else 1


def _told(who: str, code: int) -> OtherProcessError:
    error = OtherProcessError(
        f"{who} could not go on",
        "what it writes there says why",
        "start all processes again when that is mended",
    )
    error.exit_code, error.told = code, True
    return error


@contextlib.contextmanager
def written_by_all(
    target: str | Path,
    overwrite: bool = False,
    owned: Callable[[Path], bool] | None = None,
    size: int = 0,
) -> Iterator[Path]:
    """A path that every process writes to, which the first one then gives the target's name;
    arguments and errors as those of `tdjax.files.written`. The block ends when all are done."""
    if jax.process_count() == 1:
        with written(target, overwrite, owned, size) as part:
            yield part
        return
    with contextlib.ExitStack() as stack:
        enter = lambda: str(stack.enter_context(written(target, overwrite, owned, size)))
        yield Path(agreed(enter))
        multihost_utils.sync_global_devices("written")
        agreed(lambda: stack.close() or "done")


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """A folder for the processes of this run alone, as `tdjax.files.locked`."""
    with contextlib.ExitStack() as stack:
        agreed(lambda: stack.enter_context(locked(folder)) or "held")
        yield


def apart(mesh: Mesh | None) -> bool:
    """Returns whether the devices of a mesh are those of several processes. Raises UsageError where
    they are those of some processes and not of all."""
    if mesh is None or not mesh.is_multi_process:
        return False
    there = {device.process_index for device in mesh.devices.flat}
    if len(there) < jax.process_count():
        raise UsageError(
            f"`mesh` has devices of {len(there)} of {jax.process_count()} processes",
            "it has those of one process, or of all",
            f"for example sp={len(jax.devices())}, which are all",
        )
    return True


def whole(array: jax.Array | np.ndarray) -> np.ndarray:
    """Returns an array that lies over the devices of all processes, on each of their hosts; one of
    the host as it is."""
    here = not isinstance(array, jax.Array) or array.is_fully_addressable
    if here or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def place(x, sharding: jax.sharding.Sharding) -> jax.Array:
    """Returns an array, which every process has alike, where `sharding` says: each process gives
    its devices what they hold. One that lies over all of them already is laid out anew."""
    if sharding.is_fully_addressable:
        return jax.device_put(x, sharding)
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        same = x.sharding.is_equivalent_to(sharding, x.ndim)
        return x if same else jax.jit(_same, out_shardings=sharding)(x)
    if jax.dtypes.issubdtype(getattr(x, "dtype", np.float32), jax.dtypes.prng_key):
        bits = place(jax.random.key_data(x), sharding)
        return jax.random.wrap_key_data(bits, impl=jax.random.key_impl(x))
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: np.asarray(x[index]))


def _same(x):
    return x


class Poll:
    """A question that every process answers in every step, and the greatest answer, which all of
    them learn in the same step: `lag` steps later, so that no host waits for the device."""

    def __init__(self, mesh: Mesh | None):
        self.lag = 0 if jax.process_count() == 1 else 2
        if self.lag:
            assert mesh is not None, "several processes always have a mesh"
            self._lies = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
            self._greatest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
            self._asked: collections.deque[jax.Array] = collections.deque()

    def greatest(self, answer: int, *, wait: bool = False) -> int:
        """Takes this process's answer, which is at least 0. Returns the greatest one of `lag` calls
        before, 0 where there was none yet; with `wait` that of this call."""
        if not self.lag:
            return answer
        count = self._lies.num_devices
        one = lambda _: np.full(1, answer, np.int32)
        answers = jax.make_array_from_callback((count,), self._lies, one)
        self._asked.append(self._greatest(answers))
        if wait:
            return int(self._asked[-1])
        return int(self._asked.popleft()) if len(self._asked) > self.lag else 0
