"""Every named value inside one forward pass of the transformer, computed by the layers' own methods with the blocks unrolled.

Keys are those of the golden vectors' `mid/` values. For comparing implementations; generation never runs this.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.sparse_attention import block_map, chosen_blocks, dense_map, linear_attention, pooled_scores, sparse_attention
from tdjax.attention import SLACore
from tdjax.layers import modulate, sinusoid
from tdjax.models.rope import angles, over_grid, rope, rotate
from tdjax.models.wan_dit import DiT, gated


def intermediates(model: DiT, x, timestep, text, image=None, features=None) -> dict[str, jax.Array]:
    """The arguments of `DiT.__call__` -> {key: array}, among them "v", the output [b t h w c]."""
    model.check(x, timestep, text, image, features)
    cfg, grid = model.cfg, model.grid(x)
    out = around(model, x, timestep, text, image, features)
    table = rope(grid, cfg.head_dim)
    h = out["patch_embed"]
    for i in range(cfg.layers):
        block = jax.tree.map(lambda leaf, i=i: leaf[i], model.blocks)
        values = inside(block, h, out["e0"], out["text_embed"], out.get("img_embed"), table)
        out |= {f"block{i}/{name}": value for name, value in values.items()}
        h = values["out"]
    out["head_in"] = model.head.norm(h, out["e"])
    out["head_out"] = model.head(h, out["e"])
    return out | {"v": model.unpatchify(out["head_out"], grid)}


def around(model, x, timestep, text, image, features):
    """What is computed before the blocks."""
    grid = model.grid(x)
    e, e0 = model.time(timestep)
    cos, sin = rope(grid, model.cfg.head_dim)
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


def inside(block, x, e, text, features, table):
    """One block: the steps of `Block.__call__`, each value kept."""
    shift1, scale1, gate1, shift2, scale2, gate2 = block.six(e)
    attn, eps = block.self_attn, block.cfg.eps
    out = {"self_attn_in": modulate(x, scale1, shift1, eps)}
    out["q_norm"], out["k_norm"] = attn.queries(out["self_attn_in"]), attn.keys(out["self_attn_in"])
    out["q_rope"], out["k_rope"] = rotate(out["q_norm"], table), rotate(out["k_norm"], table)
    if isinstance(attn.core, SLACore):
        out |= sparse_linear(attn.core, out["q_rope"], out["k_rope"], attn.values(out["self_attn_in"]))
    out["self_attn_out"] = attn(out["self_attn_in"], table)
    out["after_self_attn"] = gated(x, out["self_attn_out"], gate1)
    out["cross_attn_in"] = block.norm3(out["after_self_attn"])
    out["cross_attn_out"] = block.cross_attn(out["cross_attn_in"], text, features)
    out["after_cross_attn"] = out["after_self_attn"] + out["cross_attn_out"]
    out["ffn_in"] = modulate(out["after_cross_attn"], scale2, shift2, eps)
    out["ffn_out"] = block.mlp(out["ffn_in"])
    return out | {"out": gated(out["after_cross_attn"], out["ffn_out"], gate2)}


def sparse_linear(core, q, k, v):
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
