"""A small model folder of random weights: every stage of the real path, at sizes that compile in
seconds."""

import json
import math
import shutil

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
FACTS = {"name": "random", "frames": 5, "height": 32, "width": 32, "prompts": [PROMPT]}

# Of one call in most tests, so that programs are compiled once.
SMALL = {"num_frames": 5, "width": 32, "height": 32}


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


def dit_folder(path, cfg: DiTConfig, seed: int = 0, **change):
    """A transformer of random weights in our layout; change={leaf: value} fills a leaf (dots as
    double underscores)."""
    leaves = random_leaves("dit", cfg, seed)
    for name, value in change.items():
        leaves[name.replace("__", ".")][...] = value
    return orbax.save(path, leaves, kind="dit", cfg=cfg, source={"name": "test"})


def with_dit(model, folder, cfg: DiTConfig, **change):
    """A copy of a model folder with another transformer, arguments as those of `dit_folder`."""
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("dit"))
    dit_folder(folder / "dit", cfg, **change)
    return folder


def photograph(height=48, width=80) -> np.ndarray:
    """Something like a photograph: a bright sky over dark ground, a sun, some grain. uint8 [H W
    3]"""
    y, x = np.mgrid[:height, :width] / np.array([height, width]).reshape(2, 1, 1)
    sky = np.stack([0.4 + 0.4 * y, 0.6 + 0.2 * y, 0.95 - 0.1 * y], -1)
    ground = np.stack([0.25 + 0.1 * x, 0.3 + 0.05 * x, 0.15 + 0 * x], -1)
    image = np.where((y > 0.6 + 0.05 * np.sin(9 * x))[..., None], ground, sky)
    sun = np.exp(-(((x - 0.7) ** 2 + (y - 0.25) ** 2) / 0.01))[..., None]
    grain = np.random.default_rng(0).normal(0, 0.02, image.shape)
    return np.clip((image + sun * [0.6, 0.5, 0.1] + grain) * 255, 0, 255).astype(np.uint8)
