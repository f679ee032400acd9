"""The VAE's encoder and the text encoder of a model, without its transformer."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tdjax.checkpoints import demo
from tdjax.checkpoints.locate import locate
from tdjax.config import VideoSize
from tdjax.errors import CheckpointError
from tdjax.pipeline import memory
from tdjax.pipeline.compilation import Programs
from tdjax.pipeline.components import Component, open_component
from tdjax.pipeline.conditioning import first_frame
from tdjax.pipeline.memory import ExecutionPlan, StagePlan
from tdjax.pipeline.text_encoding import STAGE as TEXT
from tdjax.pipeline.text_encoding import TextEncoding, open_tokenizer
from tdjax.pipeline.vae_coding import ENCODE, VAECoding
from tdjax.precision import Policy
from tdjax.progress import Stages


class Encoders:
    """Both encoders of a model, opened; their weights are read when they are first needed.

    sizes: of all clips. paths: files in place of the model's own, by the arguments of `locate`.
    dtype: of both; None: bfloat16, on a CPU float32.
    Raises CheckpointError where the model has no such component.
    """

    def __init__(
        self,
        model: str,
        paths: dict[str, Path | None],
        sizes: set[VideoSize],
        stages: Stages,
        *,
        dtype: str | None = None,
        offline: bool = False,
    ):
        name = demo.folder() if model == "demo" else model
        parts = ("vae", "text", "tokenizer")
        located = locate(str(name), offline=offline, parts=parts, **paths)
        for line in located.warnings:
            stages.note(line)
        on_cpu = jax.default_backend() == "cpu"
        dtype = dtype or ("float32" if on_cpu else "bfloat16")
        policy = Policy(param=dtype, compute=dtype)
        self.vae = _opened(located.vae, "vae", policy)
        self.text = _opened(located.text, "text", policy)
        if self.vae.kind != "vae":
            raise CheckpointError(
                f"{self.vae.path.name} is a decoder alone",
                "videos are encoded by the VAE's encoder",
                "give Wan2.1_VAE.pth as vae_path",
            )
        self.plan = _plan(self.text, self.vae, sizes)
        programs = Programs(stages)
        tokenizer = open_tokenizer(located.tokenizer, self.text.config.text_len)
        language = located.facts.get("language")
        self._texts = TextEncoding(programs, self.text, tokenizer, None, stages, language=language)
        self._frames = VAECoding(programs, self.vae, stages)

    def identity(self) -> dict[str, Any]:
        """Returns which weights make latents and embeddings, and in which dtype, as JSON values."""
        own = {"vae": self.vae.fingerprint(), "text": self.text.fingerprint()}
        return own | {"dtype": self.vae.config.policy.compute}

    def embed(self, captions: list[str]) -> np.ndarray:
        """Returns embeddings [n s d] of captions, zeros after each one's end."""
        return self._texts.embed(captions, self.plan)

    def latents(self, frames: np.ndarray, size: VideoSize) -> np.ndarray:
        """Returns normalised latents f32 [t h w z] of the frames of a clip, uint8 [T H W 3]."""
        return self._frames.encode_frames(self._vae(size), frames, size)[0]

    def image_latents(self, frame: np.ndarray, size: VideoSize) -> np.ndarray:
        """Returns normalised latents f32 [t h w z] of a first frame, uint8 [H W 3], followed by
        grey ones: what image-to-video reads."""
        return self._frames.encode(self._vae(size), first_frame(frame, size), size)[0]

    def _vae(self, size: VideoSize):
        programs = self._frames.encoder(size)
        return self._frames.ready(programs, self.vae, self.plan, ENCODE)[1]


def _opened(path: Path | None, kind: str, policy: Policy) -> Component:
    if path is None:
        raise CheckpointError(
            f"the model has no {kind}", "videos and captions are encoded", "give another `model`"
        )
    component = open_component(path, kind)
    component.config = dataclasses.replace(component.stored, policy=policy)
    return component


def _plan(text: Component, vae: Component, sizes: set[VideoSize]) -> ExecutionPlan:
    """What both encoders take on the device. Where they do not fit together, text passes layer by
    layer."""
    largest = max(sizes, key=lambda size: size.height * size.width)
    working = memory.vae_working(vae.config, largest.height, largest.width, encode=True)
    weights = memory.weight_bytes("vae", vae.config)
    stages = lambda held: (
        StagePlan(TEXT, TEXT, "text", held, memory.text_working(text.config, 1)),
        StagePlan(ENCODE, ENCODE, "vae", weights, working),
    )
    limit, whole = memory.memory_limit(), stages(memory.weight_bytes("text", text.config))
    if memory.fit_together(whole, limit):
        return ExecutionPlan(whole, limit, True, False, False)
    held = memory.STREAMED_LAYERS * memory.layer_bytes(text.config)
    return ExecutionPlan(stages(held), limit, False, True, False)
