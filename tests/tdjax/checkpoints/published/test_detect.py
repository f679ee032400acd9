"""Kind, size, task and variant from keys, shapes and dtypes; other networks refused by what they
are."""

import json

import numpy as np
import pytest

from tdjax.checkpoints.published.detect import METADATA, describe, detect
from tdjax.config import DiTConfig, SLAConfig, to_dict
from tdjax.errors import CheckpointError


class Shape:
    def __init__(self, *shape, dtype="float32"):
        self.shape, self.dtype = shape, np.dtype(dtype)


def shaped(state):
    return {k: Shape(*v.shape) for k, v in state.items()}


def test_tiny_transformers(states):
    base = detect(shaped(states("dit")), "x", heads=4).config
    assert (base.dim, base.heads, base.layers, base.ffn_dim, base.text_dim, base.freq_dim) == (
        80,
        4,
        2,
        128,
        32,
        64,
    )
    assert (base.task, base.attention, base.linear, base.image_dim, base.round_time) == (
        "t2v",
        "dense",
        "float",
        None,
        True,
    )
    assert base.policy.param == "bfloat16"
    i2v = detect(shaped(states("i2v")), "x", heads=4).config
    assert (i2v.task, i2v.in_channels, i2v.image_dim) == ("i2v", 36, None)
    clip = detect(shaped(states("clip")), "x", heads=4).config
    assert (clip.task, clip.in_channels, clip.image_dim) == ("i2v", 36, 40)
    sla = detect(shaped(states("sla")), "x").config
    assert (sla.attention, sla.heads) == ("sla", 2)  # the width of the projection is the head width
    theirs = detect(shaped(states("diffusers")), "x", heads=4)
    assert theirs.naming == "diffusers" and theirs.config == base


def test_tiny_vae_and_text(states, golden):
    for kind in ("vae", "diffusers_vae"):
        c = detect(shaped(states(kind)), "x").config
        assert (c.dim, c.latent_channels, c.multipliers, c.res_blocks, c.temporal_down) == (
            8,
            16,
            (1, 2, 4, 4),
            2,
            (False, True, True),
        )
    for kind in ("text", "transformers"):
        c = detect(shaped(states(kind)), "x").config
        assert (c.vocab, c.dim, c.attention_dim, c.ffn_dim, c.heads, c.layers, c.buckets) == (
            120,
            32,
            48,
            64,
            4,
            3,
            32,
        )
    alone = shaped(states("transformers"))
    alone["encoder.embed_tokens.weight"] = alone.pop("shared.weight")
    assert detect(alone, "x").config == c


def test_what_keys_cannot_tell(states):
    with pytest.raises(CheckpointError, match="--heads N"):
        detect(shaped(states("dit")), "x.pth")
    with pytest.raises(TypeError, match="no config has a field wrong"):
        detect(shaped(states("dit")), "x.pth", wrong=3)
    known = DiTConfig(
        dim=80,
        heads=8,
        patch=(1, 2, 2),
        text_len=16,
        round_time=False,
        sla=SLAConfig(topk=0.3, block_k=128, block_q=64),
    )
    metadata = {METADATA: json.dumps({"kind": "dit", "config": to_dict(known)})}
    c = detect(shaped(states("dit")), "x.pth", metadata).config
    assert (c.heads, c.text_len, c.round_time, c.sla, c.layers) == (8, 16, False, known.sla, 2)
    assert detect(shaped(states("dit")), "x.pth", metadata, heads=4).config.heads == 4
    for broken in (
        "{",
        "[]",
        '{"kind": "dit"}',
        '{"kind": "dit", "config": {"dim": 3, "odd": 1}}',
        '{"kind": "vae", "config": {}}',
    ):
        with pytest.raises(CheckpointError, match="--heads N"):
            detect(shaped(states("dit")), "x.pth", {METADATA: broken})


def test_quantised(published):
    tensors = published("TurboWan2.1-T2V-1.3B-480P-quant")
    found = detect(tensors, "x")
    assert (
        describe(found.kind, found.config)
        == "Wan video transformer, text to video, 30 layers of 1536, sla attention, int8 linears"
    )


@pytest.mark.parametrize(
    "key, message",
    [
        (
            "diffusion_model.blocks.0.self_attn.q.lora_A.weight",
            "a LoRA, not a model.*`lora`",
        ),
        ("lora_unet_blocks_0_ffn_0.lora_down.weight", "a LoRA"),
        (
            "encoder.downsamples.0.downsamples.0.residual.0.gamma",
            "48 latent channels, here 16.*Wan2.1_VAE.pth",
        ),
        ("encoder.down_blocks.0.resnets.0.conv1.weight", "48 latent channels"),
        ("vace_blocks.0.norm3.weight", "Wan VACE"),
        ("img_emb.emb_pos", "FLF2V"),
        ("control_adapter.conv.weight", "Fun control"),
        ("audio_injector.x", "speech"),
        ("motion_encoder.dec.weight", "Animate"),
        ("visual.transformer.0.weight", "CLIP"),
        ("decoder.block.0.layer.2.x", "decoder"),
        ("h.0.attn.weight", "not a model that is known.*h.0.attn.weight.*known are"),
    ],
)
def test_other_networks_are_named(key, message):
    with pytest.raises(CheckpointError) as e:
        detect({key: Shape(3)}, "file.pth")
    assert "file.pth" in str(e.value)
    import re

    assert re.search(message, str(e.value), re.DOTALL)


def test_wan22_sizes_are_refused(published):
    tensors = published("Wan2.1_VAE")
    tensors["conv2.weight"] = Shape(48, 48, 1, 1, 1)
    with pytest.raises(CheckpointError, match="48 latent channels, not 16"):
        detect(tensors, "x")
    tensors = published("Wan-AI_Wan2.1-T2V-1.3B")
    tensors["head.head.weight"] = Shape(192, 1536)
    with pytest.raises(CheckpointError, match="TI2V-5B"):
        detect(tensors, "x")


def test_incomplete_and_odd_shapes(published):
    for missing in ("head.head.weight", "blocks.0.ffn.0.bias", "text_embedding.0.weight"):
        tensors = published("TurboWan2.1-T2V-1.3B-480P")
        del tensors[missing]
        with pytest.raises(CheckpointError, match=f"lacks {missing}"):
            detect(tensors, "x")
    for key, shape in (
        ("patch_embedding.weight", ()),
        ("patch_embedding.weight", (0, 64)),
        ("patch_embedding.weight", (8, 3, 0, 2, 2)),
        ("head.head.weight", ()),
    ):
        tensors = published("TurboWan2.1-T2V-1.3B-480P")
        tensors[key] = Shape(*shape)
        with pytest.raises(CheckpointError):
            detect(tensors, "x")
    with pytest.raises(CheckpointError, match="not a model that is known"):
        detect({}, "x")
