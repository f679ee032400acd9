"""Every named value inside one forward pass of the transformer, computed by the layers' own methods
with the blocks unrolled.

Keys are those of the golden vectors' `mid/` values. For comparing implementations; generation never
runs this.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.sparse_attention import (
    block_map,
    chosen_blocks,
    dense_map,
    linear_attention,
    pooled_scores,
    sparse_attention,
)
from tdjax.models.attention import SLACore
from tdjax.models.linear import Activations
from tdjax.models.norms import sinusoid
from tdjax.models.rope import angles, over_grid, rope
from tdjax.models.wan_dit import DiT


def intermediates(model: DiT, x, timestep, text, image=None, features=None) -> dict[str, jax.Array]:
    """The arguments of `DiT.__call__` -> {key: array}, among them "v", the output [b t h w c]."""
    model.check(x=x, timestep=timestep, text=text, image=image, features=features)
    cfg, grid = model.cfg, model.grid(x)
    out = _around(model, x, timestep, text, image, features)
    table, kvs = rope(grid, cfg.head_dim), model.text_kv(text, features)
    h = out["patch_embed"]
    for i in range(cfg.layers):
        block, kv = jax.tree.map(lambda leaf, i=i: leaf[i], (model.blocks, kvs))
        values = inside(block, h, out["e0"], kv, table)
        out |= {f"block{i}/{name}": value for name, value in values.items()}
        h = values["out"]
    out["head_in"] = model.head.norm(h, out["e"])
    out["head_out"] = model.head(h, out["e"])
    return out | {"v": model.unpatchify(out["head_out"], grid)}


def _around(model, x, timestep, text, image, features):
    """What is computed before the blocks."""
    grid = model.grid(x)
    e, e0 = model.time(timestep)
    cos, sin, _ = rope(grid, model.cfg.head_dim)
    tables = [jnp.asarray(table, jnp.float32) for table in angles(grid, model.cfg.head_dim)]
    out = {
        "patch_embed": model.patchify(x, image),
        "sinusoid": sinusoid(model.rounded(timestep), model.cfg.freq_dim),
        "e": e,
        "e0": e0,
        "text_embed": model.embed_text(text),
        "rope_freqs": over_grid(tables, grid),
        "rope_cos": cos,
        "rope_sin": sin,
    }
    return out if features is None else out | {"img_embed": model.embed_image(features)}


def inside(block, x, e, kv, table):
    """One block: the steps of `Block.__call__`, each value kept."""
    shift1, scale1, gate1, shift2, scale2, gate2 = block.modulations(e)
    attn, out = block.self_attn, {}
    x, h = block.norm1(x, scale1, shift1)
    out["self_attn_in"] = floats(attn.q, h)
    out["q_norm"], out["k_norm"] = attn.queries(h), attn.keys(h)
    out["q_rope"], _ = attn.core.queries(attn.q(h), attn.norm_q, table)
    out["k_rope"], _ = attn.core.keys(attn.k(h), attn.norm_k, table)
    if isinstance(attn.core, SLACore):
        out |= _sparse_linear(attn.core, out["q_rope"], out["k_rope"], attn.values(h))
    y = out["self_attn_out"] = attn(h, table)
    x, h = block.norm3(x, residual=y, gate=gate1)
    out["after_self_attn"], out["cross_attn_in"] = x, floats(block.cross_attn.q, h)
    y = out["cross_attn_out"] = block.cross_attn(h, kv)
    x, h = block.norm2(x, scale2, shift2, residual=y)
    out["after_cross_attn"], out["ffn_in"] = x, floats(block.up, h)
    out["ffn_out"] = block.down(block.down.gelu_quantized(block.up(h)))
    return out | {"out": block.mlp(x, h, gate2)}


def floats(layer, h):  # what `layer` reads -> [b l d]
    """The input of a layer, dequantised where it has 8 bits."""
    if not isinstance(h, Activations):
        return h
    return layer.dequantize(layer.rows(h.values, h.scale)).reshape(h.values.shape).astype(h.dtype)


def _sparse_linear(core, q, k, v):
    """The parts of sparse-linear attention, by the float ops; q k v [b l h k]."""
    sla = core.cfg.sla
    sizes = {"block_q": sla.block_q, "block_k": sla.block_k}
    blocks = block_map(q, k, topk=sla.topk, **sizes)
    kernel, bias = core.proj.kernel[...], core.proj.bias[...]
    return {
        "pooled_score": pooled_scores(q, k, **sizes),
        "sparse_map": dense_map(blocks, -(-k.shape[1] // sla.block_k)),
        "real_topk": jnp.int32(chosen_blocks(k.shape[1], sla.topk, sla.block_k)),
        "o_s": sparse_attention(q, k, v, blocks, **sizes, impl=core.cfg.impl),
        "o_l_raw": linear_attention(q, k, v, jnp.eye(*kernel.shape), jnp.zeros_like(bias)),
        "o_l": linear_attention(q, k, v, kernel, bias),
    }
