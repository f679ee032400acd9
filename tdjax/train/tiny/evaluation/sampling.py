"""Clips from captions, many at once, and what the detector says of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tdjax.config import SamplerConfig
from tdjax.media.scenes import clips, detector
from tdjax.media.scenes.factors import Attributes
from tdjax.sampling import few_step, schedules, unipc
from tdjax.train.tiny.configs import SIZE
from tdjax.train.tiny.data import captions
from tdjax.train.tiny.data.encoded import embed, tokens_of
from tdjax.train.tiny.work import by_devices

MID = (1.3, 1.0, 0.6)  # TrigFlow times between the first and the last step of the student
_DECODED = 128  # clips through the decoder at once


def student(steps: int = 4, mode: str = "sde") -> SamplerConfig:
    """Returns how the few-step student samples."""
    return SamplerConfig(num_steps=steps, sampler=mode, mid_t=MID)


def teacher(steps: int, mode: str, guidance: float, shift: float) -> SamplerConfig:
    """Returns how the teacher samples, under guidance."""
    return SamplerConfig(
        num_steps=steps, sampler=mode, sigma_max=5000.0, shift=shift, guidance_scale=guidance
    )


def latents(
    dit, text, tokens, negative, key, cfg: SamplerConfig, mesh: Mesh | None = None
) -> jax.Array:
    """Returns normalised latents f32[b t h w c] of a batch of captions: tokens i32[b s 2], those of
    the negative prompt i32[s 2]. A program serves every schedule of one length. mesh: of devices
    that make some of them each, from the noise that one would have."""
    if cfg.few_step:
        times = jnp.asarray(schedules.times(cfg))
        noise = _noise(key, len(tokens), len(times) - 1, dit.cfg.out_channels)
        whole, parts = (dit, text, times), (tokens, noise)
        return by_devices(mesh, _few_steps, whole, parts, mode=cfg.sampler)
    rows = jax.tree.map(jnp.asarray, unipc.step_coefficients(cfg))
    noise = _noise(key, len(tokens), None, dit.cfg.out_channels)
    whole = (dit, text, negative, rows, jnp.float32(cfg.guidance_scale))
    return by_devices(mesh, _many_steps, whole, (tokens, noise))


@partial(jax.jit, static_argnums=(1, 2, 3))
def _noise(key, n: int, steps: int | None, channels: int):  # -> f32[n steps t h w c]
    """What a batch begins from, in every step; f32[n t h w c] without steps."""
    one = (n, *SIZE.latent_grid, channels)
    if steps is None:
        return jax.random.normal(key, one)
    return jnp.moveaxis(jax.random.normal(key, (steps, *one)), 0, 1)


@partial(jax.jit, static_argnames="mode")
def _few_steps(dit, text, times, tokens, noise, *, mode: str):
    rows, noise = embed(text, tokens), jnp.moveaxis(noise, 1, 0)
    return few_step.sample(lambda x, timestep: dit(x, timestep, rows), noise, times, mode)[0]


@jax.jit
def _many_steps(dit, text, negative, schedule, guidance, tokens, noise):
    rows = embed(text, tokens)
    both = jnp.concatenate([rows, jnp.broadcast_to(embed(text, negative[None]), rows.shape)])

    def velocity(x, timestep):
        v = dit(jnp.concatenate([x, x]), jnp.concatenate([timestep, timestep]), both)
        return few_step.guide(*jnp.split(v, 2), guidance)

    start = few_step.teacher_start(noise)
    return few_step.teacher_from(velocity, start, schedule)[0].x


@jax.jit
def decode(vae, x):  # f32[b t h w c] -> uint8[b T H W 3]
    """Returns clips as they are written."""
    return clips.to_uint8(vae.decode(x, whole=True))


def videos(vae, x, mesh: Mesh | None = None) -> np.ndarray:  # f32[n t h w c] -> uint8[n T H W 3]
    """Returns the clips of latents, on the host."""
    return np.concatenate([np.asarray(block) for block in _decoded(vae, x, mesh)])


def measured(vae, x, mesh: Mesh | None = None) -> detector.Measured:  # f32[n t h w c]
    """Returns the detector's view of the clips of latents, on the host."""
    look = lambda video: jax.device_get(by_devices(mesh, detector.measure, (), (video,)))
    parts = [look(block) for block in _decoded(vae, x, mesh)]
    return jax.tree.map(lambda *part: np.concatenate(part), *parts)


def _decoded(vae, x, mesh: Mesh | None) -> Iterator[jax.Array]:
    """The clips of latents, a block at a time for each device."""
    size = _DECODED * (mesh.size if mesh is not None else 1)
    blocks = (x[i : i + size] for i in range(0, len(x), size))
    return (by_devices(mesh, decode, (vae,), (block,)) for block in blocks)


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Captions with what they ask for, as tokens."""

    texts: list[str]
    said: Attributes
    tokens: jax.Array

    def first(self, n: int) -> Prompts:
        """Returns the first n."""
        return Prompts(self.texts[:n], jax.tree.map(lambda x: x[:n], self.said), self.tokens[:n])


def prompts(
    tokenizer, key, n: int, split: str = "train", template: str | None = None, repeats: int = 1
) -> Prompts:
    """Returns n captions, each `repeats` times in a row."""
    said = jax.device_get(clips.sample(key, n, split).said)
    texts = captions.captions(said, int(jax.random.randint(key, (), 0, 2**30)), template)
    many = jax.tree.map(lambda x: np.repeat(x, repeats, 0), said)
    return Prompts(
        [text for text in texts for _ in range(repeats)],
        many,
        jnp.asarray(np.repeat(tokens_of(tokenizer, texts), repeats, 0)),
    )
