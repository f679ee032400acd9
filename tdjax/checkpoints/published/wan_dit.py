"""Rows of the Wan transformer. Names: Wan-Video/Wan2.1 wan/modules/model.py, thu-ml/TurboDiffusion
(SLA and int8 keys), huggingface/diffusers models/transformers/transformer_wan.py."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

from tdjax.checkpoints.published.rules import Row
from tdjax.config import DiTConfig


def _linear(source: str, path: str) -> tuple[Row, ...]:
    """A Linear, or its int8 form (weights in 128 x 128 blocks), which stays in the orientation of
    the file."""
    return (
        Row(f"{source}.weight", f"{path}.kernel", "o i -> i o"),
        Row(f"{source}.int8_weight", f"{path}.int8_weight"),
        Row(f"{source}.scale", f"{path}.scale"),
        Row(f"{source}.bias", f"{path}.bias"),
    )


def _block_linear(kind: str, source: str, path: str) -> tuple[Row, ...]:
    """A Linear of a block in the kind that a file has it in: `_linear`, or 8-bit values with a
    scale for each output channel, under the names of ModelTC/LightX2V."""
    if kind in ("float", "int8"):
        return _linear(source, path)
    return (
        Row(f"{source}.weight", f"{path}.weight"),
        Row(f"{source}.weight_scale", f"{path}.weight_scale", "o 1 -> o"),
        Row(f"{source}.bias", f"{path}.bias"),
    )


def _norm(source: str, path: str) -> tuple[Row, ...]:
    return Row(f"{source}.weight", f"{path}.scale"), Row(f"{source}.bias", f"{path}.bias")


def _gain(source: str, path: str) -> Row:
    return Row(f"{source}.weight", f"{path}.scale")


def _projection(source: str, role: str = "optional") -> tuple[Row, ...]:
    """The projection of SLA's linear branch."""
    path = "blocks.self_attn.core.proj"
    return (
        Row(f"{source}.weight", f"{path}.kernel", "o i -> i o", role),
        Row(f"{source}.bias", f"{path}.bias", role=role),
    )


# Where the projection lies below self-attention: thu-ml/TurboDiffusion; hao-ai-lab/FastVideo;
# files converted for sgl-project/sglang.
SLA_NAMES = ("attn_op.local_attn.proj_l", "attn_impl.proj_l", "attn_op.local_attn.proj_l")
# Gates of FastVideo's video sparse attention: dense attention does not need them.
GATE = "to_gate_compress"
_GATES = (Row(f"blocks.{{i}}.{GATE}.{{p:weight|bias}}", None),)

FLAT_PATCH = Row("patch_embedding.weight", "patch_embed.kernel", "o i -> i o")
CONV_PATCH = Row("patch_embedding.weight", "patch_embed.kernel", "o c t h w -> (c t h w) o")

EMBEDDER = "condition_embedder"


def _wan(kind: str) -> tuple[Row, ...]:
    """Wan's own names but for the patch embedding, with block layers of a kind."""
    linear = functools.partial(_block_linear, kind)
    return (
        Row("patch_embedding.bias", "patch_embed.bias"),
        *_linear("text_embedding.0", "text_embed.up"),
        *_linear("text_embedding.2", "text_embed.down"),
        *_linear("time_embedding.0", "time_embed.up"),
        *_linear("time_embedding.2", "time_embed.down"),
        *_linear("time_projection.1", "time_proj"),
        *_norm("img_emb.proj.0", "image_embed.norm_in"),
        *_linear("img_emb.proj.1", "image_embed.up"),
        *_linear("img_emb.proj.3", "image_embed.down"),
        *_norm("img_emb.proj.4", "image_embed.norm_out"),
        Row("blocks.{i}.modulation", "blocks.modulation", "1 m d -> m d"),
        *linear("blocks.{i}.{a:self|cross}_attn.{p:q|k|v|o}", "blocks.{a}_attn.{p}"),
        _gain("blocks.{i}.{a:self|cross}_attn.norm_{p:q|k}", "blocks.{a}_attn.norm_{p}"),
        *_projection(f"blocks.{{i}}.self_attn.{SLA_NAMES[0]}"),
        *_GATES,
        *linear("blocks.{i}.cross_attn.{p:k_img|v_img}", "blocks.cross_attn.{p}"),
        _gain("blocks.{i}.cross_attn.norm_k_img", "blocks.cross_attn.norm_k_img"),
        *_norm("blocks.{i}.norm3", "blocks.norm3"),
        *linear("blocks.{i}.ffn.0", "blocks.up"),
        *linear("blocks.{i}.ffn.2", "blocks.down"),
        Row("head.modulation", "head.modulation", "1 m d -> m d"),
        *_linear("head.head", "head.proj"),
    )


def _diffusers(kind: str) -> tuple[Row, ...]:
    """diffusers' names, with block layers of a kind."""
    linear = functools.partial(_block_linear, kind)
    return (
        CONV_PATCH,
        Row("patch_embedding.bias", "patch_embed.bias"),
        *_linear(f"{EMBEDDER}.text_embedder.linear_1", "text_embed.up"),
        *_linear(f"{EMBEDDER}.text_embedder.linear_2", "text_embed.down"),
        *_linear(f"{EMBEDDER}.time_embedder.linear_1", "time_embed.up"),
        *_linear(f"{EMBEDDER}.time_embedder.linear_2", "time_embed.down"),
        *_linear(f"{EMBEDDER}.time_proj", "time_proj"),
        *_norm(f"{EMBEDDER}.image_embedder.norm1", "image_embed.norm_in"),
        *_linear(f"{EMBEDDER}.image_embedder.ff.net.0.proj", "image_embed.up"),
        *_linear(f"{EMBEDDER}.image_embedder.ff.net.2", "image_embed.down"),
        *_norm(f"{EMBEDDER}.image_embedder.norm2", "image_embed.norm_out"),
        Row("blocks.{i}.scale_shift_table", "blocks.modulation", "1 m d -> m d"),
        *linear("blocks.{i}.attn1.to_{p:q|k|v}", "blocks.self_attn.{p}"),
        *linear("blocks.{i}.attn2.to_{p:q|k|v}", "blocks.cross_attn.{p}"),
        *linear("blocks.{i}.attn1.to_out.0", "blocks.self_attn.o"),
        *linear("blocks.{i}.attn2.to_out.0", "blocks.cross_attn.o"),
        _gain("blocks.{i}.attn1.norm_{p:q|k}", "blocks.self_attn.norm_{p}"),
        *_projection(f"blocks.{{i}}.attn1.{SLA_NAMES[1]}"),
        *_projection(f"blocks.{{i}}.attn1.{SLA_NAMES[2]}", role="optional twin"),
        *_GATES,
        _gain("blocks.{i}.attn2.norm_{p:q|k}", "blocks.cross_attn.norm_{p}"),
        *linear("blocks.{i}.attn2.add_{p:k|v}_proj", "blocks.cross_attn.{p}_img"),
        _gain("blocks.{i}.attn2.norm_added_k", "blocks.cross_attn.norm_k_img"),
        *_norm("blocks.{i}.norm2", "blocks.norm3"),
        *linear("blocks.{i}.ffn.net.0.proj", "blocks.up"),
        *linear("blocks.{i}.ffn.net.2", "blocks.down"),
        Row("scale_shift_table", "head.modulation", "1 m d -> m d"),
        *_linear("proj_out", "head.proj"),
    )


# "turbo" are Wan's names with the patch embedding as a Linear, as TurboDiffusion's inference files
# have it.
ROWS = {
    "turbo": lambda cfg: (FLAT_PATCH, *_wan(cfg.linear)),
    "wan": lambda cfg: (CONV_PATCH, *_wan(cfg.linear)),
    "diffusers": lambda cfg: _diffusers(cfg.linear),
}


def block_layers(keys: Iterable[str], naming: str) -> list[str]:
    """Returns the modules of a file that are linear layers of blocks, which a network can hold in
    8 bits."""
    rows = [
        row
        for row in ROWS[naming](DiTConfig())
        if row.source.endswith(".weight")
        and (row.path or "").startswith("blocks.")
        and (row.path or "").endswith(".kernel")
        and not (row.path or "").startswith("blocks.self_attn.core.")
    ]
    return [
        key.removesuffix(".weight")
        for key in keys
        if key.endswith(".weight") and any(row.source_pattern.fullmatch(key) for row in rows)
    ]


def sla_width(tensors: Mapping[str, Any], naming: str) -> int | None:
    """Returns the head width by the projection of SLA; None where a file has none."""
    attention = "attn1" if naming == "diffusers" else "self_attn"
    for name in SLA_NAMES:
        weight = tensors.get(f"blocks.0.{attention}.{name}.weight")
        if weight is not None:
            return int(weight.shape[0])
    return None


def naming(shapes: dict) -> str:
    """Whose names the keys are."""
    if f"{EMBEDDER}.time_proj.weight" in shapes:
        return "diffusers"
    return "turbo" if len(shapes["patch_embedding.weight"].shape) == 2 else "wan"
