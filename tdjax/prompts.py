"""Prompts to embeddings on the host: from the cache on disk, the rest through the text encoder."""

from __future__ import annotations

import jax
import numpy as np

import tdjax
from tdjax.conditioning import Tokens
from tdjax.config import to_dict
from tdjax.parts import Part
from tdjax.prompt_cache import PromptCache, entry_key


def facts_of(part: Part, where: str) -> dict:
    """Everything beside the tokens that an embedding's bits depend on. where: the device and the mesh that compute it."""
    return {
        "weights": part.identity(),
        "config": to_dict(part.config),
        "where": where,
        "precision": str(jax.config.jax_default_matmul_precision),
        "versions": [tdjax.__version__, jax.__version__],
    }


def device_name(mesh) -> str:
    kind = jax.local_devices()[0].device_kind
    return kind if mesh is None else f"{kind} {dict(mesh.shape)}"


def embed(prompts: list[str], tokens: Tokens, part: Part, cache: PromptCache | None, stages, encode) -> np.ndarray:
    """-> [b s d]. encode(Tokens) -> [b s d] is asked for the prompts that the cache does not know, all at once, and not at all if
    it knows them all."""
    cfg, rows, keys = part.config, [None] * len(prompts), []
    if cache is not None:
        with stages("prompt cache"):
            facts = facts_of(part, device_name(part.mesh))
            keys = [entry_key(ids, mask, facts) for ids, mask in zip(tokens.ids, tokens.mask, strict=True)]
            rows = [cache.get(key, (cfg.text_len, cfg.dim), np.dtype(cfg.policy.compute_dtype)) for key in keys]
    missing = [i for i, row in enumerate(rows) if row is None]
    if missing:
        encoded = encode(Tokens(tokens.ids[missing], tokens.mask[missing]))
        for i, row in zip(missing, encoded, strict=True):
            rows[i] = row
            note = cache and cache.put(keys[i], row, int(tokens.mask[i].sum()), prompts[i])
            if note:
                stages.note(note)
    return np.stack(rows)
