"""Videos of fixed prompts that a run makes of itself as it goes on, always of the same noise."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tdjax.checkpoints.locate import PATHS
from tdjax.config import DiTConfig, SamplerConfig
from tdjax.errors import UsageError
from tdjax.files import written
from tdjax.media import video
from tdjax.parallel import hosts
from tdjax.parallel.mesh import every_device
from tdjax.parallel.sharding import constrain
from tdjax.pipeline.compilation import start_noise
from tdjax.pipeline.decoding import size_of
from tdjax.pipeline.load import open_pipeline
from tdjax.pipeline.options import PipelineOptions
from tdjax.pipeline.pipeline import Pipeline
from tdjax.presets import TEACHER_SAMPLER
from tdjax.progress import Stages
from tdjax.sampling import few_step, schedules, unipc
from tdjax.text.embeds import load_embeds
from tdjax.text.rows import read_prompts
from tdjax.train.evaluate.sheets import contact_sheet
from tdjax.train.page import SAMPLES, SHEET
from tdjax.train.state import Teacher
from tdjax.train.step import network, velocity

OPTIONS = PipelineOptions(low_memory=True)  # no weights stay on the device between uses
_FEW = (1, 2, 4)  # steps in which a few-step student is seen
_COLUMNS = 5  # frames of a video on the sheet
_WIDTH = 240  # pixels of a frame there, at most
_NAMED = 60  # characters of a prompt there


class Samples:
    """The prompts of a run, encoded, and the videos that its networks make of them.

    The text encoder has come and gone before the weights are read, and the VAE's decoder is on the
    device while frames are made. Prompts are divided over the mesh's groups of devices. Several
    processes encode, sample and decode together, each with all prompts; the first one writes.

    name: of the method. config: the objects of a run by the first word of their keys. cfg: of the
    network. latents: (t, h, w) of its first data. negative: embedding [s d] of the negative prompt,
    if it was given. groups: of devices, over which a batch is divided.
    Raises UsageError for a network that makes no video of a prompt alone, CheckpointError where
    `sample.model` lacks a VAE or a text encoder.
    """

    def __init__(
        self,
        name: str,
        config: dict[str, Any],
        cfg: DiTConfig,
        latents: tuple[int, int, int],
        *,
        negative: np.ndarray | None,
        mesh: Mesh | None,
        groups: int,
        stages: Stages,
    ):
        self.every = config["sample"].every
        self.seed = config["sample"].seed
        self.folder = Path(config["run"].folder)
        self.shape = (1, *latents, cfg.out_channels)
        self.mesh = mesh
        self.groups = groups
        self.stages = stages
        self._whole = None if mesh is None else NamedSharding(mesh, PartitionSpec())
        check_network(config, cfg)
        self.pipe = opened(config)
        self.size = size_of(self.shape, self.pipe.components["vae"].config)
        self.samplers = samplers(name, config, self.pipe)
        self.of_teacher = None
        if name != "flow" and config["sample"].teacher:
            self.of_teacher = _undistilled(config["sample"].guidance_scale, self.pipe)
        self.names, self.text, self.negative = self._encoded(config, negative)
        if self.text.shape[-1] != cfg.text_dim:
            raise UsageError(
                f"sample.prompts gives embeddings of {self.text.shape[-1]}",
                f"the network reads {cfg.text_dim}",
                "give sample.model, the model whose text encoder made the shards",
            )
        static = ("shape", "sampler")
        self._few = jax.jit(_few_steps, static_argnames=static, out_shardings=self._whole)
        self._many = jax.jit(_many_steps, static_argnames="shape", out_shardings=self._whole)

    def _encoded(
        self, config: dict[str, Any], negative: np.ndarray | None
    ) -> tuple[list[str], np.ndarray, np.ndarray | None]:
        """(names, embeddings [n s d], that of the negative prompt [s d] under guidance)."""
        path = Path(config["sample"].prompts)
        all_of_them = [*self.samplers, *filter(None, [self.of_teacher])]
        guided = any(sampler.guided for sampler in all_of_them)
        if path.suffix == ".safetensors":
            rows = load_embeds(path)
            if guided and negative is None:
                raise UsageError(
                    "data.negative is not given",
                    "guided samples need the embedding of the negative prompt",
                    "give it, or sample.guidance_scale=1, or sample.prompts as text",
                )
            names = [f"prompt {number}" for number in range(len(rows))]
        else:
            names = read_prompts(path)
            own = [""] if guided and negative is None else []
            rows = self.pipe.embed([*names, *own])
            self.pipe.free()
            if own:
                rows, negative = rows[:-1], rows[-1]
        return names, rows, negative if guided else None

    def make(self, state, teacher: Teacher, step: int) -> Path:
        """Writes <run>/samples/step_000500/, a video for each prompt, network and number of steps
        and a sheet of all, and returns the sheet. At step 0 the teacher is among the networks: it
        stays as it is.

        state, teacher: as a step takes them; neither is consumed. Raises OutOfMemory, NotFinite.
        """
        made: dict[tuple[int, str, int], np.ndarray] = {}
        with self.stages("sample"):
            for sampler in self.samplers:
                for which, model in (("average", state.ema), ("current", state.model)):
                    latents = self._latents(model, teacher, sampler)
                    steps = sampler.num_steps
                    made |= {(i, which, steps): x for i, x in enumerate(latents)}
            if step == 0 and self.of_teacher is not None:
                latents = self._latents(teacher.model, teacher, self.of_teacher)
                steps = self.of_teacher.num_steps
                made |= {(i, "teacher", steps): x for i, x in enumerate(latents)}
            made = dict(sorted(made.items()))
            finite = {key: bool(np.isfinite(x).all()) for key, x in made.items()}
            if not all(finite.values()):
                self.stages.note(f"samples of step {step} hold NaN or infinity, and show nothing")
            rows = [x if finite[key] else np.zeros_like(x) for key, x in made.items()]
            frames = self.pipe.decode(np.stack(rows)).frames
            clips = dict(zip(made, frames, strict=True))
            return Path(hosts.agreed(lambda: str(self._write(step, clips))))

    def _latents(self, model, teacher: Teacher, sampler: SamplerConfig) -> np.ndarray:
        """Latents f32[n t h w c] of all prompts, on the host."""
        place = lambda x: x if self._whole is None else hosts.place(x, self._whole)
        key = place(jax.random.key(self.seed))
        count, out = len(self.text), []
        for first in range(0, count, self.groups):
            rows = [min(first + i, count - 1) for i in range(self.groups)]  # the last fills up
            text = place(self.text[rows])
            with contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh):
                if sampler.few_step:
                    times = schedules.times(sampler)
                    how = {"shape": self.shape, "sampler": sampler.sampler}
                    x = self._few(model, teacher, text, key, times, **how)
                else:
                    table = unipc.step_coefficients(sampler)
                    below = None if self.negative is None else place(self.negative)
                    scale = np.float32(sampler.guidance_scale)
                    given = text, below, scale, key, table
                    x = self._many(model, teacher, *given, shape=self.shape)
            out.append(np.asarray(x))
        return np.concatenate(out)[:count]

    def _write(self, step: int, clips: dict[tuple[int, str, int], np.ndarray]) -> Path:
        target = self.folder / SAMPLES / f"step_{step:06}"
        every = max(1, math.ceil(self.size.width / _WIDTH))
        with written(target, overwrite=True, owned=_is_samples) as part:
            part.mkdir()
            for (number, which, steps), frames in clips.items():
                video.write(part / f"{number:03}_{which}_{steps}.mp4", frames)
            rows = {self._label(*key): frames[:, ::every, ::every] for key, frames in clips.items()}
            scale = max(1, _WIDTH // (2 * self.size.width))
            contact_sheet(part / SHEET, rows, columns=_COLUMNS, scale=scale)
        return target / SHEET

    def _label(self, number: int, which: str, steps: int) -> str:
        """What the sheet says of a video."""
        prompt = self.names[number][:_NAMED]
        return f"{which}, {steps} step{'s' * (steps > 1)}: {number} {prompt}"


def _is_samples(folder: Path) -> bool:
    """Whether a folder holds samples of a run and nothing else."""
    return all(path.suffix in (".mp4", ".png") for path in folder.iterdir())


def check_network(config: dict[str, Any], cfg: DiTConfig) -> None:
    """Raises UsageError for a network that does not make videos of a prompt by itself."""
    if config["model"].expert:
        raise UsageError(
            "sample.prompts is given, and model.expert",
            "a video takes both experts, and a run has one",
            "leave sample.prompts away",
        )
    if cfg.condition_channels:
        raise UsageError(
            "sample.prompts is given, and the network is image-to-video",
            "prompts alone have no first frame",
            "leave sample.prompts away",
        )


def opened(config: dict[str, Any]) -> Pipeline:
    """Returns the model whose VAE and text encoder are used, opened; none of its weights stay on
    the device between uses. It is over the devices of all processes where there are several. Raises
    UsageError where there is none, CheckpointError."""
    cfg, model = config["sample"], config["model"]
    if not cfg.model and not model.weights:
        raise UsageError(
            "sample.prompts is given without sample.model",
            "prompts are encoded and latents decoded by the model that made the shards",
            "for example sample.model=demo",
        )
    encoder = not cfg.prompts.endswith(".safetensors")
    mesh = every_device("sp") if jax.process_count() > 1 else None
    options = dataclasses.replace(OPTIONS, text_encoder=encoder, mesh=mesh)
    paths = dict.fromkeys(PATHS)
    stages = Stages(False)
    name = cfg.model or model.weights
    return open_pipeline(name, options, paths, offline=model.offline, stages=stages)


def samplers(name: str, config: dict[str, Any], pipe: Pipeline) -> list[SamplerConfig]:
    """Returns how a method's networks are sampled: those of rCM in few steps, at the times of its
    simulated steps where they are fixed; others as their undistilled model."""
    cfg = config["sample"]
    if name == "rcm":
        times = config["loss"].rollout or SamplerConfig.mid_t
        counts = [n for n in _FEW if n <= len(times) + 1]
        if cfg.num_steps is not None:
            counts = [cfg.num_steps]
        return [SamplerConfig(num_steps=n, mid_t=times) for n in counts]
    own = _undistilled(cfg.guidance_scale, pipe)
    count = own.num_steps if cfg.num_steps is None else cfg.num_steps
    return [dataclasses.replace(own, num_steps=count)]


def _undistilled(guidance_scale: float | None, pipe: Pipeline) -> SamplerConfig:
    """How an undistilled network is sampled, in all of its steps."""
    own = TEACHER_SAMPLER if pipe.sampler.few_step else pipe.sampler
    scale = own.guidance_scale if guidance_scale is None else guidance_scale
    return dataclasses.replace(own, guidance_scale=scale)


# -- programs --------------------------------------------------------------------------------------


def _noise(key, entries: int, shape: tuple[int, ...], count: int):
    """f32[entries b t h w c]: what `tdjax generate` draws for a seed, the same for all prompts."""
    noise = start_noise(jax.random.fold_in(key, 0), entries, shape)
    return constrain(jnp.broadcast_to(noise, (entries, count, *shape[1:])), None, "batch")


def _few_steps(model, teacher, text, key, times, *, shape: tuple[int, ...], sampler: str):
    """Latents f32[b t h w c] of text [b s d] at times f32[steps+1]."""
    noise = _noise(key, len(times) - 1, shape, len(text))
    return few_step.sample(velocity(network(model, teacher), text), noise, times, sampler)[0]


def _many_steps(model, teacher, text, negative, scale, key, table, *, shape: tuple[int, ...]):
    """The same by the table of an undistilled model's sampler, guided by negative [s d] if there is
    one."""
    net = network(model, teacher)
    v = velocity(net, text)
    if negative is not None:
        below = jnp.broadcast_to(negative, text.shape)
        v = few_step.guided(v, velocity(net, below), scale)
    (noise,) = _noise(key, 1, shape, len(text))
    return few_step.teacher_from(v, few_step.teacher_start(noise), table)[0].x
