"""Previews: frames of the video that the sampler predicts after each step, before it is there.

A state is noisy until the last step; what is shown is the clean video that the network predicted at
the step. The programs of the loop are those of a call a step: previews change no bit of the video.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tdjax.pipeline import memory
from tdjax.pipeline.compilation import Program
from tdjax.pipeline.memory import ExecutionPlan
from tdjax.pipeline.request import Request
from tdjax.pipeline.stage import Stage
from tdjax.pipeline.vae_coding import DECODE, VAECoding
from tdjax.sampling import few_step

LABEL = "preview"
# Colours in [-1, 1] of normalised Wan2.1 latents, a row for each channel, and their bias. The
# figures are those of comfyanonymous/ComfyUI comfy/latent_formats.py (Wan21).
COLOURS = (
    (-0.1299, -0.1692, 0.2932), (0.0671, 0.0406, 0.0442), (0.3568, 0.2548, 0.1747),
    (0.0372, 0.2344, 0.1420), (0.0313, 0.0189, -0.0328), (0.0296, -0.0956, -0.0665),
    (-0.3477, -0.4059, -0.2925), (0.0166, 0.1902, 0.1975), (-0.0412, 0.0267, -0.1364),
    (-0.1293, 0.0740, 0.1636), (0.0680, 0.3019, 0.1128), (0.0032, 0.0581, 0.0639),
    (-0.1251, 0.0927, 0.1699), (0.0060, -0.0633, 0.0005), (0.3477, 0.2275, 0.2950),
    (0.1984, 0.0913, 0.1861),
)  # fmt: skip
BIAS = (-0.1835, -0.0868, -0.3360)


def predicted(state, other, schedule, *, sampler: str):
    """The latents f32[1 t h w c] that the network predicted at a step, from the state after it; of
    the first of several videos that are made together.

    other: for "ode" the state before it. schedule: as the step's own in `compilation.denoise`.
    """
    if sampler not in few_step.UPDATE:
        return state.m1[:1]
    noise, (u, u_next) = schedule
    other = noise[0] if sampler == "sde" else other
    return few_step.predicted(state, other, u, u_next, sampler)[:1]


def colours(latents):
    """Normalised Wan2.1 latents f32[1 t h w 16] -> uint8[t h w 3], a pixel for each."""
    table, bias = jnp.asarray(COLOURS), jnp.asarray(BIAS)
    rgb = jnp.einsum("bthwc,ck->bthwk", latents, table, precision="highest") + bias
    return jnp.round((jnp.clip(rgb, -1.0, 1.0) + 1.0) * 127.5).astype(jnp.uint8)[0]


class Previews(Stage):
    """What shows the steps of a sampler, where a call asks for it.

    A small decoder makes whole frames. Wan2.1's latents become colours otherwise: an eighth of the
    size and a quarter of the frames, which needs no weights. The VAE of a small model, whose
    latents are its own, decodes them itself.
    """

    def __init__(self, coding: VAECoding):
        super().__init__(coding.compiler, coding.stages)
        self.coding = coding

    @property
    def decoded(self) -> bool:
        """Whether the pipeline's decoder makes them."""
        return memory.previews_decoded(self.coding.component.config)

    def programs(self, request: Request, plan: ExecutionPlan, state, other, chunk) -> list[Program]:
        """Returns the programs for the shapes of a step's states and schedule."""
        return [self._predicted(request, state, other, chunk), *self._frames(request, plan)]

    def show(
        self, request: Request, plan: ExecutionPlan, step: int, state: Any, other: Any, chunk: Any
    ) -> None:
        """Calls `on_preview` after a step; arguments as those of `predicted`. Raises Cancelled."""
        run = self._predicted(request, state, other, chunk).wait()
        latents = run(state, other, chunk)
        with self.timed(LABEL, plan, DECODE):
            frames = self._shown(request, plan, latents)
        self.stages.listener.preview(step, frames)

    def _shown(self, request: Request, plan: ExecutionPlan, latents: jax.Array) -> np.ndarray:
        """uint8 [T H W 3] on the host, of latents on the device."""
        programs = self._frames(request, plan)
        if not self.decoded:
            return np.asarray(programs[0].wait()(latents))
        vae = self.coding.component.load()
        chunks = self.coding.decode(vae, np.asarray(latents), "uint8", plan.tiled_vae)
        return np.concatenate([frames for frames, _ in chunks])

    def _predicted(self, request: Request, state, other, chunk) -> Program:
        static = {"sampler": request.sampler.sampler}
        return self.compiler.request(LABEL, predicted, state, other, chunk, **static)

    def _frames(self, request: Request, plan: ExecutionPlan) -> list[Program]:
        grid = (1, *request.size.latent_grid, self.coding.component.config.latent_channels)
        if self.decoded:
            return self.coding.decoder(grid, "uint8", plan.tiled_vae)
        return [self.compiler.request(LABEL, colours, self.compiler.shape(grid))]
