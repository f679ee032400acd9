"""Clips from captions, many at once, and what the detector says of them."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from tdjax.config import SamplerConfig
from tdjax.media.scenes import clips, detector
from tdjax.media.scenes.factors import Attributes
from tdjax.sampling import few_step, schedules, unipc
from tdjax.train.tiny.configs import SIZE
from tdjax.train.tiny.data import captions
from tdjax.train.tiny.data.encoded import embed, tokens_of

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


def latents(dit, text, tokens, negative, key, cfg: SamplerConfig):
    """Returns normalised latents f32[b t h w c] of a batch of captions: tokens i32[b s 2], those of
    the negative prompt i32[s 2]. A program serves every schedule of one length."""
    if cfg.few_step:
        return _few_steps(dit, text, tokens, key, jnp.asarray(schedules.times(cfg)), cfg.sampler)
    rows = jax.tree.map(jnp.asarray, unipc.step_coefficients(cfg))
    return _many_steps(dit, text, tokens, negative, key, rows, jnp.float32(cfg.guidance_scale))


def _shape_of(dit, tokens) -> tuple[int, ...]:
    return (len(tokens), *SIZE.latent_grid, dit.cfg.out_channels)


@partial(jax.jit, static_argnames="mode")
def _few_steps(dit, text, tokens, key, times, mode: str):
    rows = embed(text, tokens)
    noise = jax.random.normal(key, (len(times) - 1, *_shape_of(dit, tokens)))
    return few_step.sample(lambda x, timestep: dit(x, timestep, rows), noise, times, mode)[0]


@jax.jit
def _many_steps(dit, text, tokens, negative, key, schedule, guidance):
    rows = embed(text, tokens)
    both = jnp.concatenate([rows, jnp.broadcast_to(embed(text, negative[None]), rows.shape)])

    def velocity(x, timestep):
        v = dit(jnp.concatenate([x, x]), jnp.concatenate([timestep, timestep]), both)
        return few_step.guide(*jnp.split(v, 2), guidance)

    start = few_step.teacher_start(jax.random.normal(key, _shape_of(dit, tokens)))
    return few_step.teacher_from(velocity, start, schedule)[0].x


@jax.jit
def decode(vae, x):  # f32[b t h w c] -> uint8[b T H W 3]
    """Returns clips as they are written."""
    return clips.to_uint8(vae.decode(x, whole=True))


def videos(vae, x) -> np.ndarray:  # f32[n t h w c] -> uint8[n T H W 3] on the host
    """Returns the clips of latents."""
    blocks = (x[i : i + _DECODED] for i in range(0, len(x), _DECODED))
    return np.concatenate([np.asarray(decode(vae, block)) for block in blocks])


def measured(vae, x) -> detector.Measured:  # f32[n t h w c]
    """Returns the detector's view of the clips of latents, on the host."""
    blocks = (x[i : i + _DECODED] for i in range(0, len(x), _DECODED))
    parts = [jax.device_get(detector.measure(decode(vae, block))) for block in blocks]
    return jax.tree.map(lambda *part: np.concatenate(part), *parts)


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
