"""The stage of the transformer: start noise, then the sampling loop cut into calls, where experts
change, and into single steps where progress is shown. No cut changes a bit."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tdjax.checkpoints import orbax
from tdjax.config import DiTConfig, SamplerConfig
from tdjax.errors import NotFinite
from tdjax.models.wan_dit import without_blocks
from tdjax.parallel import hosts
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


class Video(NamedTuple):
    """What makes one video another than its neighbours: the request with its own seed, its prompt's
    embeddings [1 s d], or prompt and negative prompt [2 s d] under guidance, and its number among
    the samples of that prompt."""

    request: Request
    text: np.ndarray
    sample: int


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


def start_together(keys, samples, times, latents, **static):
    """`start` of several videos at a time: (state [b ...], [noise f32[n b t h w c], or None]), each
    of them with the noise that it has alone.

    keys: a tuple of theirs; samples uint32[b]; the others as those of `start`.
    """
    each = zip(keys, samples, strict=True)
    states, noise = zip(
        *(start(key, sample, times, latents, **static) for key, sample in each), strict=True
    )
    state = jax.tree.map(lambda *rows: jnp.concatenate(rows), *states)
    return state, jax.tree.map(lambda *rows: jnp.concatenate(rows, axis=1), *noise)


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
        key, copies = jax.eval_shape(request.random_key), self.compiler.copies
        begin = self._start(request, segments, [key] * copies, [0] * copies)
        inputs = self.compiler.shapes_of(begin.inputs)
        function = functools.partial(begin.function, **begin.static)
        state, noise = jax.eval_shape(function, *inputs)
        state = self.compiler.shapes_of(state, self.compiler.rows())
        noise = self.compiler.shapes_of(noise, self.compiler.rows(1))
        schedules = self.compiler.shapes_of(_schedules(sampler, segments))
        chunks = _chunks(sampler, schedules, noise)
        shape = self.compiler.shape
        rows = copies * (2 if sampler.guided else 1)
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
        return [self._begin(begin, inputs), *steps]

    def run(
        self,
        request: Request,
        plan: ExecutionPlan,
        condition: jax.Array | None,
        videos: Sequence[Video],
    ) -> np.ndarray:
        """Returns latents f32[b t h w c] on the host, of as many videos as there are copies of the
        weights, or fewer: the last one then stands in the other places too.

        condition: f32[1 t h w 20] for image-to-video, of all videos.
        Raises NotFinite with the first step that is bad in one of them.
        """
        with memory.naming("denoise", plan, FIRST):
            self.stages.next_video(len(videos))
            segments = self.segments(request, plan)
            filled = [*videos, *(self.compiler.copies - len(videos)) * videos[-1:]]
            keys = [video.request.random_key() for video in filled]
            begin = self._start(request, segments, keys, [video.sample for video in filled])
            inputs = self.compiler.place(begin.inputs)
            (run,) = self.compiled([self._begin(begin, inputs)], plan, FIRST)
            state, noise = run(*inputs)
            text = self.compiler.place(np.concatenate([video.text for video in filled]))
            schedules = self.compiler.place(_schedules(request.sampler, segments))
            chunks = _chunks(request.sampler, schedules, noise)
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
            latents = hosts.whole(state if request.sampler.few_step else state.x)
            return latents[: len(videos)]

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
        lies = self.compiler.rows(), self.compiler.whole
        return self.compiler.request("denoise", function, *inputs, donate=(1,), lies=lies, **static)

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

    def _start(
        self, request: Request, segments: list[Segment], keys: Sequence, samples: Sequence[int]
    ) -> _Start:
        """What draws the noise of videos with these keys and numbers of samples."""
        latents = None if request.latents is None else np.asarray(request.latents, np.float32)
        later = schedules.times(request.sampler), latents
        static = self._static(request, segments)
        if len(keys) == 1:
            return _Start(start, (keys[0], np.uint32(samples[0]), *later), static)
        return _Start(start_together, (tuple(keys), np.asarray(samples, np.uint32), *later), static)

    def _begin(self, begin: _Start, inputs: tuple) -> Program:
        """The program that draws noise, for these inputs or their shapes."""
        lies = self.compiler.rows(), self.compiler.rows(1)
        return self.compiler.request(
            "start noise", begin.function, *inputs, lies=lies, **begin.static
        )

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


class _Start(NamedTuple):
    """A program that draws noise: `start` or `start_together`, its arguments on the host, and its
    static ones."""

    function: Callable
    inputs: tuple
    static: dict[str, Any]


def _schedules(cfg: SamplerConfig, segments: list[Segment]) -> list:
    """The schedule of each segment's steps, on the host."""
    if not cfg.few_step:
        steps = unipc.step_coefficients(cfg)
        return [steps.segment(segment.first, segment.last) for segment in segments]
    times = schedules.times(cfg)
    return [times[segment.first : segment.last + 1] for segment in segments]


def _chunks(cfg: SamplerConfig, schedules: list, noise: list) -> list:
    """What the loop of each segment reads at each of its steps: its schedule, with the noise from
    `start`."""
    return [*zip(noise, schedules, strict=True)] if cfg.few_step else schedules


def _label(segment: Segment, request: Request) -> str:
    steps = request.sampler.num_steps
    if segment.last - segment.first > 1 or steps == 1:
        return "denoise"
    return f"denoise: step {segment.first + 1} of {steps}"
