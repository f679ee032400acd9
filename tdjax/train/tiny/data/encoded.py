"""Encoded clips with their captions, kept on the device: what the stages after the autoencoder
train on."""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax import lax

from tdjax.media.scenes import clips
from tdjax.media.scenes.factors import Attributes
from tdjax.parallel.sharding import constrain
from tdjax.text.tokenizer import Tokenizer
from tdjax.train.tiny.data import captions
from tdjax.train.tiny.data.tokenizer import build
from tdjax.train.tiny.work import Run, by_devices

FULL = 3  # captions of a clip that say everything; one more leaves something out
_SHORT = (("size",), ("speed",), ("size", "speed"))  # what the last caption of a clip leaves out
_AT_ONCE = 128  # clips through the encoder


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Data:
    """Clips: latents bf16[n t h w c], tokens i32[n captions s 2] (id, mask)."""

    latents: jax.Array
    tokens: jax.Array

    def draw(self, key, n: int):  # -> latents bf16[b t h w c], tokens i32[b s 2]
        """Returns a batch with replacement, one of the captions each, laid over the mesh."""
        which, how = jax.random.split(key)
        i = jax.random.randint(which, (n,), 0, self.latents.shape[0])
        caption = jax.random.randint(how, (n,), 0, self.tokens.shape[1])
        return constrain(self.latents[i], "batch"), constrain(self.tokens[i, caption], "batch")


def tokenizer(run: Run) -> Tokenizer:
    """Returns the run's tokenizer, written if it is not there."""
    path = run.folder / "tokenizer.json"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        build(captions.vocabulary()).save(str(path))
    return Tokenizer(path, run.sizes.text.text_len)


def tokens_of(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:  # -> i32[b s 2]
    """Returns ids and masks of clean texts, all at once."""
    out = np.zeros((len(texts), tokenizer.text_len, 2), np.int32)
    found = tokenizer.library.encode_batch(texts, add_special_tokens=False)
    for row, encoded in zip(out, found, strict=True):
        ids = [*encoded.ids[: len(row) - 1], tokenizer.end]
        row[: len(ids), 0], row[: len(ids), 1] = ids, 1
    return out


def negative(tokenizer: Tokenizer) -> jax.Array:  # -> i32[s 2]
    """Returns the empty caption."""
    return jnp.asarray(tokens_of(tokenizer, [""])[0])


def embed(text, tokens):  # i32[b s 2] -> [b s d]
    """Returns captions through a text encoder."""
    return text(tokens[..., 0], tokens[..., 1])


def texts_of(said: Attributes, seed: int) -> list[list[str]]:
    """Returns FULL captions of every clip, and one that leaves something out, as lists of all
    clips."""
    said = jax.device_get(said)
    short: list[str] = [""] * len(said.shape)
    for i, omit in enumerate(_SHORT):
        some = jax.tree.map(lambda x, i=i: x[i :: len(_SHORT)], said)
        short[i :: len(_SHORT)] = captions.captions(some, seed + FULL + i, omit=omit)
    return [*(captions.captions(said, seed + i) for i in range(FULL)), short]


@jax.jit
def encode(vae, factors: clips.Factors):  # -> bf16[b t h w c]
    """Returns the latents of clips."""
    return vae.encode(clips.render(factors), whole=True).astype(jnp.bfloat16)


@partial(jax.jit, static_argnames="size")
def _encoded(vae, key, blocks, *, size: int):  # -> bf16[n t h w c], what captions say of them
    """Fresh clips of the training split through the encoder, a block at a time: those of these
    numbers, i32[n]."""

    def one(i):
        factors = clips.sample(jax.random.fold_in(key, i), size)
        return encode(vae, factors), factors.said

    found = lax.map(one, blocks)
    return jax.tree.map(lambda x: rearrange(x, "n b ... -> (n b) ..."), found)


def make(run: Run, vae, n: int) -> Data:
    """Returns n clips (in whole blocks of at most 128) with their captions; the same for the same
    seed."""
    size = min(_AT_ONCE, n)
    with run.stages("encode clips"):
        whole, blocks = (vae, run.key("data")), jnp.arange(math.ceil(n / size))
        latents, said = by_devices(run.mesh, _encoded, whole, (blocks,), size=size)
        # Meanwhile the device encodes.
        rows = [tokens_of(tokenizer(run), texts) for texts in texts_of(said, run.seed)]
        latents = jax.device_put(latents, jax.devices()[0])
        return Data(jax.block_until_ready(latents), jnp.asarray(np.stack(rows, 1)))
