"""load() and Pipeline: the order of stages, what is resident when, and what is freed.

text encoder -> embeddings      (then freed unless everything fits together)
VAE encoder  -> image condition (image-to-video only)
transformer  -> latents         (two experts: high noise, swap, low noise)
VAE decoder  -> frames
"""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tdjax import demo, flow, plan, programs, sampler, teacher
from tdjax.arguments import PATHS
from tdjax.conditioning import image_condition, image_video
from tdjax.config import I2V_SAMPLER, PRESETS, QUANT, T2V_SAMPLER, DiTConfig, VideoSize
from tdjax.errors import NotFinite, UsageError
from tdjax.guard import check_kernels
from tdjax.locate import Located, cache_folder, locate
from tdjax.mesh import make_mesh
from tdjax.parts import Lora, Part, check_vocabulary, open_parts, reference_notes
from tdjax.request import Request, check_choice, make_request
from tdjax.resolution import fit_image, size_notes
from tdjax.result import Result, describe
from tdjax.stages import Stages
from tdjax.tokenizer import Tokenizer, language_warnings, prompt_warnings


def load(
    model: str | Path = "demo",
    *,
    attention: str = "auto",
    attention_impl: str = "auto",
    quant: str = "auto",
    dtype: str = "auto",
    vae_dtype: str | None = None,
    sla_topk: float | None = None,
    mesh: str | None = None,
    low_memory: bool = False,
    text_encoder: bool = True,
    lora: Lora = (),
    lora_high: Lora = (),
    lora_low: Lora = (),
    revision: str | None = None,
    offline: bool = False,
    cache_dir: str | Path | None = None,
    stages: Stages | None = None,
    **paths: str | Path | None,
) -> Pipeline:
    """Open a model for generation. No weights are read yet: each stage loads its own.

    model:      a name of PRESETS, a hub id (org/name), a published .pth or .safetensors file, a folder of published
                files, a diffusers folder, a folder written by `python -m convert`, or "demo".
    attention:  "auto" (sla where the weights have its projection), "original" (dense), "sla", "sagesla".
    quant:      "auto" (as stored), "none" (dequantise at load), or quantise at load: "int8" (the published scheme, tiles of
                128 x 128), "int8_channel" or "fp8" (a scale for each token and each output channel; faster on GPUs).
    attention_impl: "auto", "reference", "triton" (the kernels of this package wherever there is one, in linear layers and norms
                too), "cudnn" (dense attention).
    dtype:      "auto" (bfloat16 on an accelerator, float32 on a CPU), "bfloat16", "float16", "float32".
    mesh:       several devices for one video, for example "sp=4" or "tp=2,sp=2".
    low_memory: free every part as soon as its stage ends, also where all would fit together.
    text_encoder: False where only prompt_embeds will be given: the text encoder and the tokenizer need not be there.
    lora:       ((file, weight), ...) merged at load into every expert; lora_high and lora_low into one.
    paths:      dit_path, high_noise_model_path, low_noise_model_path, vae_path, text_encoder_path, tokenizer_path.
    Raises CheckpointError for files that are missing, damaged or of another kind; UsageError for bad arguments.
    """
    check_choice("attention", attention, ("auto", "original", "dense", "sla", "sagesla"))
    check_choice("quant", quant, QUANT)
    check_choice("dtype", dtype, ("auto", "bfloat16", "float16", "float32"))
    check_choice("vae_dtype", vae_dtype or dtype, ("auto", "bfloat16", "float16", "float32"))
    check_choice("attention_impl", attention_impl, ("auto", "reference", "triton", "cudnn"))
    for name in paths:
        check_choice("an argument of load", name, PATHS)
    stages = stages or Stages(show=False)
    if str(model) == "demo" and not any(paths.values()):
        model = demo.folder(Path(cache_dir) if cache_dir else cache_folder())
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    with stages("open"):
        wanted = ("dit", "vae", "text", "tokenizer") if text_encoder else ("dit", "vae")
        located = locate(str(model), revision=revision, offline=offline, parts=wanted, **paths)
        for line in located.warnings:
            stages.note(line)
        parts = open_parts(
            located,
            attention=attention,
            impl=attention_impl,
            quant=quant,
            topk=sla_topk,
            dtype=dtype,
            vae_dtype=vae_dtype or dtype,
            lora={"dit": (*lora, *lora_high), "dit_low": (*lora, *lora_low)},
            note=stages.note,
        )
    return Pipeline(located, parts, mesh=mesh, low_memory=low_memory, stages=stages)


class Pipeline:
    """Text or image to video. Made by `load`; call it with a prompt, see `__call__`."""

    def __init__(self, located: Located, parts: dict[str, Part], *, mesh: str | None, low_memory: bool, stages: Stages):
        self.parts, self.low_memory, self.stages = parts, low_memory, stages
        self.mesh = make_mesh(mesh, self.config)
        for part in parts.values():
            part.mesh = self.mesh
        self.programs = programs.Programs(self.mesh)
        self.kernels_checked = False
        self.tokenizer = None if located.tokenizer is None else Tokenizer(located.tokenizer, self.text_len)
        check_vocabulary(self.tokenizer, parts.get("text"))
        facts, preset = located.facts, PRESETS.get(located.preset or "")
        self.name = facts.get("name", located.name)
        self.trained, self.prompts, self.language = facts.get("trained", True), facts.get("prompts", []), facts.get("language")
        self.distilled = located.distilled
        self.resolution = None if "width" in facts else preset.resolution if preset else "480p"
        self.size = VideoSize(**{k: facts[k] for k in ("frames", "height", "width") if k in facts})
        own = {name: tuple(value) if isinstance(value, list) else value for name, value in facts.get("sampler", {}).items()}
        self.sampler = dataclasses.replace(preset.sampler if preset else I2V_SAMPLER if self.task == "i2v" else T2V_SAMPLER, **own)

    def default_prompt(self, seed: int) -> str | None:
        """A prompt that suits the model, another one for each seed; None for models that name none."""
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

    # -- before anything runs ------------------------------------------------------------------------------------------

    def request(self, prompt: str | list[str] | None = None, **arguments: Any) -> Request:
        """The checked arguments of a call; raises UsageError before any long work."""
        prompts = (prompt,) if isinstance(prompt, str) else tuple(prompt or ())
        request = make_request(prompts, arguments, task=self.task, size=self.size, resolution=self.resolution, sampler=self.sampler)
        if request.sampler.guidance != 1.0 and "text" not in self.parts:
            raise UsageError(
                "guidance without a text encoder", "the negative prompt is encoded by it", "give the prompt itself, or guidance 1"
            )
        request.check_arrays(latents=self.latent_shape(request), embeds=(self.text_len, self.config.text_dim))
        return request

    def latent_shape(self, request: Request) -> tuple[int, ...]:
        """(1, t, h, w, c) of the latents of one video."""
        return (1, *request.size.latent_grid, self.config.out_channels)

    def plan(self, request: Request) -> list[plan.StagePlan]:
        """Memory of each stage for a request; nothing is loaded."""
        parts = {name: (part.config, part.abstract()) for name, part in self.parts.items()}
        return plan.stage_plans(parts, request.size, image=self.task == "i2v", guided=request.sampler.guidance != 1.0)

    def keep(self, request: Request) -> bool:
        """Whether all weights stay on the device between stages."""
        return plan.keep_resident(self.plan(request), plan.memory_limit(), self.low_memory)

    def warmup(self, prompt: str = "warm up", **arguments: Any) -> None:
        """Compile every stage for a size and a number of steps; no weights are loaded.

        With the persistent compile cache this serves later processes too.
        """
        if self.task == "i2v" and arguments.get("image") is None:
            arguments["image"] = np.zeros((self.size.height, self.size.width, 3), np.uint8)
        request = self.request(prompt, **arguments)
        if "text" in self.parts:
            self.text_program()
        grid = self.latent_shape(request)
        shape = self.programs.shape
        condition = None
        if self.task == "i2v":
            self.programs.get(self.stages, "vae encode", programs.encode_image, self.parts["vae"].abstract(), self.video_shape(request))
            condition = shape((*grid[:-1], self.config.condition_channels))
        text = shape((self.text_rows(request), self.text_len, self.config.text_dim), self.config.policy.compute_dtype)
        for single in (False, True):  # the whole loop, and its single steps for a terminal
            state, chunks = self.start(request, jax.random.key(0), single=single)
            for chunk, *_ in chunks:
                self.denoise_program(request, self.programs.place(state), text, condition, self.programs.place(chunk))
        if request.output_type != "latent":
            self.decode_program(request)

    # -- the stages ----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def stage(self, name: str, request: Request):
        """A timed stage; running out of memory in it becomes an OutOfMemory that names it."""
        try:
            with self.stages(name):
                yield
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise plan.out_of_memory(name, self.plan(request), plan.memory_limit()) from error

    def loaded(self, name: str, request: Request):
        """The module of a part, loaded in a stage of its own unless it is there already."""
        part = self.parts[name]
        if part.module is None:
            with self.stage(f"load {name}", request):
                part.load()
        return part.module

    def text_program(self):
        row = self.programs.shape((1, self.text_len), jnp.int32)
        return self.programs.get(self.stages, "text", programs.encode_text, self.parts["text"].abstract(), row, row)

    def embed(self, prompts: str | list[str], *, request: Request | None = None) -> np.ndarray:
        """Prompts -> embeddings [b s d] on the host, one prompt at a time through the text encoder."""
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if self.tokenizer is None or "text" not in self.parts:
            raise UsageError("this model was opened without a text encoder", "a prompt cannot be encoded", "give prompt_embeds")
        request = request or Request(prompts=tuple(prompts), size=self.size, sampler=self.sampler)
        tokens, run = self.tokenizer.encode(prompts), self.text_program()
        encoder = self.loaded("text", request)
        with self.stage("text", request):
            rows = [run(encoder, *self.programs.place((tokens.ids[i : i + 1], tokens.mask[i : i + 1]))) for i in range(len(prompts))]
            embeds = np.concatenate([np.asarray(row) for row in rows])
        if not self.keep(request):
            self.parts["text"].free()
        return embeds

    def text_rows(self, request: Request) -> int:
        return 2 if request.sampler.guidance != 1.0 else 1

    def texts(self, request: Request) -> list[np.ndarray]:
        """For each prompt what the transformer reads: [1 s d], or prompt and negative prompt [2 s d] under guidance."""
        prompts = list(request.prompts) if request.prompt_embeds is None else []
        negative = [request.negative_prompt] * (self.text_rows(request) - 1)
        rows = self.embed(prompts + negative, request=request) if prompts + negative else np.zeros((0,))
        embeds = rows[: len(prompts)] if request.prompt_embeds is None else request.prompt_embeds
        dtype = self.config.policy.compute_dtype
        return [np.concatenate([row[None], rows[len(prompts) :]]).astype(dtype) if negative else row[None].astype(dtype) for row in embeds]

    def video_shape(self, request: Request):
        return self.programs.shape((1, request.size.frames, request.size.height, request.size.width, 3))

    def encode_image(self, request: Request):
        """The image as condition f32[1 t h w 20]: mask of the first latent frame, and latents of the image and grey frames."""
        run = self.programs.get(self.stages, "vae encode", programs.encode_image, self.parts["vae"].abstract(), self.video_shape(request))
        vae = self.loaded("vae", request)
        with self.stage("vae encode", request):
            video = self.programs.place(image_video(fit_image(request.image, request.size, request.fit), request.size))
            return jax.block_until_ready(self.programs.place(image_condition(run(vae, video))))

    def start(self, request: Request, key, *, single: bool):
        """(state, [(schedule, first step, last step + 1, expert)]): the loop cut where experts change, or into single steps
        where progress is shown. A cut changes no bit of the result."""
        cfg, shape = request.sampler, self.latent_shape(request)
        noise = programs.start_noise(key, cfg.steps if cfg.mode == "sde" else 1, shape)
        first = noise[0] if request.latents is None else jnp.array(request.latents, jnp.float32)  # a copy: the state is donated
        times = flow.times(cfg)
        swap = flow.split_times(times, cfg.boundary) if "dit_low" in self.parts else cfg.steps
        cuts = sorted({0, swap, cfg.steps} | (set(range(cfg.steps)) if single else set()))
        spans = [(a, b, "dit" if a < swap else "dit_low") for a, b in zip(cuts, cuts[1:], strict=False)]
        if cfg.few_step:
            state, later = sampler.start(first, times), sampler.injected(noise)
            cut = lambda a, b: (later[a:b] if cfg.mode == "sde" else None, jnp.asarray(times[a : b + 1]))
        else:
            state, rows = sampler.teacher_start(first), teacher.rows(cfg)
            cut = lambda a, b: jax.tree.map(jnp.asarray, rows.part(a, b))
        return state, [(cut(a, b), a, b, name) for a, b, name in spans]

    def denoise_program(self, request: Request, state, text, condition, chunk):
        cfg, model = request.sampler, self.parts["dit"].abstract()
        function, static = programs.denoise, {"mode": cfg.mode}
        if not cfg.few_step:
            function, static = programs.denoise_guided, {"guidance": cfg.guidance}
        return self.programs.get(self.stages, "denoise", function, model, state, text, condition, chunk, donate=(1,), **static)

    def denoise(self, request: Request, key, text, condition):
        """-> latents f32[1 t h w c] on the device. Raises NotFinite with the first bad step."""
        steps, keep, finite = request.sampler.steps, self.keep(request), []
        state, chunks = self.start(request, key, single=self.stages.show)
        state = self.programs.place(state)
        for chunk, first, last, name in chunks:
            chunk = self.programs.place(chunk)
            run = self.denoise_program(request, state, text, condition, chunk)
            if name == "dit_low" and not keep:
                self.parts["dit"].free()
            model = self.loaded(name, request)
            label = "denoise" if last - first > 1 or steps == 1 else f"denoise: step {first + 1} of {steps}"
            with self.stage(label, request):
                state, ok = run(model, state, text, condition, chunk)
                finite += np.asarray(ok).tolist()
        if not keep:
            self.parts[chunks[-1][3]].free()
        if request.check == "finite" and not all(finite):
            raise plan.not_finite(finite.index(False) + 1, steps, self.config)
        return state if request.sampler.few_step else state.x

    def decode_program(self, request: Request):
        latents = self.programs.shape(self.latent_shape(request))
        return self.programs.get(
            self.stages, "vae decode", programs.decode, self.parts["vae"].abstract(), latents, output=request.output_type
        )

    def decode(self, request: Request, latents) -> np.ndarray:
        """Latents f32[1 t h w c] -> uint8 (or float32 in [0, 1]) [1 T H W 3] on the host."""
        run, vae = self.decode_program(request), self.loaded("vae", request)
        with self.stage("vae decode", request):
            frames, finite = run(vae, latents)
            if request.check == "finite" and not bool(finite):
                raise NotFinite(
                    "the VAE decoder gave NaN or infinity: no video was written",
                    f"it ran in {self.parts['vae'].config.policy.compute}, on finite latents",
                    "try --vae_dtype float32; check the file with python -m convert.validate --level values",
                )
            return np.asarray(frames)

    # -- the call ------------------------------------------------------------------------------------------------------

    def __call__(self, prompt: str | list[str] | None = None, **arguments: Any) -> Result:
        """Make videos.

        prompt: text, or a list of texts (one video each, in order).
        image (path, PIL image or uint8 [H W 3]); fit "crop" | "pad" | "stretch" | "adaptive"; resolution and aspect_ratio, or
        width and height; num_frames (4k+1); num_steps, sigma_max, mid_t, sampler, boundary, shift, guidance_scale,
        negative_prompt; seed, or key (a jax.random key); num_samples; latents (start noise [1 t h w c]); prompt_embeds [b s d];
        output_type "uint8" | "float" | "latent"; check "finite" | "none". Names of diffusers and TurboDiffusion are accepted.

        Same seed, shapes, version and device kind: same bits. Sample i of a prompt uses fold_in(key, i).
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
            raise plan.out_of_memory("compile", self.plan(request), plan.memory_limit()) from error
        finally:
            if not self.keep(request):
                self.free()
        timings = self.stages.seconds(first)
        return Result(
            frames=np.concatenate(frames) if frames else None,
            latents=np.concatenate(latents),
            seed=request.seed,
            fps=request.fps,
            timings=timings,
            metadata=describe(self.name, self.trained, request, self.parts, timings),
        )

    def videos(self, request: Request) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """(latents, frames) of every prompt and sample, through all stages."""
        if not self.kernels_checked:
            check_kernels(self.config, self.stages)
            self.kernels_checked = True
        texts, keep = self.texts(request), self.keep(request)
        condition = self.encode_image(request) if self.task == "i2v" else None
        key = jax.random.key(request.seed) if request.key is None else request.key
        latents, frames = [], []
        for text in texts:
            text = self.programs.place(text)
            for sample in range(request.num_samples):
                if not keep:
                    self.free("vae")
                x = self.denoise(request, jax.random.fold_in(key, sample), text, condition)
                latents.append(np.asarray(x))
                if request.output_type != "latent":
                    frames.append(self.decode(request, x))
        return latents, frames

    def warnings(self, request: Request) -> list[str]:
        """What a user should know before waiting: the prompt's length, an unusual size, weights that need many steps."""
        lines = size_notes(request.size, request.resolution) if self.resolution else []
        lines += reference_notes(self.config)
        if request.prompt_embeds is None and self.trained:
            for text in request.prompts:
                lines += language_warnings(self.language, text) if self.language else prompt_warnings(self.tokenizer, text)
        if not self.distilled and request.sampler.few_step:
            lines.append(
                f"{self.name} looks like undistilled Wan weights (by its name): {request.sampler.steps} steps give poor video; "
                "use --sampler unipc --num_steps 50 --guidance_scale 5, or a TurboWan file"
            )
        if "dit_low" in self.parts and flow.split_times(flow.times(request.sampler), request.sampler.boundary) == request.sampler.steps:
            lines.append(
                f"all {request.sampler.steps} steps lie above the boundary {request.sampler.boundary:g}: the low-noise expert is not used"
            )
        return lines

    def free(self, *names: str) -> None:
        """Drop weights from the device: the named parts ("text", "vae", "dit", "dit_low"), or all."""
        for name in names or tuple(self.parts):
            self.parts[name].free()

    def memory(self) -> dict[str, int]:
        """XLA's count of peak bytes on a device for every stage compiled so far."""
        return self.programs.memory()
