"""load(): a model's name, files or folder to a Pipeline; nothing is read yet."""

from __future__ import annotations

from pathlib import Path

import jax

from tdjax.checkpoints import demo
from tdjax.checkpoints.locate import PATHS, cache_folder, locate
from tdjax.config import QUANT
from tdjax.pipeline.components import Lora, open_parts
from tdjax.pipeline.pipeline import TEXT_DEVICES, VAE_WAYS, Pipeline
from tdjax.pipeline.request import check_choice
from tdjax.progress import Stages
from tdjax.text.prompt_cache import FOLDER, PromptCache


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
    text_encoder_device: str = "auto",
    vae: str = "auto",
    prompt_cache: bool = True,
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

    model:      a name of PRESETS, a hub id (org/name), a published .pth or .safetensors file, a
                folder of published files, a diffusers folder, a folder written by `python -m
                convert`, or "demo".
    attention:  "auto" (sla where the weights have its projection), "original" (dense), "sla",
                "sagesla".
    quant:      "auto" (as stored), "none" (dequantise at load), or quantise at load: "int8" (the
                published scheme, tiles of 128 x 128), "int8_channel" or "fp8" (a scale for each
                token and each output channel; faster on GPUs).
    attention_impl: "auto", "reference", "triton" (the kernels of this package wherever there is
                one, in linear layers and norms too), "cudnn" (dense attention).
    dtype:      "auto" (bfloat16 on an accelerator, float32 on a CPU), "bfloat16", "float16",
                "float32".
    mesh:       several devices for one video, for example "sp=4" or "tp=2,sp=2".
    low_memory: free every part as soon as its stage ends, also where all would fit together; the
                text encoder is streamed unless text_encoder_device says otherwise.
    text_encoder: False where only prompt_embeds will be given: the text encoder and the tokenizer
                  need not be there.
    text_encoder_device: "device" (all of it, as the other parts), "stream" (a layer at a time from
                the file: no weights stay), or "auto": the device if everything fits there together,
                          else stream. The same embeddings.
    vae:        "full" (whole frames), "tiled" (overlapping tiles of 320 pixels with blended seams,
                for small GPUs: close to the same frames), or "auto": tiled where the whole frame
                                does not fit.
    prompt_cache: keep embeddings of prompts on disk (`tdjax.text.prompt_cache`), so that a repeated
                  prompt needs no text encoder.
    lora:       ((file, weight), ...) merged at load into every expert; lora_high and lora_low into
                one.
    paths:      dit_path, high_noise_model_path, low_noise_model_path, vae_path, text_encoder_path,
                tokenizer_path.
    Raises CheckpointError for files that are missing, damaged or of another kind; UsageError for
        bad arguments.
    """
    check_choice("attention", attention, ("auto", "original", "dense", "sla", "sagesla"))
    check_choice("quant", quant, QUANT)
    check_choice("dtype", dtype, ("auto", "bfloat16", "float16", "float32"))
    check_choice("vae_dtype", vae_dtype or dtype, ("auto", "bfloat16", "float16", "float32"))
    check_choice("text_encoder_device", text_encoder_device, TEXT_DEVICES)
    check_choice("vae", vae, VAE_WAYS)
    check_choice("attention_impl", attention_impl, ("auto", "reference", "triton", "cudnn"))
    for name in paths:
        check_choice("an argument of load", name, PATHS)
    stages, cache = stages or Stages(show=False), Path(cache_dir) if cache_dir else cache_folder()
    if str(model) == "demo" and not any(paths.values()):
        model = demo.folder()
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
    return Pipeline(
        located,
        parts,
        mesh=mesh,
        low_memory=low_memory,
        stages=stages,
        text_encoder_device=text_encoder_device,
        vae=vae,
        prompt_cache=PromptCache(cache / FOLDER) if prompt_cache else None,
    )
