"""The embedded demo model: a small Wan-shaped set that runs on any machine.

A package without the trained model (assets/demo) writes random weights to the cache on first use: they exercise every stage
of the real path (our checkpoint layout, tokenizer, text encoder, transformer, sampler, VAE, video file) and draw noise. The
command says so.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from tdjax import checkpoint
from tdjax.config import DiTConfig, SLAConfig, TextConfig, VAEConfig, to_dict
from tdjax.precision import FLOAT32

VERSION = "2"
PROMPT = "a small red circle moves left slowly on a gray background"
WORDS = (
    "a an the on in of with and small large red green blue yellow magenta cyan white orange black gray navy olive circle square "
    "triangle cross moves drifts stays still left right up down slowly quickly bounces horizontally vertically background"
)

TEXT = TextConfig(
    vocab=256, dim=64, attention_dim=64, ffn_dim=128, heads=4, layers=2, buckets=32, max_distance=128, text_len=32, policy=FLOAT32
)
VAE_CONFIG = VAEConfig(dim=16, latent_channels=8, multipliers=(1, 2, 2, 2), res_blocks=1, mean=(0.0,) * 8, std=(1.0,) * 8, policy=FLOAT32)
DIT = DiTConfig(
    dim=128, ffn_dim=256, layers=4, heads=2, in_channels=8, out_channels=8, patch=(1, 1, 1), freq_dim=128, text_dim=64, text_len=32,
    attention="sla", sla=SLAConfig(topk=0.3, block_q=64, block_k=64), round_time=False, policy=FLOAT32,
)  # fmt: skip
FACTS = {"name": "demo", "trained": False, "frames": 33, "height": 64, "width": 64, "prompts": [PROMPT]}
PACKAGED = Path(__file__).parent / "assets" / "demo"  # the trained model, written by `python -m tdjax.train.tiny`


def tokenizer() -> Tokenizer:
    """A unigram tokenizer over the words above and single characters, with T5's ids for padding (0) and end (1)."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0)]
    pieces += [("▁" + word, -3.0) for word in WORDS.split()]
    pieces += [(c, -9.0) for c in "▁abcdefghijklmnopqrstuvwxyz0123456789.,'-!?"]
    out = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
    out.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    out.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    out.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return out


def random_leaves(kind: str, cfg, seed: int) -> dict[str, np.ndarray]:
    """Weights that keep variance: kernels and embeddings by their fan-in, unit norms, zero biases. Drawn by numpy on the host."""
    rng, out = np.random.default_rng(seed), {}
    for name, leaf in checkpoint.names(checkpoint.abstract(kind, cfg)).items():
        if name.endswith("scale"):
            value = np.ones(leaf.shape)
        elif name.endswith("bias") and not name.endswith("relative_bias"):
            value = np.zeros(leaf.shape)
        else:
            fan_in = math.prod(leaf.shape[1 if name.startswith("blocks.") else 0 : -1])
            value = rng.normal(0.0, fan_in**-0.5, leaf.shape)
        out[name] = value.astype(leaf.dtype)
    return out


def write(folder: Path) -> Path:
    """Write the model folder, complete or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        for seed, (kind, cfg) in enumerate((("dit", DIT), ("vae", VAE_CONFIG), ("text", TEXT))):
            source = {"name": f"tdjax demo, random numbers, seed {seed}"}
            checkpoint.save(part / kind, random_leaves(kind, cfg, seed), kind=kind, cfg=cfg, source=source)
        tokenizer().save(str(part / "tokenizer.json"))
        (part / "model.json").write_text(json.dumps(FACTS, indent=1) + "\n")
        os.replace(part, folder)
    except OSError:
        if not (folder / "model.json").is_file():  # another process may have written the same set first
            raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def folder(cache: Path) -> Path:
    """The trained model of the package; without one, random weights under the cache, written if they are not there."""
    if (PACKAGED / "model.json").is_file():
        return PACKAGED
    digest = hashlib.sha256(json.dumps([VERSION, to_dict(DIT), to_dict(VAE_CONFIG), to_dict(TEXT), FACTS]).encode()).hexdigest()[:12]
    target = cache / f"demo-{digest}"
    return target if (target / "model.json").is_file() else write(target)
