"""Rows of the video VAE. Names: Wan-Video/Wan2.1 wan/modules/vae.py, huggingface/diffusers
autoencoder_kl_wan.py.

Layers keep their numbers, except in the decoder of diffusers, whose up_blocks hold `resnets` and
one of `upsamplers` where the original has one flat list.
"""

from __future__ import annotations

from tdjax.checkpoints.published.rules import Row
from tdjax.config import VAEConfig


def _conv(source: str, path: str, axes: str = "t h w") -> tuple[Row, ...]:
    return Row(f"{source}.weight", f"{path}.kernel", f"o i {axes} -> {axes} i o"), Row(
        f"{source}.bias", f"{path}.bias"
    )


def _norm(source: str, path: str, ones: str = "1 1 1") -> Row:
    return Row(f"{source}.gamma", f"{path}.scale", f"c {ones} -> c")


def _block(source: str, path: str, parts: tuple[str, str, str, str, str]) -> tuple[Row, ...]:
    """Residual block; `parts` are its names for norm1, conv1, norm2, conv2, shortcut."""
    norm1, conv1, norm2, conv2, shortcut = (f"{source}.{part}" for part in parts)
    return (
        _norm(norm1, f"{path}.norm1"),
        *_conv(conv1, f"{path}.conv1"),
        _norm(norm2, f"{path}.norm2"),
        *_conv(conv2, f"{path}.conv2"),
        *_conv(shortcut, f"{path}.shortcut"),
    )


def _resample(source: str, path: str) -> tuple[Row, ...]:
    return *_conv(f"{source}.resample.1", f"{path}.conv", "h w"), *_conv(
        f"{source}.time_conv", f"{path}.time_conv"
    )


def _attention(source: str, path: str) -> tuple[Row, ...]:
    return (
        _norm(f"{source}.norm", f"{path}.norm", "1 1"),
        *_conv(f"{source}.to_qkv", f"{path}.qkv", "h w"),
        *_conv(f"{source}.proj", f"{path}.proj", "h w"),
    )


WAN_BLOCK = ("residual.0", "residual.2", "residual.3", "residual.6", "shortcut")
DIFFUSERS_BLOCK = ("norm1", "conv1", "norm2", "conv2", "conv_shortcut")


def _wan(cfg: VAEConfig) -> tuple[Row, ...]:
    rows = [*_conv("conv1", "quant_conv"), *_conv("conv2", "post_quant_conv")]
    for side, many, ours in (("encoder", "downsamples", "down"), ("decoder", "upsamples", "up")):
        rows += [
            *_conv(f"{side}.conv1", f"{side}.conv_in"),
            *_block(f"{side}.{many}.{{b}}", f"{side}.{ours}.{{b}}", WAN_BLOCK),
            *_resample(f"{side}.{many}.{{b}}", f"{side}.{ours}.{{b}}"),
            *_block(f"{side}.middle.{{b:0|2}}", f"{side}.middle.{{b}}", WAN_BLOCK),
            *_attention(f"{side}.middle.1", f"{side}.middle.1"),
            _norm(f"{side}.head.0", f"{side}.norm_out"),
            *_conv(f"{side}.head.2", f"{side}.conv_out"),
        ]
    return tuple(rows)


def _diffusers(cfg: VAEConfig) -> tuple[Row, ...]:
    rows = [*_conv("quant_conv", "quant_conv"), *_conv("post_quant_conv", "post_quant_conv")]
    for side in ("encoder", "decoder"):
        rows += [
            *_conv(f"{side}.conv_in", f"{side}.conv_in"),
            *_block(f"{side}.mid_block.resnets.0", f"{side}.middle.0", DIFFUSERS_BLOCK),
            *_attention(f"{side}.mid_block.attentions.0", f"{side}.middle.1"),
            *_block(f"{side}.mid_block.resnets.1", f"{side}.middle.2", DIFFUSERS_BLOCK),
            _norm(f"{side}.norm_out", f"{side}.norm_out"),
            *_conv(f"{side}.conv_out", f"{side}.conv_out"),
        ]
    rows += [
        *_block("encoder.down_blocks.{b}", "encoder.down.{b}", DIFFUSERS_BLOCK),
        *_resample("encoder.down_blocks.{b}", "encoder.down.{b}"),
    ]
    each = cfg.res_blocks + 1  # residual blocks of a decoder stage; the up-sampler follows them
    for stage in range(len(cfg.multipliers)):
        first = stage * (each + 1)
        for n in range(each):
            rows += _block(
                f"decoder.up_blocks.{stage}.resnets.{n}", f"decoder.up.{first + n}", DIFFUSERS_BLOCK
            )
        rows += _resample(f"decoder.up_blocks.{stage}.upsamplers.0", f"decoder.up.{first + each}")
    return tuple(rows)


ROWS = {"wan": _wan, "diffusers": _diffusers}


def naming(shapes: dict) -> str:
    """Whose names the keys are."""
    return "wan" if "encoder.conv1.weight" in shapes else "diffusers"
