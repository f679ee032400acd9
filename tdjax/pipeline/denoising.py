"""The stage of the transformer: start noise, then the sampling loop cut into calls, where experts
change, and into single steps where progress is shown. No cut changes a bit."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tdjax.checkpoints import orbax
from tdjax.config import DiTConfig, SamplerConfig
from tdjax.errors import NotFinite
from tdjax.models.wan_dit import without_blocks
from tdjax.pipeline import compilation, memory, streaming
from tdjax.pipeline.compilation import Program, Programs
from tdjax.pipeline.components import Component
from tdjax.pipeline.kernel_check import wait_for_threads
from tdjax.pipeline.memory import ExecutionPlan
from tdjax.pipeline.preview import Previews
from tdjax.pipeline.request import Request
from tdjax.pipeline.stage import Stage
from tdjax.progress import Stages
from tdjax.sampling import few_step, schedules, unipc

FIRST = "dit"  # the only transformer, or the expert for high noise
SECOND = "dit_low"


class Segment(NamedTuple):
    """One call: its first step, the last + 1, and the component whose network runs."""

    first: int
    last: int
    expert: str


def segments_of(cfg: SamplerConfig, *, experts: bool, single: bool) -> list[Segment]:
    """Returns the calls of a sampler's loop. experts: there are two networks. single: every step is
    a call of its own."""
    swap = cfg.num_steps
    if experts:
        swap = schedules.split_times(schedules.times(cfg), cfg.boundary)
    cuts = {0, swap, cfg.num_steps}
    if single:
        cuts |= set(range(cfg.num_steps))
    ends = sorted(cuts)
    return [
        Segment(first, last, FIRST if first < swap else SECOND)
        for first, last in zip(ends, ends[1:], strict=False)
    ]


def start(
    key,
    sample,
    times,
    latents,
    *,
    shape: tuple[int, ...],
    sampler: str,
    entries: int,
    cuts: tuple[tuple[int, int], ...],
):
    """(state, [noise that the steps of each segment inject, or None]): one program, as many small
    ones take longer to compile.

    Sample `sample` draws `entries` of noise from fold_in(key, sample). times f32[steps+1]; latents:
    start noise that was given, or None.
    """
    noise = compilation.start_noise(jax.random.fold_in(key, sample), entries, shape)
    # The barrier: its bits are those that a caller draws and gives as `latents`.
    noise = lax.optimization_barrier(noise)
    first = noise[0] if latents is None else jnp.array(latents)  # a copy: the state is donated
    if sampler in few_step.UPDATE:
        state = few_step.start(first, times)
    else:
        state = few_step.teacher_start(first)
    injected = [few_step.injected(noise)[a:b] if sampler == "sde" else None for a, b in cuts]
    return state, injected


class Denoising(Stage):
    """The stage that makes latents of noise.

    components: all of the pipeline's: the transformer or two experts, and those that threads may be
                loading meanwhile.
    text_len:   tokens of the embeddings that it reads.
    previews:   what shows the steps to who asks for it.
    """

    def __init__(
        self,
        compiler: Programs,
        components: Mapping[str, Component],
        text_len: int,
        stages: Stages,
        previews: Previews,
    ):
        super().__init__(compiler, stages)
        self.components = components
        self.text_len = text_len
        self.previews = previews

    @property
    def config(self) -> DiTConfig:
        return self.components[FIRST].config

    def programs(
        self, request: Request, plan: ExecutionPlan, *, single: bool | None = None
    ) -> list[Program]:
        """Returns the programs from shapes alone. single: every step in a call of its own, or all
        in one; None: as `run` does it."""
        cfg, sampler = self.config, request.sampler
        segments = self.segments(request, plan, single)
        inputs = self._inputs(request, jax.eval_shape(request.random_key), 0)
        inputs = self.compiler.shapes_of(inputs)
        static = self._static(request, segments)
        state, noise = jax.eval_shape(functools.partial(start, **static), *inputs)
        state, chunks = self.compiler.shapes_of((state, _chunks(sampler, segments, noise)))
        shape = self.compiler.shape
        rows = 2 if sampler.guided else 1
        text = shape((rows, self.text_len, cfg.text_dim), cfg.policy.compute_dtype)
        condition = None
        if cfg.condition_channels:
            condition = shape((1, *request.size.latent_grid, cfg.condition_channels))
        steps = [
            program
            for chunk in chunks
            for program in self.step_programs(request, plan, state, text, condition, chunk)
        ]
        if request.on_preview is not None:
            before = state if sampler.sampler == "ode" else None
            steps += self.previews.programs(request, plan, state, before, chunks[0])
        return [self.compiler.request("start noise", start, *inputs, **static), *steps]

    def run(
        self,
        request: Request,
        plan: ExecutionPlan,
        text: np.ndarray,
        condition: jax.Array | None,
        sample: int,
    ) -> np.ndarray:
        """Returns latents f32[1 t h w c] on the host of sample number `sample`.

        text: [1 s d], or [2 s d] under guidance; condition: f32[1 t h w 20] for image-to-video.
        Raises NotFinite with the first bad step.
        """
        with memory.naming("denoise", plan, FIRST):
            self.stages.next_video()
            segments = self.segments(request, plan)
            inputs = self._inputs(request, request.random_key(), sample)
            inputs = self.compiler.place(inputs)
            static = self._static(request, segments)
            begin = self.compiler.request("start noise", start, *inputs, **static)
            (run,) = self.compiled([begin], plan, FIRST)
            state, noise = run(*inputs)
            text = self.compiler.place(text)
            chunks = self.compiler.place(_chunks(request.sampler, segments, noise))
            finite: list[bool] = []
            for chunk, segment in zip(chunks, segments, strict=True):
                made = self.step_programs(request, plan, state, text, condition, chunk)
                runs, model = self._ready_alone(made, segment, plan)
                before = None
                if request.on_preview is not None and request.sampler.sampler == "ode":
                    before = jnp.copy(state)  # the state itself is donated
                with self.timed(_label(segment, request), plan, segment.expert):
                    given = model, state, text, condition, chunk
                    streamed = plan.stream_transformer
                    state, ok = streaming.step(runs, *given) if streamed else runs[0](*given)
                    finite += np.asarray(ok).tolist()
                if request.single_steps or self.stages.show:
                    self.stages.step(segment.last, request.sampler.num_steps)
                if request.on_preview is not None:
                    self.previews.show(request, plan, segment.last, state, before, chunk)
                if segment.first == 0 and not plan.keep_resident:
                    self._read_second(segments[1:], plan)
            if not plan.keep_resident:
                self.components[segments[-1].expert].free()
            if request.check == "finite" and not all(finite):
                raise self._not_finite(finite.index(False) + 1, request)
            return np.asarray(state if request.sampler.few_step else state.x)

    def segments(
        self, request: Request, plan: ExecutionPlan, single: bool | None = None
    ) -> list[Segment]:
        """Returns the calls of a request: single steps where progress is shown, or where a second
        expert is read while the first one runs."""
        experts = SECOND in self.components
        if single is None:
            told = request.single_steps or bool(self.stages.show)
            single = told or (experts and not plan.keep_resident)
        single = single or plan.stream_transformer
        return segments_of(request.sampler, experts=experts, single=single)

    def step_programs(
        self, request: Request, plan: ExecutionPlan, state, text, condition, chunk
    ) -> list[Program]:
        """Returns the programs of a segment for these inputs, or their shapes: one, or those of
        `streaming`."""
        if not plan.stream_transformer:
            return [self.program(request, state, text, condition, chunk)]
        model = self.components[FIRST].abstract()
        block = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), model.blocks)
        outer = without_blocks(orbax.abstract("dit", self.config))
        shapes = streaming.Streamed(outer, (block,))
        inputs = state, text, condition, chunk
        return streaming.programs(self.compiler, shapes, request.sampler, *inputs)

    def program(self, request: Request, state, text, condition, chunk) -> Program:
        """Returns the program of a segment for these inputs, or their shapes."""
        sampler, model = request.sampler, self.components[FIRST].abstract()
        function: Any = compilation.denoise
        static: dict[str, Any] = {"sampler": sampler.sampler}
        if not sampler.few_step:
            function = compilation.denoise_guided
            static = {"guidance_scale": sampler.guidance_scale}
        inputs = model, state, text, condition, chunk
        return self.compiler.request("denoise", function, *inputs, donate=(1,), **static)

    def _ready_alone(self, programs: list[Program], segment: Segment, plan: ExecutionPlan):
        """(executables, module) of a segment. What threads compile and load is done by the time
        that the first one begins."""
        if segment.expert == SECOND and not plan.keep_resident:
            self.components[FIRST].free()
        expert = self.components[segment.expert]
        runs, model = self.ready(programs, expert, plan, segment.expert)
        if segment.first == 0:
            loads = [component.coming for component in self.components.values()]
            wait_for_threads([*self.compiler.coming.values(), *loads], self.stages)
        return runs, model

    def _read_second(self, later: list[Segment], plan: ExecutionPlan) -> None:
        """Has the second expert read into the host's memory while the first one's later steps run,
        if there are such steps and there is room."""
        if not {FIRST, SECOND} <= {segment.expert for segment in later}:
            return
        second = self.components[SECOND]
        streamed = plan.stream_transformer
        room = memory.may_stage(plan.of(FIRST), second.abstract(), plan.limit, streamed=streamed)
        if room and (streamed or second.stageable):
            second.load_ahead(host=not streamed)

    def _inputs(self, request: Request, key, sample: int) -> tuple:
        """Those of the program `start`."""
        latents = None if request.latents is None else np.asarray(request.latents, np.float32)
        return key, np.uint32(sample), schedules.times(request.sampler), latents

    def _static(self, request: Request, segments: list[Segment]) -> dict[str, Any]:
        """What the program `start` depends on: not the schedule's numbers."""
        sampler = request.sampler
        return {
            "shape": (1, *request.size.latent_grid, self.config.out_channels),
            "sampler": sampler.sampler,
            "entries": sampler.num_steps if sampler.sampler == "sde" else 1,
            "cuts": tuple((segment.first, segment.last) for segment in segments),
        }

    def _not_finite(self, step: int, request: Request) -> NotFinite:
        cfg, steps = self.config, request.sampler.num_steps
        return NotFinite(
            f"step {step} of {steps} gave NaN or infinity: no video was written",
            f"the transformer ran with attention {cfg.attention}, linears {cfg.linear},"
            f" {cfg.policy.compute}",
            "try `attention` original, then `quant` none, then `dtype` float32; please report"
            " which one helps",
        )


def _chunks(cfg: SamplerConfig, segments: list[Segment], noise: list) -> list:
    """What the loop of each segment reads at each of its steps, with the noise from `start`."""
    if not cfg.few_step:
        steps = unipc.step_coefficients(cfg)
        return [steps.segment(segment.first, segment.last) for segment in segments]
    times = schedules.times(cfg)
    return [
        (part, times[segment.first : segment.last + 1])
        for segment, part in zip(segments, noise, strict=True)
    ]


def _label(segment: Segment, request: Request) -> str:
    steps = request.sampler.num_steps
    if segment.last - segment.first > 1 or steps == 1:
        return "denoise"
    return f"denoise: step {segment.first + 1} of {steps}"
