"""A configured run: networks, step functions and data, everything checked before weights are read;
then training, and the export of what it gave."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from tdjax.checkpoints import orbax
from tdjax.checkpoints.orbax import Lazy
from tdjax.config import DiTConfig
from tdjax.errors import UsageError
from tdjax.models.wan_dit import HOST_MEMORY
from tdjax.parallel import hosts
from tdjax.parallel.mesh import every_device, make_mesh
from tdjax.precision import Policy
from tdjax.progress import GIB, Stages
from tdjax.train import checkpoints, cost, loop, page, placement, plan, report
from tdjax.train.configs import SCM
from tdjax.train.methods import method
from tdjax.train.networks import Networks
from tdjax.train.partial import Trained, save_lora
from tdjax.train.samples import Samples
from tdjax.train.sources import ShardSource, read_embedding
from tdjax.train.state import Batch, Teacher
from tdjax.train.stream import Position, Stream, rows_here
from tdjax.train.turns import TEACHER, without

# Keys that may change when a run goes on without changing what it computes.
_FREE_ON_RESUME = ("run.", "sample.", "model.offline", "loss.offload")


class TrainingRun:
    """All that `loop.train` needs, checked; weights are read by `start`.

    name: of the method. config: the objects by the first word of their keys. settings: the same as
    {dotted key: value}, for the manifests.
    Raises UsageError, CheckpointError or DataError for whatever does not fit together.
    """

    def __init__(
        self,
        preset: str,
        name: str,
        config: dict[str, Any],
        settings: dict[str, str],
        stages: Stages,
    ):
        self.preset = preset
        self.name = name
        self.config = dict(config)
        self.settings = settings
        self.stages = stages
        self.folder = Path(config["run"].folder)
        self.exported: int | None = None  # the step of the network in the folder
        mesh = config["run"].mesh
        if mesh == "auto":
            mesh = every_device("fsdp")
        else:
            plan.axes_of(mesh)  # a wrong word is told before anything is downloaded
        self.negative = self._open_negative()
        self.networks = Networks(config["model"], name, self._trained_weights())
        _check_tangent(config["loss"], self.networks.config)
        _check_host_memory(config)
        self.mesh = make_mesh(mesh, self.networks.config)
        self.stream = self._open_data()
        self.config["loss"] = plan.with_parts(config["loss"], self._parts())
        self.method = method(name, self.config)
        self.shapes = self._check_steps()
        self.config["run"] = plan.bounded(self.config["run"], plan.whole_bytes(self.shapes))
        self.samples = self._open_samples()

    def _trained_weights(self) -> str | None:
        """The pattern of the weights that are trained: one for the student and its critic."""
        train = self.config["optimizer"].train
        critic = self.config.get("critic")
        if critic is not None and critic.train not in (None, train):
            raise UsageError(
                f"critic.train is {critic.train!r} and optimizer.train {train!r}",
                "the critic is trained in the same part as the student",
                "give optimizer.train alone",
            )
        return train

    def _open_data(self) -> Stream:
        data, cfg = self.config["data"], self.networks.config
        plan.check_batch(data.batch, self._groups())
        source = ShardSource(
            data.path,
            frames=data.frames,
            channels=cfg.out_channels,
            text_dim=cfg.text_dim,
            condition=cfg.condition_channels,
            features=cfg.image_dim,
            blank=data.grid if getattr(self.config["loss"], "consistency", True) is None else None,
            cache=self.folder / "shards" / str(jax.process_index()),
            keep=4 * data.mix + 8,
        )
        return Stream(
            source,
            batch=data.batch,
            seed=data.seed,
            mix=data.mix,
            max_skipped=data.max_skipped,
            note=self.stages.note,
            rows=rows_here(data.batch, self.mesh),
        )

    def _groups(self) -> int:
        return plan.groups({} if self.mesh is None else dict(self.mesh.shape))

    def _parts(self) -> int:
        data = self.config["data"]
        return plan.accumulate(data.batch, self._groups(), data.per_device)

    def _open_negative(self) -> np.ndarray | None:
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

    def _open_samples(self) -> Samples | None:
        """The prompts that are sampled as the run goes on, encoded."""
        if not self.config["sample"].prompts:
            return None
        with self.stages("encode prompts"):
            return Samples(
                self.name,
                self.config,
                self.networks.config,
                self._grid(),
                negative=self.negative,
                mesh=self.mesh,
                groups=self._groups(),
                stages=self.stages,
            )

    def _grid(self) -> tuple[int, int, int]:
        """(t, h, w) of the latents of the first data."""
        source = self.stream.source
        unit = next(iter(source.firsts.values()))
        frames, h, w, _ = source.read(source.first(unit))[0].shape
        return frames, h, w

    def _check_steps(self):
        """Shapes of the state. Every step is traced: whatever does not fit together is found here,
        in seconds. Under a mesh, shapes say that they lie on it: only then is what was traced there
        for the program."""
        source = self.stream.source
        batched = lambda x: jax.ShapeDtypeStruct((self.stream.size, *x.shape), x.dtype)
        samples = [source.read(source.first(unit)) for unit in source.firsts.values()]
        batches = [Batch(*jax.tree.map(batched, sample)) for sample in samples]
        teacher = Teacher(
            model=self.networks.abstract_teacher(),
            negative=self.negative,
            base=self.networks.abstract_base(),
        )
        try:
            state = jax.eval_shape(self.method.create, self.networks.abstract())
            with self._on_mesh():
                for (phase, step), batch in itertools.product(self.method.steps.items(), batches):
                    used = without(self._unused().get(phase, ()), state, teacher)
                    jax.eval_shape(step, *placement.abstract((*used, batch), self.mesh))
        except UsageError:
            raise
        except ValueError as error:
            raise UsageError(
                f"model, data and loss do not fit together: {error}",
                f"samples of {self.stream.source.folder}",
                "give shards that were made for this network, or the sizes of theirs",
            ) from error
        return state

    def _on_mesh(self):
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def start(self, resume: bool):
        """Returns (state, teacher, place in the data): at the last checkpoint, or at the
        beginning."""
        found = hosts.agreed(lambda: str(checkpoints.latest(self.folder) or "")) if resume else ""
        last = Path(found) if found else None
        read = self.networks.teacher or self.networks.base
        with self.stages("load teacher") if read else contextlib.nullcontext():
            negative = self.negative
            if self.mesh is not None and negative is not None:
                negative = hosts.place(negative, NamedSharding(self.mesh, PartitionSpec()))
            teacher = Teacher(
                model=self.networks.load_teacher(self.mesh),
                negative=negative,
                base=self.networks.load_base(self.mesh),
            )
        if last is None:
            with self.stages("load student"):
                student = self.networks.load_student(self.mesh, self.config["run"].seed)
            with self._on_mesh():
                state = placement.created(self.method.create, student, mesh=self.mesh)
            return state, teacher, Position()
        manifest = checkpoints.inspect(last)
        position = self.stream.restored(manifest["data"])
        for line in _changed(manifest.get("settings", {}), self.settings):
            self.stages.note(line)
        with self.stages(f"load {last.name}"):
            state = checkpoints.restore(last, placement.abstract(self.shapes, self.mesh))
        self.stages.note(f"going on from {last}")
        return state, teacher, position

    def train(self, resume: bool) -> loop.Outcome:
        """Runs from the last checkpoint where `resume` says so and there is one, else from the
        beginning. Raises what `loop.train` does, OutOfMemory, and UsageError where the disk has no
        room for what the run will leave."""
        hosts.agreed(lambda: self._check_room() or "there is room")
        state, teacher, position = self.start(resume)
        try:
            return loop.train(
                state,
                teacher,
                self.method.steps,
                self.method.schedule,
                self.stream,
                self.config["run"],
                position=position,
                mesh=self.mesh,
                metadata={
                    "preset": self.preset,
                    "method": self.name,
                    "settings": self.settings,
                },
                stages=self.stages,
                work=self._work(),
                on_save=self._refresh,
                samples=self.samples,
                unused=self._unused(),
            )
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            frozen = self.networks.abstract_teacher(), self.networks.abstract_base()
            raise loop.out_of_memory(self.shapes, frozen) from error

    def _unused(self) -> dict[str, tuple[str, ...]]:
        """What waits on the host while a phase runs: never a teacher that is the base of networks
        which are trained in part."""
        is_base = self.networks.selection is not None and self.networks.base is None
        return {
            phase: tuple(name for name in names if not (name == TEACHER and is_base))
            for phase, names in self.method.unused.items()
        }

    def _check_room(self) -> None:
        size = plan.whole_bytes(self.shapes)
        there = size * len(checkpoints.steps(self.folder))
        exported = plan.whole_bytes(orbax.abstract("dit", self._exported()))
        needed = plan.room(self.config["run"], size, exported) - there
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise UsageError(
                f"run.folder: {self.folder} has {free / GIB:.1f} GiB free",
                f"the run's checkpoints, {size / GIB:.1f} GiB each, and its weights will take"
                f" {needed / GIB:.1f}",
                "give another folder, or fewer checkpoints: run.keep=1",
            )

    def _exported(self) -> DiTConfig:
        """The network of the result, in the compute dtype."""
        dtype = self.config["model"].compute
        return dataclasses.replace(self.networks.config, policy=Policy(param=dtype, compute=dtype))

    def _work(self) -> report.Work:
        """What the report says of speed."""
        source, networks = self.stream.source, self.networks
        grid = self._grid()
        flops = lambda cfg: cost.forward_flops(cfg, grid, source.text_shape[0])
        teacher = networks.config if networks.teacher is None else networks.teacher.config
        each = cost.step_flops(
            self.name,
            self.config["loss"],
            flops(networks.config),
            flops(teacher),
            networks.selection is None,
        )
        warmup = self.method.schedule.warmup
        rates, peak = self.method.rates, cost.peak_tflops()
        return report.Work(flops=each, warmup=warmup, rates=rates, peak=peak)

    def _refresh(self, state, step: int) -> list[Path]:
        """Writes what a run has come to, beside each checkpoint: the network, or its adapters
        alone, since the rest of it is in a file already."""
        self.exported = step
        if hosts.first():
            page.write(self.folder, f"{self.preset}, {self.folder.name}", self.settings)
        if self.networks.selection is not None and self.networks.selection.lora is not None:
            return self._export_lora(state.ema)
        return [self._export_network(state.ema, step)]

    def export(self, outcome: loop.Outcome) -> list[Path]:
        """Writes the averaged weights as a checkpoint that every other command takes, in the
        compute dtype, <run>/dit; and adapters as <run>/lora.safetensors too, where the base has
        all that they change. Returns their paths."""
        selection, folder = self.networks.selection, self.folder / "dit"
        adapters = selection is not None and selection.lora is not None
        if self.exported == outcome.step and not adapters:
            return [folder]
        with self.stages("export"):
            if not adapters:
                return self._refresh(outcome.state, outcome.step)
            written = self._export_lora(outcome.state.ema)
            return [self._export_network(outcome.state.ema, outcome.step), *written]

    def _export_network(self, ema, step: int) -> Path:
        networks, cfg = self.networks, self._exported()
        wanted = orbax.named_leaves(orbax.abstract("dit", cfg))
        source = {"name": f"tdjax train {self.preset}", "step": step, "settings": self.settings}
        one_by_one = lambda values: {
            name: Lazy(tuple(x.shape), np.dtype(x.dtype), functools.partial(values, name, x))
            for name, x in wanted.items()
        }

        def merged(name, x):
            value = ema.merged(name, networks.stored_leaf)
            if value is None:  # the first process has it, and writes it
                return np.broadcast_to(np.zeros((), x.dtype), x.shape)
            return value.astype(x.dtype)

        if networks.selection is not None:
            given = one_by_one(merged)
        elif jax.process_count() == 1:
            leaves = orbax.named_leaves(ema)
            given = one_by_one(lambda name, x: np.asarray(leaves[name].astype(x.dtype)))
        else:  # no host has all of a leaf: each writes what it has
            leaves = orbax.named_leaves(ema)
            given = {name: leaves[name].astype(x.dtype) for name, x in wanted.items()}
        folder = self.folder / "dit"
        return orbax.save(folder, given, "dit", cfg, source=source, overwrite=True)

    def _export_lora(self, ema: Trained) -> list[Path]:
        """The adapters as a file of their own. One over a base without the sparse projections
        that were trained beside them would be half of the network."""
        frozen = {name: self.networks.stored_leaf(name) for name in ema.weights}
        if any(before is None for before in frozen.values()):
            self.stages.note("the base has no sparse projections: dit holds them, a LoRA cannot")
            return []
        return [save_lora(self.folder / "lora.safetensors", ema, frozen)]


def _check_tangent(loss, cfg: DiTConfig) -> None:
    """Raises UsageError for a difference over a time that the network rounds away."""
    own = getattr(loss, "consistency", None)
    if isinstance(own, SCM) and own.tangent != "exact" and cfg.round_time:
        raise UsageError(
            f"loss.consistency.tangent is {own.tangent!r}",
            "this network rounds its timestep to steps of up to 4 in 1000, and a difference over"
            f" {own.interval:g} is that of the rounding",
            "use loss.consistency.tangent=exact",
        )


def _check_host_memory(config: dict[str, Any]) -> None:
    """Raises UsageError where the device cannot reach the host's memory and a setting needs it."""
    kinds = [memory.kind for memory in jax.local_devices()[0].addressable_memories()]
    asked = {
        "model.remat=offload is given": (config["model"].remat == "offload", "model.remat=block"),
        "loss.offload=true is given": (getattr(config["loss"], "offload", False), "leave it away"),
    }
    for what, (given, fix) in asked.items():
        if given and HOST_MEMORY not in kinds:
            raise UsageError(
                what, f"this device reaches {', '.join(kinds)}, and no {HOST_MEMORY}", fix
            )


def _changed(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """Lines on settings that differ from the checkpoint's: the run goes on with the new ones."""
    return [
        f"{key} was {before.get(key, 'not there')}, is {now.get(key, 'not there')}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not key.startswith(_FREE_ON_RESUME)
    ]
