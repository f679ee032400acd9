"""A small model folder of random weights: every stage of the real path, at sizes that compile in
seconds."""

import json
import math

import numpy as np

from tdjax.checkpoints import orbax
from tdjax.config import DiTConfig, SLAConfig, TextConfig, VAEConfig
from tdjax.precision import FLOAT32
from tdjax.train.tiny.data import captions
from tdjax.train.tiny.data.tokenizer import build

PROMPT = "a small red circle moves left slowly on a gray background"
TEXT = TextConfig(
    vocab=256,
    dim=64,
    attention_dim=64,
    ffn_dim=128,
    heads=4,
    layers=2,
    buckets=32,
    max_distance=128,
    text_len=32,
    policy=FLOAT32,
)
VAE = VAEConfig(
    dim=16,
    latent_channels=8,
    multipliers=(1, 2, 2, 2),
    res_blocks=1,
    mean=(0.0,) * 8,
    std=(1.0,) * 8,
    policy=FLOAT32,
)
DIT = DiTConfig(
    dim=128,
    ffn_dim=256,
    layers=4,
    heads=2,
    in_channels=8,
    out_channels=8,
    patch=(1, 1, 1),
    freq_dim=128,
    text_dim=64,
    text_len=32,
    attention="sla",
    sla=SLAConfig(topk=0.3, block_q=64, block_k=64),
    round_time=False,
    policy=FLOAT32,
)
FACTS = {"name": "random", "frames": 33, "height": 64, "width": 64, "prompts": [PROMPT]}


def random_leaves(kind: str, cfg, seed: int) -> dict[str, np.ndarray]:
    """Weights that keep variance: kernels and embeddings by their fan-in, unit norms, zero biases.
    Drawn by numpy on the host."""
    rng, out = np.random.default_rng(seed), {}
    for name, leaf in orbax.named_leaves(orbax.abstract(kind, cfg)).items():
        if name.endswith("scale"):
            value = np.ones(leaf.shape)
        elif name.endswith("bias") and not name.endswith("relative_bias"):
            value = np.zeros(leaf.shape)
        else:
            fan_in = math.prod(leaf.shape[1 if name.startswith("blocks.") else 0 : -1])
            value = rng.normal(0.0, fan_in**-0.5, leaf.shape)
        out[name] = value.astype(leaf.dtype)
    return out


def write(folder):
    """The model folder, complete."""
    folder.mkdir(parents=True)
    for seed, (kind, cfg) in enumerate((("dit", DIT), ("vae", VAE), ("text", TEXT))):
        source = {"name": f"random numbers, seed {seed}"}
        orbax.save(folder / kind, random_leaves(kind, cfg, seed), kind=kind, cfg=cfg, source=source)
    build(captions.vocabulary()).save(str(folder / "tokenizer.json"))
    (folder / "model.json").write_text(json.dumps(FACTS, indent=1) + "\n")
    return folder
