"""Sizes of the tiny recipe: Wan's networks, as small as a minute of training and a CPU allow.

Widths are multiples of 128 and heads 64 wide, so that the attention and int8 kernels run without
padding. A clip of 33 frames of 64x64 pixels has 9x8x8 latents and, with patches of one latent, 576
tokens: a block of 64 is a latent frame.
"""

from __future__ import annotations

import dataclasses

from tdjax.config import DiTConfig, SLAConfig, TextConfig, VAEConfig, VideoSize
from tdjax.media.scenes.factors import FRAMES, SIDE
from tdjax.precision import FLOAT32

SIZE = VideoSize(frames=FRAMES, height=SIDE, width=SIDE)

# Mean and deviation are the identity until they have been measured on the trained encoder.
VAE = VAEConfig(
    dim=16,
    latent_channels=8,
    multipliers=(1, 2, 2, 2),
    res_blocks=1,
    mean=(0.0,) * 8,
    std=(1.0,) * 8,
    policy=FLOAT32,
)
TEXT = TextConfig(
    vocab=256,
    dim=128,
    attention_dim=128,
    ffn_dim=256,
    heads=4,
    layers=2,
    text_len=32,
    policy=FLOAT32,
)
# The coordinates (t, h, w) are an input: attention here is relative, and a small network would not
# learn in minutes where a movement has to begin.
DIT = DiTConfig(
    dim=256,
    ffn_dim=768,
    layers=6,
    heads=4,
    in_channels=8,
    out_channels=8,
    coordinates=True,
    patch=(1, 1, 1),
    text_dim=128,
    text_len=32,
    round_time=False,
    policy=FLOAT32,
)
# The share keeps 3 of 9 key blocks.
_SPARSE = SLAConfig(topk=0.34, block_q=64, block_k=64)
DIT_SLA = dataclasses.replace(DIT, attention="sla", sla=_SPARSE)


def stored(cfg):
    """Returns the same network as it is packaged: floating-point weights in bfloat16."""
    return dataclasses.replace(cfg, policy=dataclasses.replace(cfg.policy, param="bfloat16"))
