"""Prompts to embeddings on the host: from the cache on disk, the rest through the text encoder,
whole or layer by layer."""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import tdjax
from tdjax.checkpoints import orbax
from tdjax.checkpoints.published.files import open_source
from tdjax.config import to_dict
from tdjax.errors import CheckpointError, UsageError
from tdjax.parallel import hosts
from tdjax.pipeline import compilation, memory
from tdjax.pipeline.compilation import Program, Programs
from tdjax.pipeline.components import Component
from tdjax.pipeline.memory import ExecutionPlan
from tdjax.pipeline.request import Request
from tdjax.pipeline.stage import Stage
from tdjax.progress import Stages
from tdjax.text.language import caption_of
from tdjax.text.prompt_cache import PromptCache, entry_key
from tdjax.text.sentencepiece import Spiece, read_spiece, tokenizer_of
from tdjax.text.tokenizer import Tokenizer, Tokens

STAGE = "text"
TOGETHER = (
    64  # prompts that pass a streamed layer together: 270 MB of them on the device (umT5-xxl)
)
BLOCKS = "blocks."  # how names of the encoder's stacked leaves begin


class TextEncoding(Stage):
    """The stage of the text encoder.

    component, tokenizer: None where the model was opened without them.
    cache:                of embeddings, or None.
    language:             the closed language of a small model, or None.
    dtype:                in which the transformer reads embeddings.
    """

    def __init__(
        self,
        compiler: Programs,
        component: Component | None,
        tokenizer: Tokenizer | None,
        cache: PromptCache | None,
        stages: Stages,
        dtype: Any = np.float32,
        language: dict[str, Any] | None = None,
    ):
        super().__init__(compiler, stages)
        _check_vocabulary(tokenizer, component)
        self.component = component
        self.tokenizer = tokenizer
        self.cache = cache
        self.dtype = dtype
        self.language = language

    @property
    def encoder(self) -> Component:
        """The component; UsageError where there is none."""
        if self.component is None:
            raise _absent()
        return self.component

    def programs(self, request: Request, plan: ExecutionPlan) -> list[Program]:
        if self.component is None:
            return []
        return self._layer_programs() if plan.stream_text else self._program()

    def run(self, request: Request, plan: ExecutionPlan) -> list[np.ndarray]:
        """Returns for each prompt what the transformer reads: [1 s d], or prompt and negative
        prompt [2 s d] under guidance."""
        prompts = list(request.prompts) if request.prompt_embeds is None else []
        negative = [request.negative_prompt] if request.sampler.guided else []
        rows = self.embed(prompts + negative, plan) if prompts + negative else np.zeros((0,))
        embeds = rows[: len(prompts)] if request.prompt_embeds is None else request.prompt_embeds
        below = [rows[len(prompts) :]] if negative else []
        return [np.concatenate([row[None], *below]).astype(self.dtype) for row in embeds]

    def embed(self, prompts: list[str], plan: ExecutionPlan) -> np.ndarray:
        """Returns embeddings [b s d], zeros after each prompt's end, which take no memory. The
        encoder runs for the prompts that the cache does not know, and not at all if it knows them
        all. No row is held twice: there may be many."""
        if self.tokenizer is None:
            raise _absent()
        if self.language is not None:
            prompts = [caption_of(self.language, prompt) for prompt in prompts]
        cfg, tokens = self.encoder.config, self.tokenizer.encode(prompts)
        dtype = np.dtype(cfg.policy.compute_dtype)
        embeds = _zeros((len(prompts), cfg.text_len, cfg.dim), dtype)
        keys: list[str] = []
        missing = list(range(len(prompts)))
        if self.cache is not None:
            with self.stages("prompt cache"):
                facts = self.facts()
                each = zip(tokens.ids, tokens.mask, strict=True)
                keys = [entry_key(ids, mask, facts) for ids, mask in each]
                missing = self._from_cache(self.cache, keys, embeds)
        if not missing:
            return embeds
        encoded = self.encode(Tokens(tokens.ids[missing], tokens.mask[missing]), plan)
        for i, row in zip(missing, encoded, strict=True):
            end = int(tokens.mask[i].sum())
            embeds[i, :end] = row[:end]
            if self.cache is not None and (hosts.first() or not self.compiler.apart):
                note = self.cache.put(keys[i], row, end, prompts[i])
                if note:
                    self.stages.note(note)
        return embeds

    def _from_cache(self, cache: PromptCache, keys: list[str], embeds: np.ndarray) -> list[int]:
        """Fills rows [b s d] of zeros; returns the numbers of those that the cache lacks. Of
        several processes the first has the cache."""
        lacks = lambda: [i for i, key in enumerate(keys) if not cache.read(key, embeds[i])]
        if not self.compiler.apart:
            return lacks()
        missing = json.loads(hosts.agreed(lambda: json.dumps(lacks())))
        for i in {*range(len(keys))} - {*missing}:
            embeds[i] = hosts.of_first(embeds[i])
        return missing

    def encode(self, tokens: Tokens, plan: ExecutionPlan) -> Iterator[np.ndarray]:
        """Yields the embedding [s d] of each row of tokens [b s], on the host; the encoder is freed
        at the end where weights do not stay."""
        with memory.naming("text", plan, STAGE):
            if self.encoder.module is None and plan.stream_text:
                self.compiled(self._layer_programs(), plan, STAGE)
                for begin in range(0, len(tokens.ids), TOGETHER):
                    rows = slice(begin, begin + TOGETHER)
                    with self.timed("text, layer by layer", plan, STAGE):
                        encoded = self.streamed(Tokens(tokens.ids[rows], tokens.mask[rows]))
                    yield from encoded
                return
            _, encoder = self.ready(self._program(), self.encoder, plan, STAGE)
            with self.timed("text", plan, STAGE):
                yield from self.whole(encoder, tokens)
            if not plan.keep_resident:
                self.encoder.free()

    def facts(self) -> dict[str, Any]:
        """Returns everything beside the tokens that an embedding's bits depend on."""
        mesh, kind = self.encoder.mesh, jax.local_devices()[0].device_kind
        return {
            "weights": self.encoder.identity(),
            "config": to_dict(self.encoder.config),
            "where": kind if mesh is None else f"{kind} {dict(mesh.shape)}",
            "precision": str(jax.config.jax_default_matmul_precision),  # pyright: ignore
            "versions": [tdjax.__version__, jax.__version__],
        }

    # -- the whole encoder on the device -----------------------------------------------------------

    def whole(self, encoder, tokens: Tokens) -> Iterator[np.ndarray]:
        """Yields the embedding [s d] of each row of tokens [b s] on the host."""
        run, place = self._program()[0].wait(), self.compiler.place
        for row in zip(tokens.ids[:, None], tokens.mask[:, None], strict=True):
            yield np.asarray(run(encoder, *place(row)))[0]

    def _program(self) -> list[Program]:
        row = self.compiler.shape((1, self.encoder.config.text_len), jnp.int32)
        encoder = self.encoder.abstract()
        return [self.compiler.request("text", compilation.encode_text, encoder, row, row)]

    # -- a layer at a time -------------------------------------------------------------------------

    def streamed(self, tokens: Tokens) -> list[np.ndarray]:
        """Returns the embedding [s d] of each row of tokens [b s], with one layer of the encoder on
        the device and the next on its way; all prompts pass each layer together, one after another.
        Of the embedding table only the rows of the prompts are read."""
        layer, end = self.compiler.wait(self._layer_programs())
        cfg, place = self.encoder.config, self.compiler.place
        module = self.encoder.abstract()
        ids, where = np.unique(tokens.ids, return_inverse=True)
        table = self.encoder.rows("embed.embedding", ids).astype(cfg.policy.compute_dtype)
        xs = [place(table[row][None]) for row in where.reshape(tokens.ids.shape)]
        masks = [place(row[None]) for row in tokens.mask]
        before = xs
        for leaves in self.encoder.layers(BLOCKS):
            stacked = {name.removeprefix(BLOCKS): leaf for name, leaf in leaves.items()}
            block = _unflatten(module.blocks, stacked)
            jax.block_until_ready(before)  # the layer before this one is done: its weights are free
            before = xs = [layer(block, x, mask) for x, mask in zip(xs, masks, strict=True)]
            del leaves, stacked, block
        leaves = {
            name: self.encoder.leaf(f"norm.{name}") for name in orbax.named_leaves(module.norm)
        }
        norm = _unflatten(module.norm, leaves)
        return [np.asarray(end(norm, x, mask))[0] for x, mask in zip(xs, masks, strict=True)]

    def _layer_programs(self) -> list[Program]:
        """One layer, with its input donated, and what comes after the last."""
        cfg, shape = self.encoder.config, self.compiler.shape
        module, request = self.encoder.abstract(), self.compiler.request
        x = shape((1, cfg.text_len, cfg.dim), cfg.policy.compute_dtype)
        mask = shape((1, cfg.text_len), jnp.int32)
        block = jax.tree.map(lambda leaf: shape(leaf.shape[1:], leaf.dtype), module.blocks)
        norm = self.compiler.shapes_of(module.norm)
        return [
            request("text", compilation.text_layer, block, x, mask, donate=(1,)),
            request("text", compilation.text_end, norm, x, mask),
        ]


def _zeros(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Zeros of which memory holds only the pages that are written. numpy's own ask for huge pages,
    and a short prompt in each would fill it."""
    size = math.prod(shape) * dtype.itemsize
    return np.ndarray(shape, dtype, mmap.mmap(-1, size or 1, access=mmap.ACCESS_COPY))


def _absent() -> UsageError:
    return UsageError(
        "this model was opened without a text encoder",
        "a prompt cannot be encoded",
        "give prompt_embeds",
    )


def open_tokenizer(path: Path | None, text_len: int) -> Tokenizer | None:
    """Returns the tokenizer of a file or folder; a .gguf file of umT5 holds its own, and so does a
    .safetensors file of ComfyUI, as a tensor of bytes."""
    if path is None:
        return None
    if path.suffix == ".safetensors":
        held = open_source(path).tensors.get("spiece_model")
        if held is None:
            raise CheckpointError(
                f"no tokenizer in {path}",
                "a text encoder's file may hold it as spiece_model",
                "give tokenizer.json or spiece.model of google/umt5-xxl as tokenizer_path",
            )
        return Tokenizer(path, text_len, read_spiece(path, held.read().tobytes()))
    if path.suffix != ".gguf":
        return Tokenizer(path, text_len)
    from tdjax.checkpoints.published.read_gguf import vocabulary  # its library is slow to import

    return Tokenizer(path, text_len, tokenizer_of(path, Spiece(**vocabulary(path))))


def _check_vocabulary(tokenizer: Tokenizer | None, component: Component | None) -> None:
    """An id outside the embedding would be clamped without a word."""
    if tokenizer and component and tokenizer.size > component.config.vocab:
        raise CheckpointError(
            f"{tokenizer.path} has {tokenizer.size} ids, {component.path.name} has"
            f" {component.config.vocab} embeddings",
            "they belong to different text encoders",
            "give the tokenizer of google/umt5-xxl as tokenizer_path",
        )


def _unflatten(module, leaves: dict[str, Any]):
    """The module of shapes with leaves in their places."""
    return jax.tree.unflatten(
        jax.tree.structure(module), [leaves[name] for name in orbax.named_leaves(module)]
    )
