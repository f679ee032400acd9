"""Networks and data of the tiny recipe at sizes that train in seconds; compiled quickly rather than
well."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import random_model
from arrays import put

from tdjax.checkpoints import orbax
from tdjax.config import TextConfig, VAEConfig
from tdjax.media.scenes import clips
from tdjax.models.umt5 import UMT5
from tdjax.models.wan_dit import DiT
from tdjax.models.wan_vae import VAE
from tdjax.precision import FLOAT32
from tdjax.progress import Stages
from tdjax.text.tokenizer import Tokenizer
from tdjax.train.tiny import configs, work
from tdjax.train.tiny.data import captions, encoded
from tdjax.train.tiny.data.encoded import Data
from tdjax.train.tiny.data.tokenizer import build
from tdjax.train.tiny.stages import sla

# Half of the usual time of compiling goes into fused loops.
QUICK = {"xla_backend_optimization_level": 0}
jit = functools.partial(jax.jit, compiler_options=QUICK)

TEXT = TextConfig(
    vocab=256, dim=16, attention_dim=16, ffn_dim=16, heads=1, layers=1, text_len=32, policy=FLOAT32
)
DIT = dataclasses.replace(
    configs.DIT, dim=32, ffn_dim=32, layers=1, heads=1, text_dim=16, freq_dim=32
)
SLA = dataclasses.replace(DIT, attention="sla", sla=configs.DIT_SLA.sla)
SMALL_VAE = VAEConfig(
    dim=4,
    latent_channels=2,
    multipliers=(1, 1, 1, 1),
    res_blocks=1,
    mean=(0.0,) * 2,
    std=(1.0,) * 2,
    policy=FLOAT32,
)


def repeated(step, steps: int):
    """work.repeated, compiled quickly."""
    return jit(
        lambda state, *data: jax.lax.scan(
            lambda state, _: step(state, *data), state, None, length=steps
        )
    )


@functools.cache
def tokenizer(folder) -> Tokenizer:
    build(captions.vocabulary()).save(str(folder / "tokenizer.json"))
    return Tokenizer(folder / "tokenizer.json", TEXT.text_len)


def shades(tokenizer) -> Data:
    """Latents that are one number each, by the colour in their captions."""
    said = clips.sample(jax.random.key(0), 16).said
    rows = np.stack([encoded.tokens_of(tokenizer, texts) for texts in encoded.texts_of(said, 0)], 1)
    shade = put(said.colour, jnp.float32).reshape(-1, 1, 1, 1, 1) / 4 - 1
    return Data(jnp.broadcast_to(shade, (16, 3, 4, 4, 8)).astype(jnp.bfloat16), put(rows))


def drawn(kind: str, cfg, seed: int, **change):
    """A network of random weights, drawn by numpy: a program that draws them all takes long to
    compile. change={leaf: factor} (dots as double underscores) scales a leaf."""
    leaves = random_model.random_leaves(kind, cfg, seed)
    for name, factor in change.items():
        leaves[name.replace("__", ".")] *= np.float32(factor)
    return orbax.assemble(orbax.abstract(kind, cfg), jax.device_put(leaves))


def dit(cfg=DIT, seed: int = 0) -> DiT:
    """A network whose output is not zero."""
    return drawn("dit", cfg, seed, head__proj__kernel=0.1 * cfg.dim**0.5)


def text(cfg=TEXT) -> UMT5:
    return drawn("text", cfg, 3)


def vae(cfg=SMALL_VAE) -> VAE:
    return drawn("vae", cfg, 0)


PACKED_TEXT = dataclasses.replace(TEXT, dim=32, attention_dim=32)
PACKED_DIT = dataclasses.replace(
    configs.DIT, dim=128, ffn_dim=128, layers=1, heads=2, text_dim=32
)  # int8 layers come in tiles of 128
PACKED = work.Sizes(
    vae=dataclasses.replace(SMALL_VAE, latent_channels=8, mean=(0.0,) * 8, std=(1.0,) * 8),
    text=PACKED_TEXT,
    dit=PACKED_DIT,
    sla=dataclasses.replace(PACKED_DIT, attention="sla", sla=configs.DIT_SLA.sla),
)


def finished_run(folder, **stages) -> work.Run:
    """A run whose stages have left random networks."""
    run = work.Run(folder=folder, settings=stages, sizes=PACKED, stages=Stages(False))
    dense = dit(PACKED.dit)
    work.export(run, "vae", "vae", vae(PACKED.vae), PACKED.vae, steps=3)
    work.export(run, "text", "text", text(PACKED.text), PACKED.text)
    for name in ("teacher", "student"):
        work.export(run, name, "dit", dense, PACKED.dit, steps=5, step=7)
    for name in ("sla", "merged"):
        work.export(run, name, "dit", sla.sparse(dense, PACKED.sla, "float32"), PACKED.sla, steps=4)
    return run
