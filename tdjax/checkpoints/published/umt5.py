"""Rows of the umT5 encoder. Names: Wan-Video/Wan2.1 wan/modules/t5.py, huggingface/transformers
models/umt5."""

from __future__ import annotations

from tdjax.checkpoints.published.rules import Row

WAN = (
    Row("token_embedding.weight", "embed.embedding"),
    Row("blocks.{i}.{p:norm1|norm2}.weight", "blocks.{p}.scale"),
    Row("blocks.{i}.attn.{p:q|k|v|o}.weight", "blocks.attn.{p}.kernel", "o i -> i o"),
    Row("blocks.{i}.pos_embedding.embedding.weight", "blocks.relative_bias"),
    Row("blocks.{i}.ffn.gate.0.weight", "blocks.gate.kernel", "o i -> i o"),
    Row("blocks.{i}.ffn.fc1.weight", "blocks.up.kernel", "o i -> i o"),
    Row("blocks.{i}.ffn.fc2.weight", "blocks.down.kernel", "o i -> i o"),
    Row("norm.weight", "norm.scale"),
)

LAYER = "encoder.block.{i}.layer"
TRANSFORMERS = (
    Row("shared.weight", "embed.embedding"),
    Row(
        "encoder.embed_tokens.weight", "embed.embedding", role="twin"
    ),  # tied: a file may hold either name or both
    Row(
        "spiece_model", None
    ),  # the tokenizer, which ComfyUI's single files carry as a tensor of bytes
    Row(f"{LAYER}.0.layer_norm.weight", "blocks.norm1.scale"),
    Row(f"{LAYER}.0.SelfAttention.{{p:q|k|v|o}}.weight", "blocks.attn.{p}.kernel", "o i -> i o"),
    Row(f"{LAYER}.0.SelfAttention.relative_attention_bias.weight", "blocks.relative_bias"),
    Row(f"{LAYER}.1.layer_norm.weight", "blocks.norm2.scale"),
    Row(f"{LAYER}.1.DenseReluDense.wi_0.weight", "blocks.gate.kernel", "o i -> i o"),
    Row(f"{LAYER}.1.DenseReluDense.wi_1.weight", "blocks.up.kernel", "o i -> i o"),
    Row(f"{LAYER}.1.DenseReluDense.wo.weight", "blocks.down.kernel", "o i -> i o"),
    Row("encoder.final_layer_norm.weight", "norm.scale"),
)

ROWS = {"wan": WAN, "transformers": TRANSFORMERS}


def naming(shapes: dict) -> str:
    """Whose names the keys are."""
    return "wan" if "token_embedding.weight" in shapes else "transformers"
