"""Pipeline: the order of stages, what is resident when, and what is freed.

text encoder -> embeddings      (then freed unless everything fits together)
VAE encoder  -> image condition (image-to-video only)
transformer  -> latents         (two experts: high noise, swap, low noise)
VAE decoder  -> frames
"""

from __future__ import annotations

import itertools
import threading
from typing import Any

import numpy as np

from tdjax.checkpoints.locate import Located
from tdjax.config.values import whole
from tdjax.parallel.mesh import make_mesh
from tdjax.pipeline import memory, together
from tdjax.pipeline.adapters import adapt
from tdjax.pipeline.call import Call, arguments_of
from tdjax.pipeline.compilation import Programs
from tdjax.pipeline.components import Component
from tdjax.pipeline.decoding import decode
from tdjax.pipeline.denoising import Video
from tdjax.pipeline.memory import ExecutionPlan
from tdjax.pipeline.notes import mesh_notes, plan_notes, request_notes, video_notes
from tdjax.pipeline.options import Lora, OutputType, PipelineOptions, check_choice
from tdjax.pipeline.preparation import Preparation
from tdjax.pipeline.request import Request, make_request, model_info, texts_of
from tdjax.pipeline.result import Result, joined, metadata_of
from tdjax.pipeline.text_encoding import open_tokenizer
from tdjax.progress import Listener, Stages
from tdjax.text.prompt_cache import PromptCache


class Pipeline(Call):
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
        text = components.get("text")
        self.components, self.options, self.stages = components, options, stages
        self.config = components["dit"].config
        self.info = info = model_info(
            located, self.config, text.config if text else None, "dit_low" in components
        )
        self.name, self.task = info.name, info.task  # "t2v" or "i2v"
        self.size, self.sampler = info.size, info.sampler  # where a call gives none
        self.lock = threading.RLock()  # calls of several threads run one after another
        self.mesh = make_mesh(options.mesh, self.config)
        for component in components.values():
            component.mesh = self.mesh
        self.tokenizer = open_tokenizer(located.tokenizer, info.text_len)
        self.programs = Programs(stages, self.mesh)
        self.preparation = made = Preparation(
            self.programs, components, self.tokenizer, prompt_cache, info
        )
        self.text_encoding, self.image_encoding = made.text_encoding, made.image_encoding
        self.denoising, self.vae_coding = made.denoising, made.vae_coding

    def __repr__(self) -> str:
        cfg, sampler = self.config, self.sampler
        return (
            f"Pipeline({self.name}: {self.task}, {self.size}; {sampler.num_steps} steps of"
            f" {sampler.sampler}; {cfg.attention} attention, {cfg.linear} linears,"
            f" {cfg.policy.compute})"
        )

    def _made(self, prompt: str | list[str] | None, arguments: dict[str, Any]) -> Result:
        request, listener, plan = self.agreed(self.request(prompt, **arguments))
        steps = request.sampler.num_steps
        with self.lock, self.stages.listening(listener, request.videos, steps):
            first = len(self.stages.rows)
            for line in (*self.warnings(request), *plan_notes(plan, self.options)):
                self.stages.note(line)
            for name in self.components.keys() & {"dit", "dit_low"}:
                self.components[name].stream(plan.stream_transformer)
            try:
                if not plan.keep_resident:  # what an earlier call, of a smaller size, left there
                    self.free()
                latents, frames = self._run(request, plan)
            finally:
                self.programs.forget()
                if not plan.keep_resident:
                    self.free()
            timings = self.stages.seconds(first)
        return Result(
            frames=joined(frames) if frames else None,
            latents=np.concatenate(latents),
            seed=request.seed,
            fps=request.fps,
            timings=timings,
            metadata={**self.metadata(request), "timings": timings},
            warnings=listener.notes,
        )

    @arguments_of(Call.__call__)
    def request(self, prompt: str | list[str] | None = None, **arguments: Any) -> Request:
        """Returns the checked arguments of a call; raises UsageError before any long work."""
        return make_request(prompt, arguments, self.info)

    def plan(self, request: Request, limit: int | None = None) -> ExecutionPlan:
        """Returns how a request will run and the memory of each of its stages; nothing is loaded.
        limit: bytes that JAX may use on a device; None: as the first one says."""
        return memory.plan_of(request, self.components, self.options, self.mesh, limit)

    def agreed(self, request: Request) -> tuple[Request, Listener, ExecutionPlan]:
        """Returns (a request as it runs, whom it tells how it goes, its plan): the same in all
        processes that the mesh lies over."""
        if not self.programs.apart:
            return request, request.listener(), self.plan(request)
        request, limit = together.agreed(request, bool(self.stages.show), memory.memory_limit())
        return request, together.Listeners(request), self.plan(request, limit)

    def _run(
        self, request: Request, plan: ExecutionPlan
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """(latents, frames) of every prompt and sample, through all stages: copies of the weights
        denoise as many at a time, in this order, and all devices decode one after another."""
        self.preparation.check_kernels()
        self.preparation.begin(request, plan)
        texts = self.text_encoding.run(request, plan)
        condition = self.image_encoding.run(request, plan)
        latents: list[np.ndarray] = []
        frames: list[np.ndarray] = []
        numbered = itertools.product(enumerate(texts), range(request.num_samples))
        videos = [Video(request.of(n), text, sample) for (n, text), sample in numbered]
        for first in range(0, len(videos), self.programs.copies):
            group = videos[first : first + self.programs.copies]
            if not plan.keep_resident:
                self.free("vae")
            made = self.denoising.run(request, plan, condition, group)
            latents += np.split(made, len(group))
            if request.output_type != "latent":
                for one in latents[first:]:
                    frames.append(self.vae_coding.run(request, plan, one, len(frames)))
                    for line in video_notes(request, self.info, frames[-1], len(frames)):
                        self.stages.note(line)
        return latents, frames

    @arguments_of(Call.__call__)
    def warmup(self, prompt: str | list[str] | None = None, **arguments: Any) -> None:
        """Compiles every stage for a size and a number of steps, and what looks at the embedded
        model's clips; no weights are loaded.

        With the persistent compile cache this serves later processes too.
        """
        if self.task == "i2v" and arguments.get("image") is None:
            arguments["image"] = np.zeros((self.size.height, self.size.width, 3), np.uint8)
        request, _, plan = self.agreed(self.request(prompt or "warm up", **arguments))
        # The whole loop, and its single steps for a terminal; only these for who listens to them.
        kinds = (True,) if request.single_steps else (False, True)
        with self.lock:
            self.preparation.compile(request, plan, kinds)
        size = request.size
        black = np.zeros((1, size.frames, size.height, size.width, 3), np.uint8)
        video_notes(request, self.info, black, 1)

    def decode(
        self,
        latents: np.ndarray | Result,
        *,
        output_type: OutputType = "uint8",
        fps: int | None = None,
    ) -> Result:
        """Returns the frames of finished latents [b t h w c], or of a result that has them, such as
        `Result.load(file)`."""
        return decode(self, latents, output_type, fps)

    def set_loras(self, lora: Lora = (), *, lora_high: Lora = (), lora_low: Lora = ()) -> None:
        """Merges LoRA files into the loaded transformers in place of those set so before; none: the
        weights as they were, bit by bit. Nothing is read but these files, and no stage is compiled
        again; the sum itself is, for other ranks.

        Arguments as those of `tdjax.load`. Raises CheckpointError and UsageError, before any
        change.
        """
        with self.lock:
            for line in adapt(self.components, lora, lora_high, lora_low):
                self.stages.note(line)

    def embed(self, prompts: str | list[str]) -> np.ndarray:
        """Returns embeddings [b s d] of prompts, on the host: from the cache, or one prompt at a
        time through the text encoder."""
        texts = texts_of(prompts)
        request = Request(prompts=texts, size=self.size, sampler=self.sampler)
        _, _, plan = self.agreed(request)
        with self.lock:
            return self.text_encoding.embed(list(texts), plan)

    def warnings(self, request: Request) -> list[str]:
        """Returns what a user should know before waiting: the prompt's length, an unusual size,
        weights that need many steps, devices that have nothing of their own to do."""
        lines = request_notes(request, self.config, self.info, self.tokenizer)
        return lines + mesh_notes(request, self.mesh)

    def metadata(self, request: Request) -> dict[str, Any]:
        """Returns everything needed to make the same videos again, as JSON values."""
        return metadata_of(self.name, request, self.components)

    def free(self, *names: str) -> None:
        """Drops weights from the device: the named components ("text", "vae", "dit", "dit_low"), or
        all."""
        for name in names:
            check_choice("a component", name, tuple(self.components))
        with self.lock:
            for name in names or tuple(self.components):
                self.components[name].free()

    def memory(self) -> dict[str, int]:
        """Returns XLA's count of peak bytes on a device for every stage compiled so far."""
        return self.programs.memory()

    def default_prompt(self, seed: int) -> str | None:
        """Returns a prompt that suits the model, another one for each seed; None for models that
        name none."""
        prompts = self.info.prompts
        return prompts[whole("seed", seed) % len(prompts)] if prompts else None

    def latent_shape(self, request: Request) -> tuple[int, ...]:
        """Returns (1, t, h, w, c) of the latents of one video."""
        return self.info.latent_shape(request.size)
