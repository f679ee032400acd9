"""Prompts to embeddings on the host: from the cache on disk, the rest through the text encoder,
whole or layer by layer."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import tdjax
from tdjax.checkpoints import orbax
from tdjax.config import to_dict
from tdjax.pipeline import compilation
from tdjax.pipeline.components import Part
from tdjax.text.prompt_cache import PromptCache, entry_key
from tdjax.text.tokenizer import Tokenizer, Tokens

BLOCKS = "blocks."  # how names of the encoder's stacked leaves begin


class TextEncoder:
    """The text encoder of a pipeline as stages."""

    def __init__(
        self,
        compiled: compilation.Programs,
        part: Part,
        tokenizer: Tokenizer | None,
        cache: PromptCache | None,
        stages,
    ):
        self.compiled, self.part, self.tokenizer, self.cache, self.stages = (
            compiled,
            part,
            tokenizer,
            cache,
            stages,
        )

    def embed(self, prompts: list[str], encode: Callable[[Tokens], np.ndarray]) -> np.ndarray:
        """-> [b s d]. `encode` is asked for the prompts that the cache does not know, all at once,
        and not at all if it knows them all."""
        cfg, tokens = self.part.config, self.tokenizer.encode(prompts)
        rows, keys = [None] * len(prompts), []
        if self.cache is not None:
            with self.stages("prompt cache"):
                facts = self.facts()
                keys = [
                    entry_key(ids, mask, facts)
                    for ids, mask in zip(tokens.ids, tokens.mask, strict=True)
                ]
                rows = [
                    self.cache.get(key, (cfg.text_len, cfg.dim), np.dtype(cfg.policy.compute_dtype))
                    for key in keys
                ]
        missing = [i for i, row in enumerate(rows) if row is None]
        if missing:
            encoded = encode(Tokens(tokens.ids[missing], tokens.mask[missing]))
            for i, row in zip(missing, encoded, strict=True):
                rows[i] = row
                note = self.cache and self.cache.put(
                    keys[i], row, int(tokens.mask[i].sum()), prompts[i]
                )
                if note:
                    self.stages.note(note)
        return np.stack(rows)

    def facts(self) -> dict:
        """Everything beside the tokens that an embedding's bits depend on."""
        mesh, kind = self.part.mesh, jax.local_devices()[0].device_kind
        return {
            "weights": self.part.identity(),
            "config": to_dict(self.part.config),
            "where": kind if mesh is None else f"{kind} {dict(mesh.shape)}",
            "precision": str(jax.config.jax_default_matmul_precision),
            "versions": [tdjax.__version__, jax.__version__],
        }

    # -- the whole encoder on the device -----------------------------------------------------------

    def program(self):
        row = self.compiled.shape((1, self.part.config.text_len), jnp.int32)
        return self.compiled.get(
            self.stages, "text", compilation.encode_text, self.part.abstract(), row, row
        )

    def whole(self, encoder, tokens: Tokens) -> np.ndarray:
        """Tokens [b s] -> [b s d] on the host, one prompt at a time."""
        run, place = self.program(), self.compiled.place
        each = zip(tokens.ids[:, None], tokens.mask[:, None], strict=True)
        return np.concatenate(
            [np.asarray(row) for row in [run(encoder, *place(row)) for row in each]]
        )

    # -- a layer at a time -------------------------------------------------------------------------

    def layer_programs(self):
        """Of one layer, with its input donated, and of what comes after the last."""
        cfg, module, shape = self.part.config, self.part.abstract(), self.compiled.shape
        x, mask = (
            shape((1, cfg.text_len, cfg.dim), cfg.policy.compute_dtype),
            shape((1, cfg.text_len), jnp.int32),
        )
        block = jax.tree.map(lambda leaf: shape(leaf.shape[1:], leaf.dtype), module.blocks)
        norm = jax.tree.map(lambda leaf: shape(leaf.shape, leaf.dtype), module.norm)
        get = lambda function, *args, donate=(): self.compiled.get(
            self.stages, "text", function, *args, donate=donate
        )
        return get(compilation.text_layer, block, x, mask, donate=(1,)), get(
            compilation.text_end, norm, x, mask
        )

    def streamed(self, tokens: Tokens) -> np.ndarray:
        """The same, with one layer of the encoder on the device and the next on its way; all
        prompts pass each layer together, one after another. Of the embedding table only the rows of
        the prompts are read."""
        (layer, end), cfg, place = self.layer_programs(), self.part.config, self.compiled.place
        module = self.part.abstract()
        ids, where = np.unique(tokens.ids, return_inverse=True)
        table = self.part.rows("embed.embedding", ids).astype(cfg.policy.compute_dtype)
        xs = [place(table[row][None]) for row in where.reshape(tokens.ids.shape)]
        masks = [place(row[None]) for row in tokens.mask]
        before = xs
        for leaves in self.part.layers(BLOCKS):
            block = unflatten(
                module.blocks, {name.removeprefix(BLOCKS): leaf for name, leaf in leaves.items()}
            )
            jax.block_until_ready(before)  # the layer before this one is done: its weights are free
            before = xs = [layer(block, x, mask) for x, mask in zip(xs, masks, strict=True)]
            del leaves, block
        norm = unflatten(
            module.norm,
            {name: self.part.leaf(f"norm.{name}") for name in orbax.named_leaves(module.norm)},
        )
        return np.concatenate(
            [np.asarray(end(norm, x, mask)) for x, mask in zip(xs, masks, strict=True)]
        )


def unflatten(abstract, leaves: dict):
    return jax.tree.unflatten(
        jax.tree.structure(abstract), [leaves[name] for name in orbax.named_leaves(abstract)]
    )
