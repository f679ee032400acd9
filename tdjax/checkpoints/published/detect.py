"""What a file is, from its keys, shapes and dtypes: kind, whose names, config. Nothing has to be
said on a command line."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from tdjax.checkpoints.published import tiny_vae, umt5, wan_dit, wan_vae
from tdjax.checkpoints.published.rules import Row
from tdjax.config import (
    KINDS,
    LATENT_MEAN,
    Config,
    DiTConfig,
    TextConfig,
    TinyVAEConfig,
    VAEConfig,
    from_dict,
)
from tdjax.config.parsing import json_object
from tdjax.errors import CheckpointError

HEAD_WIDTH = 128  # of every published Wan transformer
MASK_CHANNELS = 4  # of image-to-video: one for each frame that a latent frame stands for
METADATA = "tdjax"  # text field of a safetensors file in which our export keeps the config

UNSEEN = {  # fields that shapes do not show
    "dit": ("heads", "patch", "text_len", "eps", "sla", "round_time", "coordinates"),
    "vae": ("mean", "std"),
    "tiny_vae": (),
    "text": ("max_distance", "text_len", "eps"),
}
NAMINGS = {"dit": wan_dit, "vae": wan_vae, "tiny_vae": tiny_vae, "text": umt5}
MARKS = {  # a key that only this kind has
    "dit": ("patch_embedding.weight",),
    "vae": ("encoder.conv1.weight", "encoder.conv_in.weight"),
    "tiny_vae": ("decoder.7.conv.weight",),
    "text": (
        "token_embedding.weight",
        "shared.weight",
        "encoder.embed_tokens.weight",
        "token_embd.weight",
    ),
}

WAN21_VAE = "Wan2.1 and Wan2.2 A14B use Wan2.1_VAE.pth (16 latent channels)"
LORA_KEYS = (
    r"(.*\.)?lora_(A|B|up|down)\.|.*\.lora\.(up|down)\.|.*\.(diff|diff_b)$"
    r"|.*\.(lokr|hada)_w[12]"
)
VAE22_KEYS = r"encoder\.downsamples\.0\.downsamples\.|encoder\.down_blocks\.0\.resnets\."
# models of the same family that are not this network: (key pattern, what it is, what to do)
RELATIVES = (
    (LORA_KEYS, "a LoRA, not a model", "give it as `lora` beside its base model"),
    (VAE22_KEYS, "the Wan2.2 TI2V-5B VAE (48 latent channels, here 16)", WAN21_VAE),
    (
        r"vace_",
        "Wan VACE, which has more blocks than this network",
        "give a text- or image-to-video model",
    ),
    (
        r"img_emb\.emb_pos",
        "Wan2.1 FLF2V (first and last frame)",
        "give Wan2.1 I2V or Wan2.2 I2V A14B",
    ),
    (
        r"control_adapter\.|ref_conv\.",
        "a Wan Fun control model",
        "give a text- or image-to-video model",
    ),
    (
        r"audio_|casual_audio_encoder\.",
        "a Wan speech-to-video model",
        "give a text- or image-to-video model",
    ),
    (
        r"motion_encoder\.|face_adapter\.|face_encoder\.",
        "Wan Animate",
        "give a text- or image-to-video model",
    ),
    (
        r"(text_model|vision_model|visual|textual)\.|log_scale$",
        "a CLIP model",
        "Wan2.2 I2V needs none; give another file",
    ),
    (
        r"decoder\.block\.\d+\.layer\.2\.|lm_head\.|dec\.blk\.",
        "a whole T5 with its decoder",
        "give the encoder alone (umT5-xxl)",
    ),
)


@dataclasses.dataclass(frozen=True)
class Detected:
    """kind "dit" | "vae" | "text"; whose names the keys are; the config that the shapes imply; the
    rows to read it with."""

    kind: str
    naming: str
    config: Config
    rows: tuple[Row, ...]


def detect(
    tensors: Mapping[str, Any],
    name: str,
    metadata: Mapping[str, str] | None = None,
    *,
    linear: str | None = None,
    **known,
) -> Detected:
    """Raises CheckpointError for files of another network.

    linear: kind of the linear layers of a transformer's blocks; None where keys tell it. `known`
            are config fields that the caller is sure of.
    """
    odd = known.keys() - set().union(*map(_fields_of, KINDS))
    if odd:
        raise TypeError(f"no config has a field {', '.join(sorted(odd))}")
    kind = kind_of(tensors, name)
    naming = NAMINGS[kind].naming(tensors)
    known = _from_metadata(kind, metadata) | {
        k: v for k, v in known.items() if k in _fields_of(kind)
    }
    if kind == "dit":
        tiles = any(key.endswith(".int8_weight") for key in tensors)
        known["linear"] = linear or ("int8" if tiles else "float")
    try:
        made = {"dit": dit, "vae": vae, "tiny_vae": tiny, "text": text}[kind]
        found = made(tensors, naming, name, known)
    except KeyError as e:
        raise CheckpointError(
            f"{name} looks like a {kind} but lacks {e.args[0]}",
            "its size cannot be told",
            "the file is incomplete",
        ) from e
    except (ValueError, IndexError, ZeroDivisionError, OverflowError) as e:
        raise CheckpointError(
            f"{name} looks like a {kind} of an impossible size",
            str(e),
            "the file is damaged, or of another network",
        ) from e
    return Detected(kind, naming, found, rows(kind, naming, found))


def kind_of(tensors: Mapping[str, Any], name: str) -> str:
    """ "dit", "vae" or "text"; raises CheckpointError for any other network, naming it where it is
    a known one."""
    _refuse_relatives(tensors, name)
    kinds = [kind for kind, marks in MARKS.items() if any(mark in tensors for mark in marks)]
    if not kinds:
        raise CheckpointError(
            f"{name} is not a model that is known here",
            f"{len(tensors)} keys such as {', '.join(list(tensors)[:4]) or 'none'}",
            "known are: Wan2.1/2.2 A14B video transformers, the Wan2.1 VAE and taew2_1, the umT5"
            " encoder",
        )
    return kinds[0]


def _fields_of(kind: str) -> set[str]:
    return {field.name for field in dataclasses.fields(KINDS[kind])}


def rows(kind: str, naming: str, cfg: Config) -> tuple[Row, ...]:
    """The table of one kind and naming."""
    table = NAMINGS[kind].ROWS[naming]
    return table(cfg) if callable(table) else table


def _refuse_relatives(tensors, name: str) -> None:
    for expression, what, fix in RELATIVES:
        hit = next((key for key in tensors if re.match(expression, key)), None)
        if hit is not None:
            raise CheckpointError(f"{name} is {what}", f"recognised by its key {hit}", fix)


def _from_metadata(kind: str, metadata) -> dict[str, Any]:
    """Fields that our own export wrote beside the tensors and that shapes cannot tell; storage is
    told by the file."""
    try:
        stored = json_object((metadata or {}).get(METADATA, "{}"))
        own = stored.get("kind") == kind
        config = from_dict(KINDS[kind], stored.get("config")) if own else None
    except ValueError:
        return {}
    return {} if config is None else {field: getattr(config, field) for field in UNSEEN[kind]}


def _count(tensors, prefix: str) -> int:
    """1 + the highest number after `prefix`. Raises ValueError where the file has not even a tensor
    for each."""
    numbers = {
        int(m[1]) for key in tensors if (m := re.match(re.escape(prefix) + r"(\d{1,5})\.", key))
    }
    count = max(numbers, default=-1) + 1
    if count > len(tensors):
        raise ValueError(f"{prefix}{count - 1} is named, and there are {len(tensors)} tensors")
    return count


def _shape(tensors, key: str) -> tuple[int, ...]:
    return tuple(tensors[key].shape)


def dit(tensors, naming: str, name: str, known: dict) -> DiTConfig:
    """Sizes of a transformer. Head width is 128 unless the SLA projection or `known` says
    otherwise."""
    diffusers = naming == "diffusers"
    text, time, head, ffn = (
        (
            "condition_embedder.text_embedder.linear_1",
            "condition_embedder.time_embedder.linear_1",
            "proj_out",
            "ffn.net.0.proj",
        )
        if diffusers
        else ("text_embedding.0", "time_embedding.0", "head.head", "ffn.0")
    )
    image = "condition_embedder.image_embedder.norm1" if diffusers else "img_emb.proj.0"
    patch_shape = _shape(tensors, "patch_embedding.weight")
    dim = patch_shape[0]
    patch = tuple(known.pop("patch", patch_shape[2:] or (1, 2, 2)))
    volume = math.prod(patch)
    inputs = patch_shape[1] if len(patch_shape) == 5 else patch_shape[1] // volume
    inputs -= 3 * bool(known.get("coordinates"))
    outputs = _shape(tensors, f"{head}.weight")[0] // volume
    if outputs == 48:
        raise CheckpointError(
            f"{name} is Wan2.2 TI2V-5B",
            "it has 48 latent channels of another VAE, here 16",
            "give Wan2.1 or Wan2.2 A14B",
        )
    projection = wan_dit.sla_width(tensors, naming)
    width = projection or HEAD_WIDTH
    _check_condition(name, inputs, outputs)
    if "heads" not in known and dim % width:
        raise CheckpointError(
            f"{name}: width {dim} is no multiple of {width}",
            "the keys do not tell the number of heads",
            "say it: python -m convert SRC DST --heads N",
        )
    fields = {
        "dim": dim,
        "ffn_dim": _shape(tensors, f"blocks.0.{ffn}.bias")[0],
        "layers": _count(tensors, "blocks."),
        "heads": dim // width,
        "in_channels": inputs,
        "out_channels": outputs,
        "patch": patch,
        "freq_dim": _shape(tensors, f"{time}.weight")[1],
        "text_dim": _shape(tensors, f"{text}.weight")[1],
        "image_dim": _shape(tensors, f"{image}.weight")[0]
        if f"{image}.weight" in tensors
        else None,
        "attention": "sla" if projection else "dense",
    }
    return DiTConfig(**{**fields, **known})


def _check_condition(name: str, inputs: int, outputs: int) -> None:
    """Raises CheckpointError for a transformer on Wan's latents that reads something else beside
    them than an image's mask and latents."""
    beside = inputs - outputs
    if beside in (0, MASK_CHANNELS + outputs) or outputs != len(LATENT_MEAN):
        return
    what = "a Wan Fun control model" if beside > MASK_CHANNELS + outputs else "of another task"
    raise CheckpointError(
        f"{name} reads {inputs} channels: it is {what}",
        f"its {outputs} latent channels stand alone (text to video), or with {MASK_CHANNELS} of a"
        f" mask and {outputs} of an image (image to video)",
        "give a text- or image-to-video model",
    )


def vae(tensors, naming: str, name: str, known: dict) -> VAEConfig:
    """Sizes of a VAE, from the encoder's flat list of residual blocks and down-samplers."""
    wan = naming == "wan"
    many, conv = (
        ("encoder.downsamples", "residual.6.weight")
        if wan
        else ("encoder.down_blocks", "conv2.weight")
    )
    post = "conv2.weight" if wan else "post_quant_conv.weight"
    dim = _shape(tensors, "encoder.conv1.weight" if wan else "encoder.conv_in.weight")[0]
    latent = _shape(tensors, post)[0]
    multipliers, temporal, blocks = [], [], 0
    for n in range(_count(tensors, f"{many}.")):
        if f"{many}.{n}.resample.1.weight" in tensors:
            temporal.append(f"{many}.{n}.time_conv.weight" in tensors)
        else:
            width = _shape(tensors, f"{many}.{n}.{conv}")[0]
            multipliers[len(temporal) :] = [width // dim]
            blocks += not temporal
    if latent != len(LATENT_MEAN) and "mean" not in known:
        raise CheckpointError(
            f"{name} is a VAE with {latent} latent channels, not {len(LATENT_MEAN)}",
            "Wan2.2's VAE has 48 and belongs to TI2V-5B; mean and deviation of other latents are"
            " not known",
            WAN21_VAE,
        )
    fields = {
        "dim": dim,
        "latent_channels": latent,
        "multipliers": tuple(multipliers),
        "res_blocks": blocks,
        "temporal_down": tuple(temporal),
    }
    return VAEConfig(**{**fields, **known})


def tiny(tensors, naming: str, name: str, known: dict) -> TinyVAEConfig:
    """Sizes of a small decoder, from the numbers of its layers."""
    latent = _shape(tensors, "decoder.1.weight")[1]
    if latent != len(LATENT_MEAN):
        raise CheckpointError(
            f"{name} is a small decoder of {latent} latent channels, not {len(LATENT_MEAN)}",
            "taew2_2 has 48 and belongs to TI2V-5B",
            "give taew2_1 or lighttaew2_1",
        )
    begins = range(tiny_vae.FIRST, _count(tensors, "decoder."), tiny_vae.PER_STAGE)
    stages = [n for n in begins if f"decoder.{n + tiny_vae.GROW}.conv.weight" in tensors]
    grown = [_shape(tensors, f"decoder.{n + tiny_vae.GROW}.conv.weight")[:2] for n in stages]
    ends = [_shape(tensors, f"decoder.{n + tiny_vae.CONV_AT}.weight")[0] for n in stages]
    fields = {
        "latent_channels": latent,
        "widths": (_shape(tensors, "decoder.1.weight")[0], *ends),
        "temporal_up": tuple(outputs == 2 * inputs for outputs, inputs in grown),
    }
    return TinyVAEConfig(**{**fields, **known})


def text(tensors, naming: str, name: str, known: dict) -> TextConfig:
    """Sizes of a umT5 encoder."""
    if naming == "wan":
        embedding, block = "token_embedding.weight", "blocks."
        q, bias, up = (
            "blocks.0.attn.q.weight",
            "blocks.0.pos_embedding.embedding.weight",
            "blocks.0.ffn.fc1.weight",
        )
    elif naming == "gguf":
        embedding, block = "token_embd.weight", "enc.blk."
        q, bias, up = (f"{block}0.{name}.weight" for name in ("attn_q", "attn_rel_b", "ffn_up"))
    else:
        embedding = "shared.weight" if "shared.weight" in tensors else "encoder.embed_tokens.weight"
        block, layer = "encoder.block.", "encoder.block.0.layer"
        q, bias = (
            f"{layer}.0.SelfAttention.q.weight",
            f"{layer}.0.SelfAttention.relative_attention_bias.weight",
        )
        up = f"{layer}.1.DenseReluDense.wi_1.weight"
    vocab, dim = _shape(tensors, embedding)
    buckets, heads = _shape(tensors, bias)
    fields = {
        "vocab": vocab,
        "dim": dim,
        "attention_dim": _shape(tensors, q)[0],
        "ffn_dim": _shape(tensors, up)[0],
        "heads": heads,
        "layers": _count(tensors, block),
        "buckets": buckets,
    }
    return TextConfig(**{**fields, **known})


def describe(kind: str, cfg: Config) -> str:
    """One line for people: "Wan video transformer, text to video, 1.4 B parameters, 30 layers of
    1536, sla attention, int8"."""
    if isinstance(cfg, DiTConfig):
        task = {"t2v": "text to video", "i2v": "image to video"}[cfg.task]
        branch = ", CLIP image branch" if cfg.image_dim else ""
        return (
            f"Wan video transformer, {task}, {cfg.layers} layers of {cfg.dim}, {cfg.attention}"
            f" attention, {cfg.linear} linears{branch}"
        )
    if isinstance(cfg, TinyVAEConfig):
        return f"small video decoder, {cfg.latent_channels} latent channels, widths {cfg.widths}"
    if isinstance(cfg, VAEConfig):
        return f"video VAE, {cfg.latent_channels} latent channels, base width {cfg.dim}"
    return f"umT5 encoder, {cfg.layers} layers of {cfg.dim}, {cfg.vocab} tokens"


def stored_dtypes(tensors) -> dict[str, int]:
    """{dtype name: number of tensors}"""
    out: dict[str, int] = {}
    for tensor in tensors.values():
        name = np.dtype(tensor.dtype).name
        out[name] = out.get(name, 0) + 1
    return out
