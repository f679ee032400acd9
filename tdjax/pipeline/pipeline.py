"""Pipeline: the order of stages, what is resident when, and what is freed.

text encoder -> embeddings      (then freed unless everything fits together)
VAE encoder  -> image condition (image-to-video only)
transformer  -> latents         (two experts: high noise, swap, low noise)
VAE decoder  -> frames
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from tdjax.checkpoints.locate import Located
from tdjax.config import I2V_SAMPLER, PRESETS, T2V_SAMPLER, DiTConfig, VideoSize
from tdjax.errors import NotFinite, UsageError
from tdjax.media.resolution import fit_image, size_notes
from tdjax.parallel.mesh import make_mesh
from tdjax.pipeline import compilation, denoising, memory
from tdjax.pipeline.components import Part, check_vocabulary, reference_notes
from tdjax.pipeline.conditioning import first_frame, image_condition
from tdjax.pipeline.kernel_check import check_kernels, wait_for_threads
from tdjax.pipeline.request import Request, make_request, sampler_notes
from tdjax.pipeline.result import Result, describe, joined
from tdjax.pipeline.text_encoding import TextEncoder
from tdjax.pipeline.vae_coding import Coder
from tdjax.progress import Stages
from tdjax.sampling import flow
from tdjax.text.prompt_cache import PromptCache
from tdjax.text.tokenizer import Tokenizer, Tokens, language_warnings, prompt_warnings

TEXT_DEVICES, VAE_WAYS = ("auto", "device", "stream"), ("auto", "full", "tiled")


class Pipeline:
    """Text or image to video. Made by `tdjax.load`; call it with a prompt, see `__call__`."""

    def __init__(
        self,
        located: Located,
        parts: dict[str, Part],
        *,
        mesh: str | None,
        low_memory: bool,
        stages: Stages,
        text_encoder_device: str = "auto",
        vae: str = "auto",
        prompt_cache: PromptCache | None = None,
    ):
        self.parts, self.low_memory, self.stages, self.text_encoder_device = (
            parts,
            low_memory,
            stages,
            text_encoder_device,
        )
        self.vae = vae
        self.mesh = make_mesh(mesh, self.config)
        if self.mesh is not None and text_encoder_device == "stream":
            raise UsageError(
                "text_encoder_device stream with a mesh",
                "layers are streamed to one device",
                "use device, or no mesh",
            )
        for part in parts.values():
            part.mesh = self.mesh
        self.programs = compilation.Programs(self.mesh)
        self.coder = Coder(self.programs, self.parts["vae"], stages)
        self.kernels_checked, self.begun = False, set()
        self.tokenizer = (
            None if located.tokenizer is None else Tokenizer(located.tokenizer, self.text_len)
        )
        check_vocabulary(self.tokenizer, parts.get("text"))
        self.text = (
            TextEncoder(self.programs, parts["text"], self.tokenizer, prompt_cache, stages)
            if "text" in parts
            else None
        )
        facts, preset = located.facts, PRESETS.get(located.preset or "")
        self.name = facts.get("name", located.name)
        self.prompts, self.language = facts.get("prompts", []), facts.get("language")
        self.distilled = located.distilled
        self.resolution = None if "width" in facts else preset.resolution if preset else "480p"
        self.size = VideoSize(**{k: facts[k] for k in ("frames", "height", "width") if k in facts})
        own = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in facts.get("sampler", {}).items()
        }
        self.sampler = dataclasses.replace(
            preset.sampler if preset else I2V_SAMPLER if self.task == "i2v" else T2V_SAMPLER, **own
        )

    def default_prompt(self, seed: int) -> str | None:
        """A prompt that suits the model, another one for each seed; None for models that name
        none."""
        return self.prompts[seed % len(self.prompts)] if self.prompts else None

    @property
    def config(self) -> DiTConfig:
        return self.parts["dit"].config

    @property
    def task(self) -> str:
        return self.config.task

    @property
    def text_len(self) -> int:
        return self.parts["text"].config.text_len if "text" in self.parts else self.config.text_len

    def request(self, prompt: str | list[str] | None = None, **arguments: Any) -> Request:
        """The checked arguments of a call; raises UsageError before any long work."""
        prompts = (prompt,) if isinstance(prompt, str) else tuple(prompt or ())
        request = make_request(
            prompts,
            arguments,
            task=self.task,
            size=self.size,
            resolution=self.resolution,
            sampler=self.sampler,
        )
        if request.sampler.guidance != 1.0 and "text" not in self.parts:
            raise UsageError(
                "guidance without a text encoder",
                "the negative prompt is encoded by it",
                "give the prompt itself, or guidance 1",
            )
        request.check_arrays(
            latents=self.latent_shape(request), embeds=(self.text_len, self.config.text_dim)
        )
        return request

    def latent_shape(self, request: Request) -> tuple[int, ...]:
        """(1, t, h, w, c) of the latents of one video."""
        return (1, *request.size.latent_grid, self.config.out_channels)

    def plan(self, request: Request) -> list[memory.StagePlan]:
        """Memory of each stage for a request; nothing is loaded."""
        return self.plan_with(
            request, stream_text=self.streams_text(request), tiled=self.tiled(request)
        )

    def plan_with(self, request: Request, **choices: bool) -> list[memory.StagePlan]:
        configs = {name: part.config for name, part in self.parts.items()}
        return memory.stage_plans(
            configs,
            request.size,
            image=self.task == "i2v",
            guided=request.sampler.guidance != 1.0,
            **choices,
        )

    def streams_text(self, request: Request) -> bool:
        """Whether the text encoder passes through the device layer by layer."""
        if self.text_encoder_device != "auto" or self.mesh is not None:
            return self.text_encoder_device == "stream"
        plans = self.plan_with(request, tiled=self.tiled(request))
        return not memory.keep_resident(plans, memory.memory_limit(), self.low_memory)

    def tiled(self, request: Request) -> bool:
        """Whether frames are decoded in tiles: as asked for, else where the whole frame does not
        fit."""
        if self.vae != "auto":
            return self.vae == "tiled"
        limit = memory.memory_limit()
        return limit is not None and self.plan_with(request)[-1].total > 0.9 * limit

    def keep(self, request: Request) -> bool:
        """Whether all weights stay on the device between stages."""
        return memory.keep_resident(self.plan(request), memory.memory_limit(), self.low_memory)

    def warmup(self, prompt: str = "warm up", **arguments: Any) -> None:
        """Compile every stage for a size and a number of steps; no weights are loaded.

        With the persistent compile cache this serves later processes too.
        """
        if self.task == "i2v" and arguments.get("image") is None:
            arguments["image"] = np.zeros((self.size.height, self.size.width, 3), np.uint8)
        request = self.request(prompt, **arguments)
        if self.text is not None:
            self.text.layer_programs() if self.streams_text(request) else self.text.program()
        for wait in (False, True):
            with contextlib.nullcontext() if wait else self.programs.ahead():
                self.later_programs(
                    request, (False, True)
                )  # the whole loop, and its single steps for a terminal

    def later_programs(self, request: Request, singles: tuple[bool, ...]) -> None:
        """Those of every stage after the text encoder."""
        grid, shape = self.latent_shape(request), self.programs.shape
        condition = None
        if self.task == "i2v":
            self.coder.encoder(request.size)
            condition = shape((*grid[:-1], self.config.condition_channels))
        text = shape(
            (self.text_rows(request), self.text_len, self.config.text_dim),
            self.config.policy.compute_dtype,
        )
        for single in singles:
            cut = denoising.cut(request.sampler, experts="dit_low" in self.parts, single=single)
            key = jax.eval_shape(jax.random.key, 0) if request.key is None else request.key
            args = jax.tree.map(
                lambda x: shape(x.shape, x.dtype),
                denoising.arguments(request.sampler, key, 0, request.latents),
            )
            self.start_program(request, args, cut)
            state, noise = jax.eval_shape(
                functools.partial(denoising.start, **denoising.static(request.sampler, grid, cut)),
                *args,
            )
            begun = state, denoising.schedules(request.sampler, cut, noise)
            state, chunks = jax.tree.map(lambda x: shape(x.shape, x.dtype), begun)
            for chunk in chunks:
                self.denoise_program(request, state, text, condition, chunk)
        if request.output_type != "latent":
            self.coder.decoder(grid, request.output_type, self.tiled(request))

    def begin(self, request: Request) -> None:
        """Where everything fits together: threads compile the programs of all stages, and load
        weights in the order of stages, while the first stage runs. Elsewhere each stage makes its
        program, which takes memory too, and then loads."""
        if not self.keep(request):
            return
        single = self.stages.show
        facts = (request.size, request.sampler, request.output_type, single)
        if facts not in self.begun:
            self.begun.add(facts)
            with self.stages("prepare"), self.programs.ahead():
                self.later_programs(request, (single,))
        swap = flow.split_times(flow.times(request.sampler), request.sampler.boundary)
        experts = [
            name
            for name in ("dit", "dit_low")
            if name == "dit" or (name in self.parts and swap < request.sampler.steps)
        ]
        for name in (
            ("vae", *experts)
            if self.task == "i2v"
            else experts
            if request.output_type == "latent"
            else (*experts, "vae")
        ):
            self.parts[name].load_ahead()

    # -- the stages --------------------------------------------------------------------------------

    @contextlib.contextmanager
    def stage(self, name: str, request: Request):
        """A timed stage; running out of memory in it becomes an OutOfMemory that names it."""
        try:
            with self.stages(name):
                yield
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise memory.out_of_memory(name, self.plan(request), memory.memory_limit()) from error

    def loaded(self, name: str, request: Request):
        """The module of a part, loaded in a stage of its own unless it is there already."""
        part = self.parts[name]
        if part.module is None:
            with self.stage(f"load {name}", request):
                part.load()
        return part.module

    def ready(self, name: str, request: Request, program):
        """(what `program` gives, the module of a part): side by side where memory is ample, else
        the program first."""
        if self.keep(request):
            with self.programs.ahead():
                program()
            module = self.loaded(name, request)
            return program(), module
        run = program()
        return run, self.loaded(name, request)

    def embed(self, prompts: str | list[str], *, request: Request | None = None) -> np.ndarray:
        """Prompts -> embeddings [b s d] on the host: from the cache, or one prompt at a time
        through the text encoder."""
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if self.tokenizer is None or self.text is None:
            raise UsageError(
                "this model was opened without a text encoder",
                "a prompt cannot be encoded",
                "give prompt_embeds",
            )
        request = request or Request(prompts=tuple(prompts), size=self.size, sampler=self.sampler)
        return self.text.embed(prompts, functools.partial(self.encode_text, request))

    def encode_text(self, request: Request, tokens: Tokens) -> np.ndarray:
        """Tokens [b s] -> [b s d] on the host; the encoder is freed where weights do not stay."""
        if self.parts["text"].module is None and self.streams_text(request):
            self.text.layer_programs()
            with self.stage("text, layer by layer", request):
                return self.text.streamed(tokens)
        _, encoder = self.ready("text", request, self.text.program)
        with self.stage("text", request):
            embeds = self.text.whole(encoder, tokens)
        if not self.keep(request):
            self.parts["text"].free()
        return embeds

    def text_rows(self, request: Request) -> int:
        return 2 if request.sampler.guidance != 1.0 else 1

    def texts(self, request: Request) -> list[np.ndarray]:
        """For each prompt what the transformer reads: [1 s d], or prompt and negative prompt [2 s
        d] under guidance."""
        prompts = list(request.prompts) if request.prompt_embeds is None else []
        negative = [request.negative_prompt] * (self.text_rows(request) - 1)
        rows = (
            self.embed(prompts + negative, request=request)
            if prompts + negative
            else np.zeros((0,))
        )
        embeds = rows[: len(prompts)] if request.prompt_embeds is None else request.prompt_embeds
        dtype = self.config.policy.compute_dtype
        return [
            (
                np.concatenate([row[None], rows[len(prompts) :]]).astype(dtype)
                if negative
                else row[None].astype(dtype)
            )
            for row in embeds
        ]

    def encode_image(self, request: Request):
        """The image as condition f32[1 t h w 20]: mask of the first latent frame, and latents of
        the image and grey frames."""
        _, vae = self.ready("vae", request, lambda: self.coder.encoder(request.size))
        with self.stage("vae encode", request):
            image = first_frame(fit_image(request.image, request.size, request.fit), request.size)
            latents = self.coder.encode(vae, image, request.size)
            return jax.block_until_ready(
                self.programs.place(image_condition(self.programs.place(latents)))
            )

    def start_program(self, request: Request, args: tuple, cut: list[denoising.Span]):
        static = denoising.static(request.sampler, self.latent_shape(request), cut)
        return self.programs.get(self.stages, "start noise", denoising.start, *args, **static)

    def denoise_program(self, request: Request, state, text, condition, chunk):
        cfg, model = request.sampler, self.parts["dit"].abstract()
        function, static = compilation.denoise, {"mode": cfg.mode}
        if not cfg.few_step:
            function, static = compilation.denoise_guided, {"guidance": cfg.guidance}
        return self.programs.get(
            self.stages,
            "denoise",
            function,
            model,
            state,
            text,
            condition,
            chunk,
            donate=(1,),
            **static,
        )

    def denoise(self, request: Request, key, sample: int, text, condition):
        """-> latents f32[1 t h w c] on the device. Raises NotFinite with the first bad step."""
        steps, keep, finite = request.sampler.steps, self.keep(request), []
        experts = "dit_low" in self.parts
        cut = denoising.cut(
            request.sampler, experts=experts, single=self.stages.show or (not keep and experts)
        )
        args, later = (
            self.programs.place(denoising.arguments(request.sampler, key, sample, request.latents)),
            [span.expert for span in cut[1:]],
        )
        state, noise = self.start_program(request, args, cut)(*args)
        chunks = self.programs.place(denoising.schedules(request.sampler, cut, noise))
        for chunk, (first, last, name) in zip(chunks, cut, strict=True):
            if name == "dit_low" and not keep:
                self.parts["dit"].free()
            run, model = self.ready(
                name,
                request,
                functools.partial(self.denoise_program, request, state, text, condition, chunk),
            )
            if first == 0:
                wait_for_threads(
                    [
                        *self.programs.coming.values(),
                        *(part.coming for part in self.parts.values()),
                    ],
                    self.stages,
                )
            label = (
                "denoise"
                if last - first > 1 or steps == 1
                else f"denoise: step {first + 1} of {steps}"
            )
            with self.stage(label, request):
                state, ok = run(model, state, text, condition, chunk)
                finite += np.asarray(ok).tolist()
            if first == 0 and not keep and {"dit", "dit_low"} <= set(later):
                self.stage_second(request)
        if not keep:
            self.parts[cut[-1].expert].free()
        if request.check == "finite" and not all(finite):
            raise memory.not_finite(finite.index(False) + 1, steps, self.config)
        return state if request.sampler.few_step else state.x

    def stage_second(self, request: Request) -> None:
        """The second expert is read into the host's memory while the first one's later steps run,
        where there is room."""
        part = self.parts["dit_low"]
        high = next(p for p in self.plan(request) if p.name.startswith("denoise"))
        if part.stageable and memory.may_stage(high, part.abstract(), memory.memory_limit()):
            part.load_ahead(host=True)

    def decode(self, request: Request, latents: np.ndarray, index: int = 0) -> np.ndarray:
        """Latents f32[1 t h w c] -> uint8 (or float32 in [0, 1]) [1 T H W 3] on the host; chunks go
        to `on_frames` as they come."""
        tiled = self.tiled(request)
        _, vae = self.ready(
            "vae", request, lambda: self.coder.decoder(latents.shape, request.output_type, tiled)
        )
        size, start = request.size, 0
        video = np.empty(
            (1, size.frames, size.height, size.width, 3),
            np.uint8 if request.output_type == "uint8" else np.float32,
        )
        with self.stage("vae decode", request):
            for frames, finite in self.coder.decode(vae, latents, request.output_type, tiled):
                if request.check == "finite" and not finite:
                    raise NotFinite(
                        "the VAE decoder gave NaN or infinity: no video was written",
                        f"it ran in {self.parts['vae'].config.policy.compute}, on finite latents",
                        "try --vae_dtype float32; check the file with python -m convert.validate"
                        " --level values",
                    )
                chunk = video[0, start : start + len(frames)]
                chunk[...], start = frames, start + len(frames)
                if request.on_frames is not None:
                    request.on_frames(index, chunk)
        return video

    # -- the call ----------------------------------------------------------------------------------

    def __call__(self, prompt: str | list[str] | None = None, **arguments: Any) -> Result:
        """Make videos.

        prompt: text, or a list of texts (one video each, in order).
        image (path, PIL image or uint8 [H W 3]); fit "crop" | "pad" | "stretch" | "adaptive";
        resolution and aspect_ratio, or width and height; num_frames (4k+1); num_steps, sigma_max,
        mid_t, sampler, boundary, shift, guidance_scale, negative_prompt; seed, or key (a jax.random
        key); num_samples; latents (start noise [1 t h w c]); prompt_embeds [b s d]; output_type
        "uint8" | "float" | "latent"; check "finite" | "none"; on_frames(index, frames), called with
        each chunk [t H W 3] of video number `index` as soon as it is decoded. Names of diffusers
        and TurboDiffusion are accepted.

        Same seed, shapes, version and device kind: same bits. Sample i of a prompt uses
        fold_in(key, i).
        """
        request = self.request(prompt, **arguments)
        first = len(self.stages.rows)
        for line in self.warnings(request):
            self.stages.note(line)
        try:
            latents, frames = self.videos(request)
        except jax.errors.JaxRuntimeError as error:  # between stages: compiling, or placing inputs
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise memory.out_of_memory(
                "compile", self.plan(request), memory.memory_limit()
            ) from error
        finally:
            self.programs.forget()
            if not self.keep(request):
                self.free()
        timings = self.stages.seconds(first)
        return Result(
            frames=joined(frames) if frames else None,
            latents=np.concatenate(latents),
            seed=request.seed,
            fps=request.fps,
            timings=timings,
            metadata={**self.facts(request), "timings": timings},
        )

    def facts(self, request: Request) -> dict[str, Any]:
        """Everything needed to make the same videos again, as JSON values."""
        return describe(self.name, request, self.parts)

    def videos(self, request: Request) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """(latents, frames) of every prompt and sample, through all stages."""
        if not self.kernels_checked:
            check_kernels(self.config, self.stages)
            self.kernels_checked = True
        self.begin(request)
        texts, keep = self.texts(request), self.keep(request)
        condition = self.encode_image(request) if self.task == "i2v" else None
        key = jax.random.key(request.seed) if request.key is None else request.key
        latents, frames = [], []
        for text in texts:
            text = self.programs.place(text)
            for sample in range(request.num_samples):
                if not keep:
                    self.free("vae")
                x = self.denoise(request, key, sample, text, condition)
                latents.append(np.asarray(x))
                if request.output_type != "latent":
                    frames.append(self.decode(request, latents[-1], len(frames)))
        return latents, frames

    def warnings(self, request: Request) -> list[str]:
        """What a user should know before waiting: the prompt's length, an unusual size, weights
        that need many steps."""
        lines = size_notes(request.size, request.resolution) if self.resolution else []
        lines += reference_notes(self.config) + sampler_notes(
            request.sampler, self.name, self.distilled, "dit_low" in self.parts
        )
        if request.prompt_embeds is None:
            for text in request.prompts:
                lines += (
                    language_warnings(self.language, text)
                    if self.language
                    else prompt_warnings(self.tokenizer, text)
                )
        return lines

    def free(self, *names: str) -> None:
        """Drop weights from the device: the named parts ("text", "vae", "dit", "dit_low"), or
        all."""
        for name in names or tuple(self.parts):
            self.parts[name].free()

    def memory(self) -> dict[str, int]:
        """XLA's count of peak bytes on a device for every stage compiled so far."""
        return self.programs.memory()
