"""The student and its teacher: opened by their files' keys, checked against each other, loaded when
a run begins."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tdjax.checkpoints import orbax
from tdjax.checkpoints.locate import locate
from tdjax.checkpoints.orbax import DENSE_DROPS
from tdjax.config import DiTConfig
from tdjax.errors import CheckpointError, UsageError
from tdjax.models.wan_dit import DiT
from tdjax.parallel.sharding import TRAINING_RULES
from tdjax.pipeline.components import Component, open_component
from tdjax.precision import Policy
from tdjax.train.configs import EXPERTS, ModelConfig
from tdjax.train.placement import created


class Networks:
    """The student and its teacher, opened without data: components, or None where there are no
    weights.

    Raises UsageError where a method other than "flow" has no weights, and CheckpointError for
    networks that cannot be teacher and student.
    """

    def __init__(self, model: ModelConfig, method: str):
        self.teacher = self.student = None
        stored = model.dit
        if model.weights:
            self.teacher = _opened(model.weights, model)
            self.student = _opened(model.student or model.weights, model)
            stored = self.student.stored
            _check_teacher(self.teacher.stored, stored, method)
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
        """Returns the student as shapes."""
        return orbax.abstract("dit", self.config)

    def abstract_teacher(self):
        """Returns the teacher as shapes, or None."""
        return None if self.teacher is None else orbax.abstract("dit", self.teacher.config)

    def load_teacher(self, mesh: Mesh | None):
        """Returns the teacher with its weights over the mesh, or None."""
        if self.teacher is None:
            return None
        self.teacher.mesh, self.teacher.rules = mesh, TRAINING_RULES
        return self.teacher.load()

    def load_student(self, mesh: Mesh | None, seed: int):
        """Returns the student with float32 weights: the file's, with a sparse projection that
        begins at zero; or random ones."""
        if self.student is None:
            create = lambda key: DiT(self.config, rngs=nnx.Rngs(key))
            return created(create, jax.random.key(seed), mesh=mesh)
        has_projection = self.student.stored.attention != "dense"
        attention = self.config.attention if has_projection else "dense"
        self.student.config = dataclasses.replace(self.config, attention=attention)
        self.student.mesh, self.student.rules = mesh, TRAINING_RULES
        module = self.student.load()
        self.student.module = None  # the state has its own copy: this one may go
        if self.student.config == self.config:
            return module
        wanted = self.abstract()
        leaves = orbax.named_leaves(module)
        whole = None if mesh is None else NamedSharding(mesh, PartitionSpec())
        begun = {
            name: jnp.zeros(x.shape, x.dtype, device=whole)
            for name, x in orbax.named_leaves(wanted).items()
            if name not in leaves and DENSE_DROPS in name
        }
        return orbax.assemble(wanted, leaves | begun)


def trained(stored: DiTConfig, model: ModelConfig) -> DiTConfig:
    """Returns the network that is trained: float32 weights, the attention that the run is about."""
    policy = Policy(param="float32", compute=model.compute)
    return dataclasses.replace(stored, attention=model.attention, sla=model.sla, policy=policy)


def frozen(stored: DiTConfig, model: ModelConfig) -> DiTConfig:
    """Returns a teacher: as it is stored, in the compute dtype."""
    return dataclasses.replace(stored, policy=Policy(param=model.compute, compute=model.compute))


def _opened(name: str, model: ModelConfig) -> Component:
    """The transformer of a model, known by its keys; what is not here is downloaded."""
    located = locate(name, offline=model.offline, parts=("dit",))
    chosen = 0
    if len(located.dit) != 1:
        if not model.expert:
            raise UsageError(
                f"{name} has two transformers",
                "each expert is a network of its own, and is trained by itself",
                f"give model.expert=high or low, or one file: {located.dit[0]}",
            )
        chosen = EXPERTS.index(model.expert)
    component = open_component(located.dit[chosen], "dit")
    if component.stored.linear != "float":
        raise CheckpointError(
            f"{component.path} holds {component.stored.linear} weights",
            "training moves weights by less than their steps",
            "give the unquantised file",
        )
    return component


def _check_teacher(teacher: DiTConfig, student: DiTConfig, method: str) -> None:
    """Raises CheckpointError unless the two are the same network up to its attention."""
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
