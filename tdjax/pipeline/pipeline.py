"""Pipeline: the order of stages, what is resident when, and what is freed.

text encoder -> embeddings      (then freed unless everything fits together)
VAE encoder  -> image condition (image-to-video only)
transformer  -> latents         (two experts: high noise, swap, low noise)
VAE decoder  -> frames
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np

from tdjax.checkpoints.locate import Located
from tdjax.config import DiTConfig, SamplerConfig, VideoSize
from tdjax.parallel.mesh import make_mesh
from tdjax.pipeline import memory
from tdjax.pipeline.compilation import Program, Programs
from tdjax.pipeline.components import Component
from tdjax.pipeline.denoising import Denoising
from tdjax.pipeline.kernel_check import check_kernels
from tdjax.pipeline.memory import ExecutionPlan
from tdjax.pipeline.notes import request_notes
from tdjax.pipeline.options import (
    CallAliases,
    Check,
    Fit,
    OutputType,
    PipelineOptions,
    Sampler,
    arguments_of,
)
from tdjax.pipeline.request import Request, defaults_of, make_request
from tdjax.pipeline.result import Result, joined, metadata_of
from tdjax.pipeline.text_encoding import TextEncoding
from tdjax.pipeline.vae_coding import ImageEncoding, VAECoding
from tdjax.progress import Stages
from tdjax.text.prompt_cache import PromptCache
from tdjax.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import jax

    from tdjax.pipeline.options import Image

_FORCED_TEXT = {"auto": None, "device": False, "stream": True}
_FORCED_VAE = {"auto": None, "full": False, "tiled": True}


class Pipeline:
    """Text or image to video. Made by `tdjax.load`; call it with a prompt, see `__call__`."""

    def __init__(
        self,
        located: Located,
        components: dict[str, Component],
        options: PipelineOptions,
        *,
        stages: Stages,
        prompt_cache: PromptCache | None = None,
    ):
        self.components = components
        self.options = options
        self.stages = stages
        self.config: DiTConfig = components["dit"].config
        self.mesh = make_mesh(options.mesh, self.config)
        for component in components.values():
            component.mesh = self.mesh
        about = located.facts
        self.name: str = about.get("name", located.name)
        self.prompts: list[str] = about.get("prompts", [])
        self.language: dict[str, Any] | None = about.get("language")
        self.distilled = located.distilled
        text = components.get("text")
        self.defaults = defaults_of(
            self.config,
            text.config if text else None,
            located.preset,
            about,
        )
        self.tokenizer = None
        if located.tokenizer is not None:
            self.tokenizer = Tokenizer(located.tokenizer, self.text_len)
        self.programs = Programs(stages, self.mesh)
        self.text_encoding = TextEncoding(
            self.programs,
            text,
            self.tokenizer,
            prompt_cache,
            stages,
            self.config.policy.compute_dtype,
        )
        self.vae_coding = VAECoding(self.programs, components["vae"], stages)
        self.image_encoding = ImageEncoding(self.vae_coding)
        self.denoising = Denoising(self.programs, components, self.text_len, stages)
        self._kernels_checked = False
        self._begun: set[tuple] = set()

    # -- the call ----------------------------------------------------------------------------------

    def __call__(
        self,
        prompt: str | list[str] | None = None,
        *,
        image: Image | None = None,
        fit: Fit = "crop",
        resolution: str | None = None,
        aspect_ratio: str | None = None,
        width: int | None = None,
        height: int | None = None,
        num_frames: int | None = None,
        num_steps: int | None = None,
        sampler: Sampler | None = None,
        sigma_max: float | None = None,
        mid_t: tuple[float, ...] | list[float] | None = None,
        boundary: float | None = None,
        shift: float | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | None = "",
        seed: int | None = 0,
        key: jax.Array | None = None,
        num_samples: int = 1,
        latents: np.ndarray | jax.Array | None = None,
        prompt_embeds: np.ndarray | jax.Array | None = None,
        output_type: OutputType = "uint8",
        fps: int = 16,
        check: Check = "finite",
        on_frames: Callable[[int, np.ndarray], None] | None = None,
        **aliases: Unpack[CallAliases],
    ) -> Result:
        """Makes videos. Arguments that are None are the model's own.

        prompt:      text, or a list of texts (one video each, in order).
        image:       path, PIL image or uint8 [H W 3], for image-to-video. fit: how it is brought to
                     the frame: "crop", "pad", "stretch", or "adaptive" (the size follows it).
        resolution:  "480p", "720p", with aspect_ratio such as "16:9"; or width and height, in
                     pixels. num_frames: 4k+1.
        num_steps:   of the sampler: "sde", "ode" (distilled weights), "unipc", "euler".
        sigma_max, mid_t: where sampling begins, and TrigFlow times between the first and the last.
        boundary:    time below which the second of two experts takes over.
        shift, guidance_scale, negative_prompt: of undistilled weights.
        seed:        0 to 2**32 - 1; or key, a jax.random key. num_samples: videos of each prompt.
        latents:     start noise [1 t h w c]. prompt_embeds: [b s d], in place of a prompt.
        output_type: "uint8", "float" (0 to 1) or "latent". fps: written into files.
        check:       "finite" (raises NotFinite) or "none".
        on_frames:   called with (number of the video, chunk [t H W 3]) as chunks are decoded.
        aliases:     names that diffusers and TurboDiffusion have for the same things.

        Same seed, shapes, version and device kind: same bits. Sample i of a prompt uses
        fold_in(key, i). Raises UsageError, OutOfMemory, NotFinite, CheckpointError, KernelError.
        """
        request = self.request(
            prompt,
            image=image,
            fit=fit,
            resolution=resolution,
            aspect_ratio=aspect_ratio,
            width=width,
            height=height,
            num_frames=num_frames,
            num_steps=num_steps,
            sampler=sampler,
            sigma_max=sigma_max,
            mid_t=mid_t,
            boundary=boundary,
            shift=shift,
            guidance_scale=guidance_scale,
            negative_prompt=negative_prompt,
            seed=seed,
            key=key,
            num_samples=num_samples,
            latents=latents,
            prompt_embeds=prompt_embeds,
            output_type=output_type,
            fps=fps,
            check=check,
            on_frames=on_frames,
            **aliases,
        )
        plan = self.plan(request)
        first = len(self.stages.rows)
        for line in self.warnings(request):
            self.stages.note(line)
        try:
            made, frames = self._run(request, plan)
        finally:
            self.programs.forget()
            if not plan.keep_resident:
                self.free()
        timings = self.stages.seconds(first)
        return Result(
            frames=joined(frames) if frames else None,
            latents=np.concatenate(made),
            seed=request.seed,
            fps=request.fps,
            timings=timings,
            metadata={**self.metadata(request), "timings": timings},
        )

    @arguments_of(__call__)
    def request(self, prompt: str | list[str] | None = None, **arguments: Any) -> Request:
        """Returns the checked arguments of a call; raises UsageError before any long work."""
        return make_request(prompt, arguments, self.defaults)

    def plan(self, request: Request) -> ExecutionPlan:
        """Returns how a request will run and the memory of each of its stages; nothing is
        loaded."""
        options = self.options
        stream_text = _FORCED_TEXT[options.text_encoder_device] if self.mesh is None else False
        return memory.make_plan(
            {name: component.config for name, component in self.components.items()},
            request.size,
            guided=request.sampler.guided,
            low_memory=options.low_memory,
            stream_text=stream_text,
            tiled_vae=_FORCED_VAE[options.vae],
        )

    def _run(
        self, request: Request, plan: ExecutionPlan
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """(latents, frames) of every prompt and sample, through all stages."""
        self._check_kernels()
        self._begin(request, plan)
        texts = self.text_encoding.run(request, plan)
        condition = self.image_encoding.run(request, plan)
        latents: list[np.ndarray] = []
        frames: list[np.ndarray] = []
        for text, sample in itertools.product(texts, range(request.num_samples)):
            if not plan.keep_resident:
                self.free("vae")
            latents.append(self.denoising.run(request, plan, text, condition, sample))
            if request.output_type != "latent":
                frames.append(self.vae_coding.run(request, plan, latents[-1], len(frames)))
        return latents, frames

    def _check_kernels(self) -> None:
        if not self._kernels_checked:
            check_kernels(self.config, self.stages)
            self._kernels_checked = True

    def _begin(self, request: Request, plan: ExecutionPlan) -> None:
        """Where everything fits together: threads compile the programs of all stages, and load
        weights in the order of stages, while the first stage runs. Elsewhere each stage makes its
        program, which takes memory too, and then loads."""
        if not plan.keep_resident:
            return
        shapes = (request.size, request.sampler, request.output_type, self.stages.show)
        if shapes not in self._begun:
            self._begun.add(shapes)
            with self.stages("prepare"):
                for program in self._later_programs(request, plan):
                    program.begin()
        experts = dict.fromkeys(s.expert for s in self.denoising.segments(request, plan))
        order = list(experts)
        if self.task == "i2v":
            order.insert(0, "vae")
        elif request.output_type != "latent":
            order.append("vae")
        for name in order:
            self.components[name].load_ahead()

    def _later_programs(
        self, request: Request, plan: ExecutionPlan, single: bool | None = None
    ) -> list[Program]:
        """Those of every stage after the text encoder."""
        return [
            *self.image_encoding.programs(request, plan),
            *self.denoising.programs(request, plan, single=single),
            *self.vae_coding.programs(request, plan),
        ]

    # -- beside the call ---------------------------------------------------------------------------

    def compile(self, request: Request, plan: ExecutionPlan, singles: tuple[bool, ...]) -> None:
        """Compiles every stage of a request; no weights are loaded. singles: whether the denoising
        loop is one call (False), or a call for each step (True)."""
        programs = self.text_encoding.programs(request, plan)
        for single in singles:
            programs += self._later_programs(request, plan, single)
        for program in programs:
            program.begin()
        for program in programs:
            program.wait()

    @arguments_of(__call__)
    def warmup(self, prompt: str | list[str] | None = None, **arguments: Any) -> None:
        """Compiles every stage for a size and a number of steps; no weights are loaded.

        With the persistent compile cache this serves later processes too.
        """
        if self.task == "i2v" and arguments.get("image") is None:
            size = self.defaults.size
            arguments["image"] = np.zeros((size.height, size.width, 3), np.uint8)
        request = make_request(prompt or "warm up", arguments, self.defaults)
        # The whole loop, and its single steps for a terminal.
        self.compile(request, self.plan(request), (False, True))

    def embed(self, prompts: str | list[str]) -> np.ndarray:
        """Returns embeddings [b s d] of prompts, on the host: from the cache, or one prompt at a
        time through the text encoder."""
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        defaults = self.defaults
        request = Request(prompts=tuple(prompts), size=defaults.size, sampler=defaults.sampler)
        return self.text_encoding.embed(prompts, self.plan(request))

    def warnings(self, request: Request) -> list[str]:
        """Returns what a user should know before waiting: the prompt's length, an unusual size,
        weights that need many steps."""
        return request_notes(
            request,
            self.config,
            name=self.name,
            distilled=self.distilled,
            experts="dit_low" in self.components,
            own_size=self.defaults.resolution is None,
            tokenizer=self.tokenizer,
            language=self.language,
        )

    def metadata(self, request: Request) -> dict[str, Any]:
        """Returns everything needed to make the same videos again, as JSON values."""
        return metadata_of(self.name, request, self.components)

    def free(self, *names: str) -> None:
        """Drops weights from the device: the named components ("text", "vae", "dit", "dit_low"), or
        all."""
        for name in names or tuple(self.components):
            self.components[name].free()

    def memory(self) -> dict[str, int]:
        """Returns XLA's count of peak bytes on a device for every stage compiled so far."""
        return self.programs.memory()

    def default_prompt(self, seed: int) -> str | None:
        """Returns a prompt that suits the model, another one for each seed; None for models that
        name none."""
        return self.prompts[seed % len(self.prompts)] if self.prompts else None

    def latent_shape(self, request: Request) -> tuple[int, ...]:
        """Returns (1, t, h, w, c) of the latents of one video."""
        return self.defaults.latent_shape(request.size)

    @property
    def task(self) -> str:
        """ "t2v" or "i2v"."""
        return self.config.task

    @property
    def size(self) -> VideoSize:
        return self.defaults.size

    @property
    def sampler(self) -> SamplerConfig:
        return self.defaults.sampler

    @property
    def text_len(self) -> int:
        return self.defaults.text_len
