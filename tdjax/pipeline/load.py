"""load(): a model's name, files or folder to a Pipeline; nothing is read yet."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Unpack

import jax
import numpy as np
from jax.sharding import Mesh

from pallas_kernels import mosaic
from tdjax.checkpoints import compiled, demo, filenames, orbax, scheduler
from tdjax.checkpoints.filenames import telling
from tdjax.checkpoints.locate import Located, cache_folder, locate
from tdjax.checkpoints.published.detect import kind_of
from tdjax.checkpoints.published.files import open_source
from tdjax.checkpoints.recipes import of_names, recognise
from tdjax.config import DiTConfig
from tdjax.config.values import settled, shown, switch
from tdjax.errors import CheckpointError, UsageError
from tdjax.parallel.mesh import every_device
from tdjax.pipeline.adapters import adapt
from tdjax.pipeline.components import Component, PlannedComponent, open_component
from tdjax.pipeline.options import (
    Attention,
    DType,
    Impl,
    LoadAliases,
    Lora,
    PipelineOptions,
    Quant,
    TextEncoderDevice,
    TransformerDevice,
    VAEDecoding,
    refuse_experts,
    without_aliases,
)
from tdjax.pipeline.pipeline import Pipeline
from tdjax.precision import Policy
from tdjax.presets import PRESETS, TEACHER_SAMPLER, UMT5_XXL, WAN_VAE
from tdjax.progress import LibraryStages, Stages
from tdjax.text.prompt_cache import FOLDER, PromptCache


def load(
    model: str | Path = "demo",
    *,
    attention: Attention = "auto",
    impl: Impl = "auto",
    quant: Quant = "auto",
    dtype: DType = "auto",
    vae_dtype: DType | None = None,
    sla_topk: float | None = None,
    mesh: str | int | Mesh | None = None,
    low_memory: bool = False,
    text_encoder: bool = True,
    text_encoder_device: TextEncoderDevice = "auto",
    transformer_device: TransformerDevice = "auto",
    vae: VAEDecoding = "auto",
    prompt_cache: bool = True,
    lora: Lora = (),
    lora_high: Lora = (),
    lora_low: Lora = (),
    dit_path: str | Path | None = None,
    high_noise_model_path: str | Path | None = None,
    low_noise_model_path: str | Path | None = None,
    vae_path: str | Path | None = None,
    text_encoder_path: str | Path | None = None,
    tokenizer_path: str | Path | None = None,
    revision: str | None = None,
    offline: bool = False,
    cache_dir: str | Path | None = None,
    compile_cache: bool | str | Path = True,
    progress: bool | None = None,
    stages: Stages | None = None,
    **aliases: Unpack[LoadAliases],
) -> Pipeline:
    """Opens a model for generation. No weights are read yet: each stage loads its own.

    model:      a name of PRESETS, a hub id (org/name), a published .pth or .safetensors file, a
                folder of published files, a diffusers folder, a folder written by `python -m
                convert`, or "demo".
    attention:  "auto" (sla where the weights have its projection), "original" (dense), "sla",
                "sagesla".
    impl:       "auto" (the kernels that this device has), "reference", "triton" (the Triton kernels
                of this package wherever there is one, in linear layers and norms too), "mosaic"
                (kernels for Hopper in sparse attention and 8-bit layers: what auto takes there,
                faster and slower to compile than triton), "cudnn" (dense attention). Also accepted
                as attention_impl.
    quant:      "auto" (as stored), "none" (dequantise at load), or quantise at load: "int8" (the
                published scheme, tiles of 128 x 128), "int8_channel" or "fp8" (a scale for each
                token and each output channel; faster on GPUs).
    dtype:      "auto" (bfloat16 on an accelerator, float32 on a CPU), "bfloat16", "float16",
                "float32". vae_dtype: the VAE's, where it is another.
    sla_topk:   share of key blocks that sparse attention keeps, in place of the weights' own.
    mesh:       several devices, for example "sp=4" or "tp=2,sp=2"; 4 is "sp=4", "auto" is sp over
                all GPUs; or a jax.sharding.Mesh whose axes have these names. For one video: sp
                divides its tokens, tp heads and the MLP, fsdp the parameters, cfg=2 the two halves
                of each guided step (nothing without guidance). For several videos of one call, of
                one prompt or of several: dp=2 denoises two at a time, each on its own copy of the
                weights, with the noise that it has alone. They are told of together, see the
                pipeline's call. Axes go together: dp=2,cfg=2,sp=2 takes eight devices. After
                jax.distributed.initialize() the mesh is over the devices of all processes, which
                make each video together.
    low_memory: free every component as soon as its stage ends, also where all would fit together;
                the text encoder is streamed unless text_encoder_device says otherwise.
    text_encoder: False where only prompt_embeds will be given: the text encoder and the tokenizer
                need not be there.
    text_encoder_device: "device" (all of it, as the other components), "stream" (a layer at a time
                from the file: no weights stay), or "auto": the device if everything fits there
                together, else stream. The same embeddings.
    transformer_device: "device" (all of it), "stream" (blocks wait in page-locked memory of the
                host and pass through the device one after another, each copied while the one before
                it runs), or "auto": stream where the transformer does not fit on the device.
    vae:        "full" (whole frames), "tiled" (overlapping tiles of 320 pixels with blended seams,
                for small GPUs: close to the same frames), or "auto": tiled where the whole frame
                does not fit.
    prompt_cache: keep embeddings of prompts on disk (`tdjax.text.prompt_cache`), so that a repeated
                prompt needs no text encoder.
    lora:       a file, a (file, weight) pair, or a list of them, merged at load into every expert;
                lora_high and lora_low into one.
    *_path:     files that replace those of the model.
    revision:   of the hub repository. offline: never ask the hub.
    cache_dir:  where tdjax keeps its own files.
    compile_cache: keep compiled programs on disk, where the command does, so that the next process
                starts in seconds: True, False, or a folder. It is a setting of JAX and of the whole
                process; one that was made before is left as it is, unless a folder is given.
    progress:   whether calls show a bar; None: in a notebook and on a terminal. stages: a
                tdjax.progress.Stages, where progress is told instead.
    Raises CheckpointError for files that are missing, damaged or of another kind; UsageError for
        bad arguments.
    """
    defaults = {"impl": "auto", "attention": "auto", "offline": False}
    given = {"impl": impl, "attention": attention, "offline": offline, **aliases}
    own = without_aliases(given, LoadAliases, _ACCEPTED, defaults)
    options = PipelineOptions(
        attention=own["attention"],
        impl=own["impl"],
        quant=quant,
        dtype=dtype,
        vae_dtype=vae_dtype,
        sla_topk=sla_topk,
        mesh=mesh,
        low_memory=low_memory,
        text_encoder=text_encoder,
        text_encoder_device=text_encoder_device,
        transformer_device=transformer_device,
        vae=vae,
        prompt_cache=prompt_cache,
        lora=lora,
        lora_high=lora_high,
        lora_low=lora_low,
    )
    paths = {
        "dit_path": dit_path,
        "high_noise_model_path": high_noise_model_path,
        "low_noise_model_path": low_noise_model_path,
        "vae_path": vae_path,
        "text_encoder_path": text_encoder_path,
        "tokenizer_path": tokenizer_path,
    }
    progress = settled("progress", progress, "bool | None")
    stages = LibraryStages(progress) if stages is None else stages
    note = _keep_programs(compile_cache)
    pipe = open_pipeline(
        model,
        options,
        paths,
        revision=revision,
        offline=own["offline"],
        cache_dir=cache_dir,
        stages=stages,
    )
    if note:
        pipe.stages.note(note)
    return pipe


def _keep_programs(asked: bool | str | Path) -> str | None:
    """Turns the cache of compiled programs on; a line for the user where it cannot be written."""
    if isinstance(asked, bool | np.bool_):
        return compiled.keep_programs() if asked else None
    return compiled.keep_programs(Path(settled("compile_cache", asked, "str | Path")).expanduser())


_ACCEPTED = tuple(name for name in load.__annotations__ if name not in ("return", "aliases"))


def open_pipeline(
    model: str | Path,
    options: PipelineOptions,
    paths: dict[str, str | Path | None],
    *,
    revision: str | None = None,
    offline: bool = False,
    cache_dir: str | Path | None = None,
    stages: Stages | None = None,
) -> Pipeline:
    """Returns the pipeline of a model; arguments as those of `load`, the *_path among them in
    `paths`."""
    if stages is not None and not isinstance(stages, Stages):
        raise UsageError(
            f"stages is {shown(stages)}", "it tells of progress", "use tdjax.progress.Stages()"
        )
    stages = stages or LibraryStages(False)
    for name, file in {"model": model, "cache_dir": cache_dir, **paths}.items():
        settled(name, file, "str | Path" if name == "model" else "str | Path | None")
    revision, offline = settled("revision", revision, "str | None"), switch("offline", offline)
    if str(model) == "demo" and (
        not any(paths.values()) or _completed_by_demo(paths.get("dit_path"))
    ):
        model = demo.folder()
    options = options.with_dtype("float32" if jax.default_backend() == "cpu" else "bfloat16")
    if options.mesh == "auto":
        chosen = every_device("sp")
        options = dataclasses.replace(options, mesh=chosen)
        stages.note(f"mesh auto: {chosen or 'one device'}, {jax.devices()[0].device_kind}")
    with stages("open"):
        wanted = ("dit", "vae", "text", "tokenizer") if options.text_encoder else ("dit", "vae")
        _check_kind(Path(model).expanduser())
        located = locate(str(model), revision=revision, offline=offline, parts=wanted, **paths)
        for line in located.warnings:
            stages.note(line)
        components = open_components(located, options, stages.note)
        located = _with_recipe(located, components, stages.note)
    cache = None
    if options.prompt_cache:
        cache = PromptCache(
            (Path(cache_dir).expanduser() if cache_dir else cache_folder()) / FOLDER
        )
    return Pipeline(located, components, options, stages=stages, prompt_cache=cache)


def _completed_by_demo(transformer: str | Path | None) -> bool:
    """Whether the demo's VAE and text encoder go with a transformer in our layout: with one that
    was trained on what they encode."""
    if transformer is None or not (Path(transformer) / "manifest.json").is_file():
        return False
    paths = (transformer, demo.folder() / "dit")
    given, own = (orbax.config_of(orbax.inspect(path)) for path in paths)
    if not isinstance(given, DiTConfig) or not isinstance(own, DiTConfig):
        return False
    return (given.out_channels, given.text_dim) == (own.out_channels, own.text_dim)


def _check_kind(model: Path) -> None:
    """Raises CheckpointError for a file that is no network: a LoRA, or a damaged file, is told
    before what is missing beside it."""
    if model.is_file() and filenames.is_weights(model.name):
        kind_of(open_source(model).tensors, model.name)


def _swapped_lora(high: Iterable[tuple[str, float]], low: Iterable[tuple[str, float]]) -> list[str]:
    """Lines about LoRA files whose names say the other expert."""
    given = {"lora_high": ("low", high), "lora_low": ("high", low)}
    return [
        f"{Path(file).name} was given as {argument}, but its name says {other}"
        for argument, (other, files) in given.items()
        for file, _ in files
        if filenames.expert(Path(file).name) == other
    ]


def _with_recipe(
    located: Located, components: dict[str, Component], note: Callable[[str], None]
) -> Located:
    """The model with the sampler that its weights were made for, where neither a preset nor its own
    folder says it; LoRA files that make undistilled weights need few steps say it of both."""
    dits = [components[name] for name in ("dit", "dit_low") if name in components]
    files = [file for dit in dits for file, _ in (*dit.lora, *dit.beside)]
    lora = [name for file in files for name in telling(Path(file))]
    if located.preset in PRESETS or located.facts:
        found = None if located.distilled else of_names(lora, dits[0].config.task)
    else:
        names = [name for dit in dits for name in dit.names]
        found = recognise(names, dits[0].stored, gates=dits[0].gates, lora=lora)
    if found is not None:
        note(found.line())
        facts = {**located.facts, "sampler": dataclasses.asdict(found.sampler)}
        located = dataclasses.replace(located, distilled=found.distilled, facts=facts)
    return _with_scheduler(located, note)


def _with_scheduler(located: Located, note: Callable[[str], None]) -> Located:
    """Weights of a diffusers folder with the boundary between two experts that they were saved
    with, and undistilled ones with their sampler."""
    if located.layout != "diffusers":
        return located
    folder, saved = located.dit[0].parent, {}
    if not located.distilled and (saved := scheduler.saved_sampler(folder)):
        note(f"{scheduler.FILE}: {saved['sampler']} with `shift` {saved['shift']:g}")
    boundary = scheduler.saved_boundary(folder) if len(located.dit) == 2 else None
    if boundary is not None:
        note(f"{scheduler.INDEX}: `boundary` {boundary:g}")
        saved = {**saved, "boundary": boundary}
    if not saved:
        return located
    own = PRESETS[located.preset].sampler if located.preset in PRESETS else TEACHER_SAMPLER
    before = {} if located.distilled else dataclasses.asdict(own)
    before = located.facts.get("sampler", before)
    return dataclasses.replace(located, facts={**located.facts, "sampler": {**before, **saved}})


def plan_pipeline(name: str, options: PipelineOptions, *, stages: Stages | None = None) -> Pipeline:
    """Returns the pipeline of a preset whose files are not here: it can check requests and plan
    their memory, on a GPU unless another dtype was asked for, and nothing else."""
    preset, stages = PRESETS[name], stages or LibraryStages(False)
    options = options.with_dtype("bfloat16")
    options = dataclasses.replace(options, impl="auto", vae_dtype=options.dtype)
    policy = Policy(param=options.dtype, compute=options.dtype)
    components: dict[str, Component] = {}
    for slot, file in zip(("dit", "dit_low"), preset.dit, strict=False):
        components[slot] = PlannedComponent(file, "dit", preset.config)
    config = _transformer_config(components["dit"], options, stages.note)
    for component in components.values():
        component.config = config
    vae, text = (dataclasses.replace(cfg, policy=policy) for cfg in (WAN_VAE, UMT5_XXL))
    components["vae"] = PlannedComponent(preset.vae, "vae", vae)
    components["text"] = PlannedComponent(preset.text, "text", text)
    located = Located(name=name, layout="published", preset=name, distilled=preset.distilled)
    return Pipeline(located, components, options, stages=stages)


def open_components(
    located: Located, options: PipelineOptions, note: Callable[[str], None]
) -> dict[str, Component]:
    """Returns all components with the configs that they will run as; those that cannot work
    together are refused. note: called with lines for the user."""
    _check_impl(options)
    lora = {
        "dit": options.loras("lora", "lora_high"),
        "dit_low": options.loras("lora", "lora_low"),
    }
    for line in _swapped_lora(options.loras("lora_high"), options.loras("lora_low")):
        note(line)
    components: dict[str, Component] = {}
    for name, path in zip(("dit", "dit_low"), located.dit, strict=False):
        second = True if name == "dit_low" else None
        component = components[name] = open_component(
            path, "dit", lora=lora[name], low_noise=second
        )
        component.config = config = _transformer_config(component, options, note)
        if lora[name] and (not component.lora or "float" not in (component.linear, config.linear)):
            component = components[name] = open_component(path, "dit", low_noise=second)
            component.config, component.beside = config, lora[name]
    _make_alike(components, note)
    if "dit_low" not in components:
        refuse_experts(options.lora_high, options.lora_low)
    if located.vae is not None:
        component = components["vae"] = open_component(located.vae, "vae")
        dtype = options.vae_dtype or options.dtype
        policy = Policy(param=dtype, compute=dtype)
        changes: dict[str, Any] = {"policy": policy}
        if component.kind == "vae":  # a small decoder has no kernels
            changes["impl"] = "reference" if options.impl == "reference" else "auto"
        component.config = dataclasses.replace(component.stored, **changes)
    if located.text is not None:
        component = components["text"] = open_component(located.text, "text")
        policy = Policy(param=options.dtype, compute=options.dtype)
        component.config = dataclasses.replace(component.stored, policy=policy)
    _check_together(components)
    for line in adapt(components, (), (), ()) if any(c.beside for c in components.values()) else ():
        note(line)
    _check_bits(components["dit"].config)
    for component in components.values():
        for line in component.notes:
            note(line)
    return components


def _make_alike(components: dict[str, Component], note: Callable[[str], None]) -> None:
    """Gives two experts the same kind of linear layers, as one program runs both: files of them may
    come from different places. That is the kind of the first whose weights have 8 bits."""
    dits = [components[name] for name in ("dit", "dit_low") if name in components]
    kinds = list(dict.fromkeys(dit.config.linear for dit in dits))
    kind = next((kind for kind in kinds if kind != "float"), "float")
    for dit in dits:
        if dit.config.linear != kind:
            note(f"{dit.path.name}: made {kind} at load, as the other expert")
            dit.config = dataclasses.replace(dit.config, linear=kind)


def _check_bits(dit: DiTConfig) -> None:
    """Raises UsageError where JAX makes numbers of 64 bits, and kernels run that have none."""
    wide = jax.config.read("jax_enable_x64")
    if wide and (dit.attention, dit.linear) != ("dense", "float"):
        raise UsageError(
            "jax_enable_x64 is on",
            "the kernels of sparse attention and 8-bit layers take numbers of 32 bits and fewer",
            'jax.config.update("jax_enable_x64", False)',
        )


def _check_impl(options: PipelineOptions) -> None:
    impl, dtype, device = options.impl, options.dtype, jax.default_backend()
    kernels = {
        "cudnn": "cuDNN attention runs",
        "triton": "the Triton kernels run",
        "mosaic": "the Mosaic GPU kernels run",
    }
    if impl in kernels and (device != "gpu" or dtype == "float32"):
        dtypes = "bfloat16" if impl == "triton" else "bfloat16 and float16"
        raise UsageError(
            f"`impl` is {impl!r} on {device} in {dtype}",
            f"{kernels[impl]} on NVIDIA GPUs, in {dtypes}",
            "use auto, or reference",
        )
    reason = mosaic.unavailable() if impl == "mosaic" else None
    if reason:
        raise UsageError("`impl` is 'mosaic'", reason, "use auto, or triton")


def _transformer_config(
    component: Component, options: PipelineOptions, note: Callable[[str], None]
) -> DiTConfig:
    """The stored config with what was asked for."""
    sla: Any = component.stored.sla
    if options.sla_topk is not None:
        sla = dataclasses.replace(sla, topk=options.sla_topk)
    return dataclasses.replace(
        component.stored,
        attention=_chosen_attention(component, options.attention),
        linear=_chosen_linear(component, options.quant, note),
        sla=sla,
        impl=options.impl,
        policy=Policy(param=options.dtype, compute=options.dtype),
    )


def _chosen_attention(component: Component, asked: str) -> str:
    stored = component.stored.attention
    asked = {"original": "dense", "auto": stored}.get(asked, asked)
    if asked != "dense" and stored == "dense":
        raise CheckpointError(
            f"{component.path.name} has no SLA projection (self_attn.attn_op.local_attn.proj_l),"
            f" but `attention` {asked} was asked for",
            "these are dense weights, or rCM weights without SLA",
            "use `attention` original, or merge an SLA difference: python -m convert --merge",
        )
    return asked


def _chosen_linear(component: Component, quant: str, note: Callable[[str], None]) -> str:
    stored, name = component.linear, component.path.name
    linear = {"auto": stored, "none": "float"}.get(quant, quant)
    if stored == "float" or (linear in (stored, "float") and not component.lora):
        return linear  # nothing changes, or what was asked for, and is exact
    if linear == "float":
        what = "dequantised, `lora` added"
    elif linear != stored:
        what = f"made {linear} at load" + (", `lora` beside them" if component.lora else "")
    else:
        what = "`lora` beside them"
    note(f"{name}: {stored} weights in the blocks, {what}")
    return linear


def _check_together(components: dict[str, Component]) -> None:
    """Raises CheckpointError for networks that do not belong together, before anything is read."""
    first, low = components["dit"], components.get("dit_low")
    vae, text = components.get("vae"), components.get("text")
    dit = first.config
    if vae and vae.config.latent_channels != dit.out_channels:
        raise CheckpointError(
            f"{vae.path.name} has {vae.config.latent_channels} latent channels, the transformer"
            f" {dit.out_channels}",
            "Wan2.1 and Wan2.2 A14B use the Wan2.1 VAE (16 latent channels); the Wan2.2 VAE (48)"
            " belongs to TI2V-5B only",
            "give Wan2.1_VAE.pth as vae_path",
        )
    if vae and vae.kind == "tiny_vae" and dit.task == "i2v":
        raise CheckpointError(
            f"{vae.path.name} is a decoder alone",
            "image-to-video needs the VAE's encoder for its first frame",
            "give Wan2.1_VAE.pth as vae_path",
        )
    if text and text.config.dim != dit.text_dim:
        raise CheckpointError(
            f"{text.path.name} gives vectors of {text.config.dim}, the transformer takes"
            f" {dit.text_dim}",
            "Wan models take umT5-xxl (4096)",
            "give models_t5_umt5-xxl-enc-bf16.pth as text_encoder_path",
        )
    if dit.image_dim is not None:
        raise CheckpointError(
            f"{first.path.name} is a Wan2.1 image-to-video network",
            "its image branch needs CLIP features, and tdjax has no CLIP encoder",
            "use turbowan2.2-i2v-a14b-720p, or call tdjax.models.wan_dit.DiT with your own"
            " features",
        )
    if low and low.config != dit:
        raise CheckpointError(
            f"{first.path.name} and {low.path.name} are networks of different kinds",
            f"high noise: {dit}; low noise: {low.config}",
            "give the two files of one release",
        )
