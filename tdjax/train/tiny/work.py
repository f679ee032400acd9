"""How a stage of the recipe runs: many steps in one call of the device, a line for each call, and a
state to go on from."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from tdjax.checkpoints import orbax
from tdjax.config import DiTConfig, TextConfig, VAEConfig
from tdjax.errors import NotFinite
from tdjax.progress import Stages
from tdjax.train import checkpoints, placement
from tdjax.train.metrics import Metrics
from tdjax.train.tiny import configs

_SAVE_SECONDS = 120.0
_CLIPS = "clips"  # the axis of a mesh that clips are divided over


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """The networks of a run."""

    vae: VAEConfig = configs.VAE
    text: TextConfig = configs.TEXT
    dit: DiTConfig = configs.DIT
    sla: DiTConfig = configs.DIT_SLA


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A run of the recipe: where, from which seed, until when (of time.monotonic), and what its
    stages do. mesh: of the devices that stages divide their steps and clips over (`by_devices`);
    None: one."""

    folder: Path
    settings: dict[str, Any]
    seed: int = 0
    until: float = math.inf
    sizes: Sizes = Sizes()
    mesh: Mesh | None = None
    stages: Stages = dataclasses.field(default_factory=lambda: Stages(show=False))

    def key(self, purpose: str) -> jax.Array:
        """Returns the random key of one use, the same in whatever order uses come."""
        return jax.random.fold_in(jax.random.key(self.seed), zlib.crc32(purpose.encode()))

    def work(self, name: str) -> Path:
        """Returns where a stage keeps its states and metrics."""
        return self.folder / "work" / name

    def say(self, text: str) -> None:
        """Shows one line."""
        self.stages.note(text)


class OutOfTime(Exception):
    """The run's time is over in the middle of a stage; its state is saved."""


def repeated(step: Callable, chunk: int, mesh: Mesh | None = None) -> Callable:
    """Returns `chunk` times step(state, *data) -> (state, numbers), as one program that takes over
    the state's memory. Over a mesh the state stays as `placement.shardings` lays it."""

    def program(state, *data):
        def one(state, _):
            state, numbers = step(state, *data)
            if mesh is not None:
                lies = placement.shardings(state, mesh)
                state = lax.with_sharding_constraint(state, lies)
            return state, numbers

        return lax.scan(one, state, None, length=chunk)

    return jax.jit(program, donate_argnums=0)


def by_devices(mesh: Mesh | None, function: Callable, whole: tuple, parts: tuple, **static):
    """Returns function(*whole, *parts, **static) of clips that have nothing to do with each other:
    each device of a mesh runs it on its share of every leading axis of `parts`, and its results
    have such an axis too. On one device where there is no mesh, or it does not divide them.

    function: jitted; one object for all calls.
    """
    if mesh is None:
        return function(*whole, *parts, **static)
    if any(len(x) % mesh.size for x in jax.tree.leaves(parts)):
        whole, parts = jax.device_put((whole, parts), mesh.devices.flat[0])
        return function(*whole, *parts, **static)
    flat = Mesh(mesh.devices.ravel(), (_CLIPS,), axis_types=(AxisType.Auto,))
    lies = lambda spec: NamedSharding(flat, spec)
    whole = jax.device_put(whole, lies(PartitionSpec()))
    parts = jax.device_put(parts, lies(PartitionSpec(_CLIPS)))
    return _divided(function, flat, tuple(static.items()))(whole, parts)


@functools.cache
def _divided(function: Callable, mesh: Mesh, static: tuple) -> Callable:
    """function over a mesh of one axis; jax knows a function by its identity."""
    return jax.jit(
        jax.shard_map(
            lambda whole, parts: function(*whole, *parts, **dict(static)),
            mesh=mesh,
            in_specs=(PartitionSpec(), PartitionSpec(_CLIPS)),
            out_specs=PartitionSpec(_CLIPS),
            check_vma=False,
        )
    )


def batch_key(state) -> jax.Array:
    """Returns the key of this step's batch, apart from the keys that the step itself draws from."""
    return jax.random.fold_in(jax.random.fold_in(state.key, 2**31 - 1), state.step)


def train(
    run: Run,
    name: str,
    state,
    program: Callable,
    steps: int,
    chunk: int,
    data=(),
    check: Callable | None = None,
    check_every: int = 0,
    mesh: Mesh | None = None,
):
    """Returns the last state, after all steps of a stage from its last saved state on, if there is
    one; on the first device.

    program(state, *data) -> (state, numbers [chunk]) does a chunk of steps. check(state, step) ->
    numbers, every `check_every` steps and at the end, with the state on the first device; they are
    logged beside the others. mesh: of the program's devices; the data are whole on each. Raises
    OutOfTime, NotFinite.
    """
    folder = run.work(name)
    done = (checkpoints.steps(folder) or [0])[-1]
    first = jax.devices()[0]
    # Where data are bound to a device, so is what comes out; a first state that is not would make a
    # second program of the next call.
    if mesh is None:
        state = jax.device_put(state, first)
    else:
        data = jax.device_put(data, NamedSharding(mesh, PartitionSpec()))
        state = jax.device_put(state, placement.shardings(state, mesh))
    if done:
        state = checkpoints.restore(checkpoints.folder(folder, done), state)
        run.say(f"{name}: going on from step {done}")
    begun = saved = time.monotonic()
    if mesh is not None:
        program = _on_mesh(program, mesh)
    with Metrics(folder, done) as log:
        while done < steps:
            state, numbers = program(state, *data)
            numbers = {key: float(x) for key, x in jax.device_get(_means(numbers)).items()}
            done += chunk
            now = time.monotonic()
            numbers["seconds_per_step"] = (now - begun) / chunk
            begun = now
            log.write(done, numbers)
            run.say(_line(name, done, steps, numbers))
            if not math.isfinite(numbers["loss"]):
                raise NotFinite(
                    f"{name}: the loss is not finite at step {done}",
                    f"logged in {log.path}",
                    "begin again with a lower rate",
                )
            if check and (done >= steps or done // check_every > (done - chunk) // check_every):
                found = check(jax.device_put(state, first), done)
                log.write(done, found)
                run.say(_line(f"{name} check", done, steps, found))
                begun = time.monotonic()
            if done < steps and (now - saved > _SAVE_SECONDS or now > run.until):
                checkpoints.save(folder, done, state, {}, keep=1)
                begun = saved = time.monotonic()
                if now > run.until:
                    raise OutOfTime(
                        f"{name}: stopped at step {done} of {steps}; the same command goes on from"
                        " there"
                    )
    return jax.device_put(state, first)


def _on_mesh(program: Callable, mesh: Mesh) -> Callable:
    """A program whose activations are laid over a mesh."""

    def run(*args):
        with jax.set_mesh(mesh):
            return program(*args)

    return run


@jax.jit
def _means(numbers: dict) -> dict:
    return {name: jnp.mean(value.astype(jnp.float32)) for name, value in numbers.items()}


def _line(name: str, done: int, steps: int, numbers: dict[str, float]) -> str:
    shown = "  ".join(f"{key} {value:.4g}" for key, value in numbers.items())
    return f"{name} {done}/{steps}  {shown}"


def finished(run: Run, name: str) -> bool:
    """Returns whether a stage's result is there."""
    return (run.folder / name / "manifest.json").is_file()


def export(run: Run, name: str, kind: str, module, cfg, **metadata) -> None:
    """Writes a result in our checkpoint layout, weights in bfloat16, complete or not at all.
    metadata: JSON values, kept as its source."""
    cfg = configs.stored(cfg)
    wanted = orbax.named_leaves(orbax.abstract(kind, cfg))
    leaves = {leaf: x.astype(wanted[leaf].dtype) for leaf, x in orbax.named_leaves(module).items()}
    source = {"name": "tdjax tiny recipe", "seed": run.seed, **metadata}
    orbax.save(
        run.folder / name, jax.device_get(leaves), kind=kind, cfg=cfg, source=source, overwrite=True
    )


def forget_states(run: Run, name: str) -> None:
    """Deletes the states of a stage that has its result."""
    checkpoints.delete(run.work(name))


def load(run: Run, name: str, compute: str = "float32", remat: bool = False):
    """Returns a stage's result with float32 weights, that computes in the given dtype."""
    kind, stored = orbax.checked(run.folder / name)
    return orbax.restore(run.folder / name, config=trained(stored, compute, remat))[1]


def trained(cfg, compute: str, remat: bool = False):
    """Returns a network as it is while it trains: float32 weights, and activations kept, memory
    being no concern, unless `remat`."""
    policy = dataclasses.replace(cfg.policy, param="float32", compute=compute)
    cfg = dataclasses.replace(cfg, policy=policy)
    return dataclasses.replace(cfg, remat=remat) if isinstance(cfg, DiTConfig) else cfg
