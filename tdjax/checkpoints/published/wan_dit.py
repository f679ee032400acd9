"""Rows of the Wan transformer. Names: Wan-Video/Wan2.1 wan/modules/model.py, thu-ml/TurboDiffusion
(SLA and int8 keys), huggingface/diffusers models/transformers/transformer_wan.py."""

from __future__ import annotations

from tdjax.checkpoints.published.rules import Row


def _linear(source: str, path: str) -> tuple[Row, ...]:
    """A Linear, or its int8 form (weights in 128 x 128 blocks), which stays in the orientation of
    the file."""
    return (
        Row(f"{source}.weight", f"{path}.kernel", "o i -> i o"),
        Row(f"{source}.int8_weight", f"{path}.int8_weight"),
        Row(f"{source}.scale", f"{path}.scale"),
        Row(f"{source}.bias", f"{path}.bias"),
    )


def _norm(source: str, path: str) -> tuple[Row, ...]:
    return Row(f"{source}.weight", f"{path}.scale"), Row(f"{source}.bias", f"{path}.bias")


def _gain(source: str, path: str) -> Row:
    return Row(f"{source}.weight", f"{path}.scale")


FLAT_PATCH = Row("patch_embedding.weight", "patch_embed.kernel", "o i -> i o")
CONV_PATCH = Row("patch_embedding.weight", "patch_embed.kernel", "o c t h w -> (c t h w) o")

WAN = (
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
    *_linear("blocks.{i}.{a:self|cross}_attn.{p:q|k|v|o}", "blocks.{a}_attn.{p}"),
    _gain("blocks.{i}.{a:self|cross}_attn.norm_{p:q|k}", "blocks.{a}_attn.norm_{p}"),
    Row(
        "blocks.{i}.self_attn.attn_op.local_attn.proj_l.weight",
        "blocks.self_attn.core.proj.kernel",
        "o i -> i o",
        role="optional",
    ),
    Row(
        "blocks.{i}.self_attn.attn_op.local_attn.proj_l.bias",
        "blocks.self_attn.core.proj.bias",
        role="optional",
    ),
    *_linear("blocks.{i}.cross_attn.{p:k_img|v_img}", "blocks.cross_attn.{p}"),
    _gain("blocks.{i}.cross_attn.norm_k_img", "blocks.cross_attn.norm_k_img"),
    *_norm("blocks.{i}.norm3", "blocks.norm3"),
    *_linear("blocks.{i}.ffn.0", "blocks.up"),
    *_linear("blocks.{i}.ffn.2", "blocks.down"),
    Row("head.modulation", "head.modulation", "1 m d -> m d"),
    *_linear("head.head", "head.proj"),
)

EMBEDDER = "condition_embedder"
DIFFUSERS = (
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
    *_linear("blocks.{i}.attn1.to_{p:q|k|v}", "blocks.self_attn.{p}"),
    *_linear("blocks.{i}.attn2.to_{p:q|k|v}", "blocks.cross_attn.{p}"),
    *_linear("blocks.{i}.attn1.to_out.0", "blocks.self_attn.o"),
    *_linear("blocks.{i}.attn2.to_out.0", "blocks.cross_attn.o"),
    _gain("blocks.{i}.attn1.norm_{p:q|k}", "blocks.self_attn.norm_{p}"),
    _gain("blocks.{i}.attn2.norm_{p:q|k}", "blocks.cross_attn.norm_{p}"),
    *_linear("blocks.{i}.attn2.add_{p:k|v}_proj", "blocks.cross_attn.{p}_img"),
    _gain("blocks.{i}.attn2.norm_added_k", "blocks.cross_attn.norm_k_img"),
    *_norm("blocks.{i}.norm2", "blocks.norm3"),
    *_linear("blocks.{i}.ffn.net.0.proj", "blocks.up"),
    *_linear("blocks.{i}.ffn.net.2", "blocks.down"),
    Row("scale_shift_table", "head.modulation", "1 m d -> m d"),
    *_linear("proj_out", "head.proj"),
)

# "turbo" are Wan's names with the patch embedding as a Linear, as TurboDiffusion's inference files
# have it.
ROWS = {"turbo": (FLAT_PATCH, *WAN), "wan": (CONV_PATCH, *WAN), "diffusers": DIFFUSERS}


def naming(shapes: dict) -> str:
    """Whose names the keys are."""
    if f"{EMBEDDER}.time_proj.weight" in shapes:
        return "diffusers"
    return "turbo" if len(shapes["patch_embedding.weight"].shape) == 2 else "wan"
