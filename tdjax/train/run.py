"""A configured run made ready: networks, states, step functions, data; everything checked before
weights are read."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tdjax.checkpoints import orbax
from tdjax.checkpoints.locate import locate
from tdjax.checkpoints.orbax import DENSE_DROPS, Lazy
from tdjax.config import DiTConfig
from tdjax.errors import CheckpointError, UsageError
from tdjax.models.wan_dit import DiT
from tdjax.parallel.mesh import make_mesh, parse_mesh
from tdjax.pipeline.components import Component, open_component
from tdjax.precision import Policy
from tdjax.progress import Stages
from tdjax.train import checkpoints, flow_matching, loop, rcm, sla
from tdjax.train.data import Position, ShardSource, Stream, read_embedding
from tdjax.train.loop import Schedule
from tdjax.train.optimizer import adamw
from tdjax.train.presets import ModelConfig
from tdjax.train.state import Batch, DistillState, Teacher, TrainState

FREE_ON_RESUME = (
    "run.",
    "model.offline",
)  # keys that may change when a run goes on without changing what it computes


# Networks
# ----------------------------------------------------------------------------------------------------------------


class Networks:
    """The student and its teacher, opened without data. teacher and student are Parts, or None."""

    def __init__(self, model: ModelConfig, method: str):
        self.teacher = self.student = None
        stored = model.dit
        if model.weights:
            self.teacher = opened(model.weights, model.offline)
            self.student = (
                opened(model.student, model.offline)
                if model.student
                else opened(model.weights, model.offline)
            )
            stored = self.student.stored
            check_teacher(self.teacher.stored, stored, method)
            self.teacher.config = frozen(self.teacher.stored, model)
        elif method != "flow":
            raise UsageError(
                "model.weights is not given",
                f"{method} starts from a trained network",
                "for example wan2.1-t2v-1.3b",
            )
        self.config: DiTConfig = trained(stored, model)
        if method == "flow":
            self.teacher = None

    def abstract(self):
        """The student as shapes."""
        return orbax.abstract("dit", self.config)

    def abstract_teacher(self):
        return None if self.teacher is None else orbax.abstract("dit", self.teacher.config)

    def load_teacher(self, mesh: Mesh | None):
        if self.teacher is None:
            return None
        self.teacher.mesh = mesh
        return self.teacher.load()

    def load_student(self, mesh: Mesh | None, seed: int):
        """float32 weights of the student: the file's, with a sparse projection that begins at zero;
        or random ones."""
        if self.student is None:
            return loop.made(
                lambda key: DiT(self.config, rngs=nnx.Rngs(key)), jax.random.key(seed), mesh=mesh
            )
        has_projection = self.student.stored.attention != "dense"
        self.student.config = dataclasses.replace(
            self.config, attention=self.config.attention if has_projection else "dense"
        )
        self.student.mesh = mesh
        module, self.student.module = (
            self.student.load(),
            None,
        )  # the state has its own copy: this one may go
        if self.student.config == self.config:
            return module
        wanted, leaves = self.abstract(), orbax.named_leaves(module)
        missing = {
            name: x
            for name, x in orbax.named_leaves(wanted).items()
            if name not in leaves and DENSE_DROPS in name
        }
        whole = None if mesh is None else NamedSharding(mesh, PartitionSpec())
        return orbax.assemble(
            wanted,
            leaves
            | {name: jnp.zeros(x.shape, x.dtype, device=whole) for name, x in missing.items()},
        )


def trained(stored: DiTConfig, model: ModelConfig) -> DiTConfig:
    """The network that is trained: float32 weights, the attention that the run is about."""
    policy = Policy(param="float32", compute=model.compute)
    return dataclasses.replace(stored, attention=model.attention, sla=model.sla, policy=policy)


def frozen(stored: DiTConfig, model: ModelConfig) -> DiTConfig:
    """A teacher: as it is stored, in the compute dtype."""
    return dataclasses.replace(stored, policy=Policy(param=model.compute, compute=model.compute))


def opened(name: str, offline: bool) -> Component:
    """The transformer of a model, known by its keys; what is not here is downloaded."""
    located = locate(name, offline=offline, parts=("dit",))
    if len(located.dit) != 1:
        raise UsageError(
            f"{name} has two transformers",
            "each expert is a network of its own, and is trained by itself",
            f"give one: {located.dit[0]}",
        )
    part = open_component(located.dit[0], "dit")
    if part.stored.linear != "float":
        raise CheckpointError(
            f"{part.path} holds {part.stored.linear} weights",
            "training moves weights by less than their steps",
            "give the unquantised file",
        )
    return part


def check_teacher(teacher: DiTConfig, student: DiTConfig, method: str) -> None:
    """The two must be the same network up to its attention."""
    if teacher.attention != "dense" and method != "flow":
        raise CheckpointError(
            "the teacher has sparse attention",
            f"{method} imitates a dense network",
            "give dense weights as model.weights",
        )
    same = {"attention": "dense", "sla": teacher.sla, "policy": teacher.policy}
    if dataclasses.replace(teacher, **same) != dataclasses.replace(student, **same):
        raise CheckpointError(
            "student and teacher are networks of different sizes",
            f"teacher: {teacher}; student: {student}",
            "give two files of one model",
        )


# States and steps
# --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """steps: {phase: step function}, in the order of `schedule`. create(student) -> state at step
    0."""

    steps: dict[str, loop.Step]
    schedule: Schedule
    create: Any


def method(name: str, config: dict[str, Any]) -> Method:
    """The step functions of a method. config: the objects by the first word of their keys."""
    return {"flow": one_network, "sla": one_network, "rcm": distillation}[name](name, config)


def one_network(name: str, config: dict[str, Any]) -> Method:
    optimizer = adamw(config["optimizer"])
    make = {"flow": flow_matching, "sla": sla}[name].make_step
    create = functools.partial(
        TrainState.create, optimizer=optimizer, key=jax.random.key(config["run"].seed)
    )
    return Method(
        steps={name: make(config["loss"], optimizer)},
        schedule=Schedule(cycle=(name,)),
        create=create,
    )


def distillation(name: str, config: dict[str, Any]) -> Method:
    loss, optimizer, second = config["loss"], adamw(config["optimizer"]), adamw(config["critic"])
    steps = {"student": rcm.make_student_step(loss, optimizer)}
    key = jax.random.key(config["run"].seed)
    if not loss.dmd_weight:
        create = functools.partial(DistillState.create, optimizer=optimizer, key=key)
        return Method(steps=steps, schedule=Schedule(cycle=("student",)), create=create)
    steps["critic"] = rcm.make_critic_step(loss, second)
    schedule = Schedule(cycle=("student", *["critic"] * (loss.frequency - 1)), warmup=loss.warmup)
    create = lambda model: DistillState.create(
        model, optimizer, key, critic=model, critic_optimizer=second
    )
    return Method(steps=steps, schedule=schedule, create=create)


# The run
# -----------------------------------------------------------------------------------------------------------------


class Prepared:
    """All that `loop.train` needs, checked; weights are read by `start`."""

    def __init__(
        self,
        preset: str,
        name: str,
        config: dict[str, Any],
        settings: dict[str, str],
        stages: Stages,
    ):
        self.preset, self.name, self.config, self.settings, self.stages = (
            preset,
            name,
            config,
            settings,
            stages,
        )
        self.folder = Path(config["run"].folder)
        if jax.process_count() > 1:
            raise UsageError(
                f"training was started in {jax.process_count()} processes",
                "checkpoints are written by one",
                "use the devices of one host",
            )
        if config["run"].mesh != "auto":
            parse_mesh(config["run"].mesh)  # a wrong word is told before anything is downloaded
        self.method = method(name, config)
        self.negative = self.open_negative()
        self.networks = Networks(config["model"], name)
        self.mesh = make_mesh(config["run"].mesh, self.networks.config)
        self.stream = self.open_data()
        self.shapes = self.check_steps()

    def open_data(self) -> Stream:
        data, cfg = self.config["data"], self.networks.config
        rows = 1 if self.mesh is None else self.mesh.shape.get("fsdp", 1)
        if data.batch % rows:
            raise UsageError(
                f"data.batch is {data.batch}",
                f"run.mesh divides it over fsdp={rows}",
                f"use a multiple of {rows}",
            )
        source = ShardSource(
            data.path, frames=data.frames, channels=cfg.out_channels, text_dim=cfg.text_dim
        )
        return Stream(source, batch=data.batch, seed=data.seed, mix=data.mix)

    def open_negative(self) -> np.ndarray | None:
        path = self.config["data"].negative
        loss = self.config["loss"]
        if not path and (getattr(loss, "dropout", 0) or getattr(loss, "guidance", 1) > 1):
            raise UsageError(
                "data.negative is not given",
                "guidance and caption dropout need the embedding of the negative prompt",
                "give umT5_wan_negative_emb.pt, or a file of python -m tdjax.generate"
                " --save_prompt_embeds",
            )
        return read_embedding(path) if path else None

    def check_steps(self):
        """Shapes of the state. Every step is traced: whatever does not fit together is found here,
        in seconds."""
        (latents, text, image), b = (
            self.stream.source.read(self.stream.source.entries(0)[0]),
            self.stream.size,
        )
        shape = lambda x: None if x is None else jax.ShapeDtypeStruct((b, *x.shape), x.dtype)
        batch = Batch(latents=shape(latents), text=shape(text), image=shape(image))
        teacher = Teacher(model=self.networks.abstract_teacher(), negative=self.negative)
        try:
            state = jax.eval_shape(self.method.create, self.networks.abstract())
            with self.on_mesh():
                for step in self.method.steps.values():
                    jax.eval_shape(step, state, teacher, batch)
        except ValueError as error:
            if isinstance(error, UsageError):
                raise
            raise UsageError(
                f"model, data and loss do not fit together: {error}",
                f"samples of {self.stream.source.folder}",
            ) from error
        return state

    def on_mesh(self):
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def facts(self) -> dict[str, Any]:
        """For the manifests: what this run is."""
        return {"preset": self.preset, "method": self.name, "settings": self.settings}

    def start(self, resume: bool):
        """(state, teacher, place in the data): at the last checkpoint, or at the beginning."""
        last = checkpoints.latest(self.folder) if resume else None
        where = None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec())
        with self.stages("load teacher") if self.networks.teacher else contextlib.nullcontext():
            negative = None if self.negative is None else jax.device_put(self.negative, where)
            teacher = Teacher(model=self.networks.load_teacher(self.mesh), negative=negative)
        if last is None:
            with self.stages("load student"), self.on_mesh():
                student = self.networks.load_student(self.mesh, self.config["run"].seed)
                return loop.made(self.method.create, student, mesh=self.mesh), teacher, Position()
        manifest = checkpoints.inspect(last)
        position = self.stream.restored(manifest["data"])
        for line in changed(manifest.get("settings", {}), self.settings):
            self.stages.note(line)
        with self.stages(f"load {last.name}"):
            state = checkpoints.restore(last, loop.abstract(self.shapes, self.mesh))
        self.stages.note(f"going on from {last}")
        return state, teacher, position

    def train(self, resume: bool) -> loop.Outcome:
        state, teacher, position = self.start(resume)
        m, run = self.method, self.config["run"]
        try:
            return loop.train(
                state, teacher, m.steps, m.schedule, self.stream, run,
                position=position, mesh=self.mesh, facts=self.facts(), stages=self.stages,
            )  # fmt: skip
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise loop.out_of_memory(self.shapes, self.networks.abstract_teacher()) from error

    def export(self, outcome: loop.Outcome) -> Path:
        """The averaged weights as a checkpoint that every other command takes: <run>/dit, in the
        compute dtype."""
        dtype = self.config["model"].compute
        cfg = dataclasses.replace(self.networks.config, policy=Policy(param=dtype, compute=dtype))
        shapes, leaves = (
            orbax.named_leaves(orbax.abstract("dit", cfg)),
            orbax.named_leaves(outcome.state.ema),
        )
        lazy = lambda x, shape: Lazy(
            tuple(x.shape), np.dtype(shape.dtype), lambda: np.asarray(x.astype(shape.dtype))
        )
        source = {
            "name": f"tdjax train {self.preset}",
            "step": outcome.step,
            "settings": self.settings,
        }
        with self.stages("export"):
            return orbax.save(
                self.folder / "dit",
                {n: lazy(leaves[n], shapes[n]) for n in shapes},
                "dit",
                cfg,
                source=source,
                overwrite=True,
            )


def changed(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """Lines on settings that differ from the checkpoint's: the run goes on with the new ones."""
    return [
        f"{key} was {before.get(key, 'not there')}, is {now.get(key, 'not there')}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not key.startswith(FREE_ON_RESUME)
    ]
