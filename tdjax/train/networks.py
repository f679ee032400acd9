"""The student and its teacher: opened by their files' keys, checked against each other, loaded when
a run begins."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tdjax.checkpoints import demo, orbax
from tdjax.checkpoints.locate import locate
from tdjax.checkpoints.orbax import DENSE_DROPS
from tdjax.config import DiTConfig
from tdjax.errors import CheckpointError, UsageError
from tdjax.models.linear import LINEAR, converted
from tdjax.models.wan_dit import DiT
from tdjax.parallel.sharding import TRAINING_RULES
from tdjax.pipeline.components import Component, open_component
from tdjax.precision import Policy
from tdjax.train import partial
from tdjax.train.configs import EXPERTS, ModelConfig
from tdjax.train.placement import created


class Networks:
    """The student and its teacher, opened without data: components, or None where there are no
    weights.

    train: pattern of the weights that are trained (`OptimizerConfig.train`).
    selection: what is trained of the student, or None for all of it. Its frozen part, `base`, is
    the teacher's where the student begins there.
    Raises UsageError where a method other than "flow" has no weights, and CheckpointError for
    networks that cannot be teacher and student.
    """

    def __init__(self, model: ModelConfig, method: str, train: str | None = None):
        self.teacher = self.student = self.base = None
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
        self.selection = partial.select(self.config, train, model.lora)
        for component in filter(None, (self.teacher, self.student)):
            _check_quantised(component, method, self.selection)
        if self.selection is None and model.frozen != "float" and method == "flow":
            raise UsageError(
                f"model.frozen is {model.frozen!r} and every weight is trained",
                "trained weights are float32",
                "leave it away, or train in part: model.lora=LoRA",
            )
        if self.selection is not None and (method == "flow" or model.student):
            self.base = self._open_base(model)
        if method == "flow":
            self.teacher = None

    def _open_base(self, model: ModelConfig) -> Component:
        """The student's file again, for what is not trained."""
        if self.student is None:
            raise UsageError(
                "model.weights is not given and a part of the network is trained",
                "the rest of it would be random numbers for ever",
                "give model.weights=, or train all weights",
            )
        base = open_component(self.student.path, "dit")
        base.config = dataclasses.replace(
            frozen(base.stored, model), attention=self._stored_attention(), sla=self.config.sla
        )
        return base

    def _stored_attention(self) -> str:
        """The student's attention, as far as its file has weights for it."""
        has_projection = self.student.stored.attention != "dense"
        return self.config.attention if has_projection else "dense"

    def abstract(self):
        """Returns what is trained of the student as shapes."""
        return partial.shapes(self.config, self.selection)

    def abstract_teacher(self):
        """Returns the teacher as shapes, or None."""
        return _as_shapes(self.teacher)

    def abstract_base(self):
        """Returns the student's frozen part as shapes; None where it is the teacher, or nothing."""
        return _as_shapes(self.base)

    def load_teacher(self, mesh: Mesh | None):
        """Returns the teacher with its weights over the mesh, or None."""
        return _loaded(self.teacher, mesh)

    def load_base(self, mesh: Mesh | None):
        """Returns the student's frozen part over the mesh; None where it is the teacher, or
        nothing."""
        return _loaded(self.base, mesh)

    def load_student(self, mesh: Mesh | None, seed: int):
        """Returns the student with float32 weights: the file's, with a sparse projection that
        begins at zero; or random ones. Of one that is trained in part, that part."""
        if self.student is None:
            create = lambda key: DiT(self.config, rngs=nnx.Rngs(key))
            return created(create, jax.random.key(seed), mesh=mesh)
        self.student.config = dataclasses.replace(self.config, attention=self._stored_attention())
        if self.selection is not None:
            shapes = orbax.named_leaves(orbax.abstract("dit", self.config))
            weights = {}
            for name in self.selection.weights:
                stored = self.stored_leaf(name)
                weights[name] = np.zeros(shapes[name].shape, np.float32)
                if stored is not None:
                    weights[name] = stored.astype(np.float32)
            key = jax.random.key(seed)
            return created(self.selection.create, weights, key, mesh=mesh)
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

    def stored_leaf(self, name: str) -> np.ndarray | None:
        """Returns a weight of the student's file on the host, float32; None where it has none."""
        self.student.config = dataclasses.replace(self.config, attention=self._stored_attention())
        if name not in orbax.named_leaves(orbax.abstract("dit", self.student.config)):
            return None
        if name in orbax.named_leaves(orbax.abstract("dit", self.student.as_read)):
            return self.student.leaf(name)
        stem, kind = name.removesuffix(".kernel"), self.student.stored.linear
        stored = tuple(self.student.leaf(f"{stem}.{leaf}") for leaf in LINEAR[kind].leaves)
        return np.asarray(converted(stored, old=kind, new="float", dtype=jnp.float32)[0])


def _as_shapes(component: Component | None):
    if component is None:
        return None
    return partial.weight_only(orbax.abstract("dit", component.config))


def _loaded(component: Component | None, mesh: Mesh | None):
    if component is None:
        return None
    component.mesh, component.rules = mesh, TRAINING_RULES
    return partial.weight_only(component.load())


def trained(stored: DiTConfig, model: ModelConfig) -> DiTConfig:
    """Returns the network that is trained: float32 weights, the attention that the run is about."""
    policy = Policy(param="float32", compute=model.compute)
    own = {"attention": model.attention, "sla": model.sla, "remat": model.remat}
    return dataclasses.replace(stored, **own, linear="float", policy=policy)


def frozen(stored: DiTConfig, model: ModelConfig) -> DiTConfig:
    """Returns a frozen network: as it is stored, in the compute dtype or in 8 bits."""
    policy = Policy(param=model.compute, compute=model.compute)
    return dataclasses.replace(stored, policy=policy, linear=model.frozen)


def _opened(name: str, model: ModelConfig) -> Component:
    """The transformer of a model, known by its keys; what is not here is downloaded."""
    source = demo.folder() if name == "demo" else name
    located = locate(str(source), offline=model.offline, parts=("dit",))
    chosen = 0
    if len(located.dit) != 1:
        if not model.expert:
            raise UsageError(
                f"{name} has two transformers",
                "each expert is a network of its own, and is trained by itself",
                f"give model.expert=high or low, or one file: {located.dit[0]}",
            )
        chosen = EXPERTS.index(model.expert)
    return open_component(located.dit[chosen], "dit")


def _check_quantised(
    component: Component, method: str, selection: partial.Selection | None
) -> None:
    """Raises CheckpointError for 8-bit weights, but as the frozen base of adapters."""
    if component.stored.linear == "float":
        return
    stored = orbax.named_leaves(orbax.abstract("dit", component.stored))
    floats = lambda name: name in stored or DENSE_DROPS in name
    if method != "flow" or selection is None or not all(map(floats, selection.weights)):
        raise CheckpointError(
            f"{component.path} holds {component.stored.linear} weights",
            "training moves weights by less than their steps",
            "give the unquantised file, or train adapters on it: lora-1.3b",
        )


def _check_teacher(teacher: DiTConfig, student: DiTConfig, method: str) -> None:
    """Raises CheckpointError unless the two are the same network up to its attention."""
    if teacher.attention != "dense" and method != "flow":
        raise CheckpointError(
            "the teacher has sparse attention",
            f"{method} imitates a dense network",
            "give dense weights as model.weights",
        )
    same = {"attention": "dense", "sla": teacher.sla, "policy": teacher.policy, "remat": "block"}
    if dataclasses.replace(teacher, **same) != dataclasses.replace(student, **same):
        raise CheckpointError(
            "student and teacher are networks of different sizes",
            f"teacher: {teacher}; student: {student}",
            "give two files of one model",
        )
