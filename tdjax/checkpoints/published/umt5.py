"""Rows of the umT5 encoder. Names: Wan-Video/Wan2.1 wan/modules/t5.py, huggingface/transformers
models/umt5, ggml-org/llama.cpp gguf-py/gguf/constants.py."""

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

GGUF = (
    Row("token_embd.weight", "embed.embedding"),
    Row("enc.blk.{i}.attn_norm.weight", "blocks.norm1.scale"),
    Row("enc.blk.{i}.attn_{p:q|k|v|o}.weight", "blocks.attn.{p}.kernel", "o i -> i o"),
    Row("enc.blk.{i}.attn_rel_b.weight", "blocks.relative_bias"),
    Row("enc.blk.{i}.ffn_norm.weight", "blocks.norm2.scale"),
    Row("enc.blk.{i}.ffn_gate.weight", "blocks.gate.kernel", "o i -> i o"),
    Row("enc.blk.{i}.ffn_up.weight", "blocks.up.kernel", "o i -> i o"),
    Row("enc.blk.{i}.ffn_down.weight", "blocks.down.kernel", "o i -> i o"),
    Row("enc.output_norm.weight", "norm.scale"),
)

ROWS = {"wan": WAN, "transformers": TRANSFORMERS, "gguf": GGUF}


def naming(shapes: dict) -> str:
    """Whose names the keys are."""
    marks = {"token_embedding.weight": "wan", "token_embd.weight": "gguf"}
    return next((name for mark, name in marks.items() if mark in shapes), "transformers")
