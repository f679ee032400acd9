"""Configs: what they refuse and what they say, JSON and back, and the presets against the key lists
of the released files."""

import dataclasses
import json
import math

import pytest

from tdjax.config import (
    KINDS,
    LARGEST,
    VIDEO_SIZES,
    DiTConfig,
    SamplerConfig,
    SLAConfig,
    TextConfig,
    VAEConfig,
    VideoSize,
    from_dict,
    neighbours,
    sampler_changes,
    to_dict,
)
from tdjax.errors import UsageError
from tdjax.precision import BF16, FLOAT32, Policy
from tdjax.presets import PRESETS, UMT5_XXL, WAN_1_3B, WAN_A14B_I2V, WAN_VAE


def test_usage_errors_say_what_why_and_what_to_do():
    with pytest.raises(UsageError) as error:
        VideoSize(frames=80)
    assert (
        error.value.what == "num_frames is 80"
        and "4k+1" in error.value.why
        and error.value.fix == "nearest allowed: 77 and 81"
    )
    assert (
        str(error.value).count("\n") == 2
        and error.value.exit_code == 2
        and isinstance(error.value, ValueError)
    )


@pytest.mark.parametrize(
    "make, expected",
    [
        (lambda: VideoSize(frames=0), "num_frames is 0"),
        (lambda: VideoSize(frames=2), "1 and 5"),
        (lambda: VideoSize(height=481), "(?s)height is 481.*multiple of 16.*480 and 496"),
        (lambda: VideoSize(width=8), "(?s)width is 8.*16 and 32"),
        (lambda: SLAConfig(topk=0.0), "(?s)sla_topk is 0.0.*greater than 0 and at most 1.*0.15"),
        (lambda: SLAConfig(topk=1.1), "sla_topk is 1.1"),
        (lambda: SLAConfig(block_q=32), "32x64; allowed: 128x64"),
        (lambda: SamplerConfig(sampler="ddim"), "(?s)sampler is 'ddim'.*sde, ode.*unipc, euler"),
        (lambda: SamplerConfig(num_steps=0), "num_steps is 0"),
        (lambda: SamplerConfig(num_steps=5), "(?s)num_steps is 5.*1 to 4 steps.*give 4 mid times"),
        (lambda: SamplerConfig(sigma_max=0.0), "sigma_max is 0"),
        (lambda: SamplerConfig(sigma_max=float("nan")), "sigma_max is nan"),
        (
            lambda: SamplerConfig(mid_t=(1.4, 1.5, 1.0)),
            "(?s)mid_t is 1.4, 1.5, 1.0.*must fall.*1.5 1.4 1.0",
        ),
        (lambda: SamplerConfig(sigma_max=5.0), "(?s)must fall from 1.3734"),
        (lambda: SamplerConfig(guidance_scale=5.0), "(?s)guidance_scale is 5.*built in.*unipc"),
        (lambda: DiTConfig(dim=100, heads=3), "dim 100 over 3 heads"),
        (lambda: DiTConfig(dim=6, heads=2), "even whole head width"),
        (
            lambda: DiTConfig(attention="flash"),
            "attention is 'flash'; allowed: dense, sla, sagesla",
        ),
        (
            lambda: DiTConfig(linear="int4"),
            "linear is 'int4'; allowed: float, int8, int8_channel, fp8",
        ),
        (lambda: DiTConfig(in_channels=8), "in_channels 8 is less than out_channels 16"),
        (lambda: DiTConfig(layers=0), "DiTConfig.layers is 0; it must be at least 1"),
        (lambda: VAEConfig(temporal_down=(True,)), "4 multipliers need 3 temporal_down flags"),
        (lambda: VAEConfig(latent_channels=8), "mean and std need 8 values"),
        (lambda: TextConfig(heads=5), "attention_dim 4096 is not a multiple of 5 heads"),
        (
            lambda: Policy(compute="float8"),
            "Policy.compute is 'float8'; allowed: bfloat16, float16, float32",
        ),
    ],
)
def test_what_is_refused(make, expected):
    with pytest.raises(ValueError, match=expected):
        make()


def test_what_is_allowed():
    assert (
        SamplerConfig(num_steps=1).num_steps == 1
        and SamplerConfig(num_steps=8, mid_t=(1.3, 1.2, 1.1, 1.0, 0.6, 0.4, 0.3)).few_step
    )
    teacher = SamplerConfig(
        num_steps=50, sampler="unipc", sigma_max=0.5, guidance_scale=5.0
    )  # mid times are not the teacher's
    assert not teacher.few_step
    for sizes in VIDEO_SIZES.values():
        for width, height in sizes.values():
            assert VideoSize(width=width, height=height).latent_grid[1:] == (
                height // 8,
                width // 8,
            )


@pytest.mark.parametrize(
    "value, step, offset", [(80, 4, 1), (2, 4, 1), (481, 16, 0), (1, 16, 0), (100, 16, 0)]
)
def test_neighbours_are_legal_and_around(value, step, offset):
    low, high = neighbours(value, step, offset)
    assert low % step == high % step == offset and low >= 1 and high - low == step and value < high


def test_sizes_of_the_default_clip():
    size = VideoSize()
    assert (size.latent_frames, size.latent_grid, size.token_grid(), size.tokens()) == (
        21,
        (21, 60, 104),
        (21, 30, 52),
        32760,
    )
    assert str(size) == "832x480, 81 frames" and VideoSize(frames=1).latent_frames == 1


def test_configs_are_frozen_hashable_and_keyword_only():
    assert hash(WAN_1_3B) == hash(DiTConfig()) and len({WAN_1_3B, DiTConfig(), WAN_A14B_I2V}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        WAN_1_3B.dim = 1
    with pytest.raises(TypeError):
        DiTConfig(1536)


@pytest.mark.parametrize(
    "config",
    [
        *(preset.config for preset in PRESETS.values()),
        *(preset.sampler for preset in PRESETS.values()),
        dataclasses.replace(WAN_A14B_I2V, image_dim=1280),
        WAN_VAE,
        UMT5_XXL,
        VideoSize(frames=5),
        DiTConfig(attention="sla", sla=SLAConfig(topk=0.3, block_q=64), policy=FLOAT32),
    ],
    ids=lambda c: type(c).__name__,
)
def test_json_and_back(config):
    assert from_dict(type(config), json.loads(json.dumps(to_dict(config)))) == config


def test_json_of_another_version():
    with pytest.raises(ValueError, match="DiTConfig has no field depth, width; it has dim, "):
        from_dict(DiTConfig, {"width": 1, "depth": 2})
    with pytest.raises(ValueError, match="SLAConfig has no field top"):
        from_dict(DiTConfig, {"sla": {"top": 0.1}})
    assert from_dict(DiTConfig, {"dim": 128, "heads": 2}) == DiTConfig(dim=128, heads=2)
    assert set(KINDS) == {"dit", "vae", "tiny_vae", "text"}


STRANGE = [None, True, -1, 0, 1.5, math.nan, math.inf, 2**40, 10**400, "x", [], {}, [[1]], [None]]
STRANGE += [[1, 2], [1, 2, 3, 4], ["a", "b", "c"], {"a": 1}, [2**62] * 3, "\ud800"]


@pytest.mark.parametrize("cls", KINDS.values(), ids=KINDS)
def test_any_json_in_any_field_is_taken_or_refused_by_name(cls):
    """What is taken is a network that can be built: its numbers are bounded."""
    for field in dataclasses.fields(cls):
        refused = 0
        for value in STRANGE:
            try:
                config = from_dict(cls, {field.name: value})
            except ValueError as error:
                assert field.name in str(error) or "SLA" in str(error) or "Policy" in str(error)
                refused += 1
                continue
            numbers = [n for n in to_dict(config).values() if type(n) in (int, float)]
            assert all(0 <= n <= LARGEST for n in numbers), config
        assert refused > len(STRANGE) / 2, field.name
    for whole in (None, [], "x", 3):
        with pytest.raises(ValueError, match="not a table"):
            from_dict(cls, whole)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"steps": "2"}, "num_steps is '2', not int"),
        ({"mid_t": 1.0}, "mid_t is 1.0, not a list"),
        ({"mid_t": [1.0, None]}, r"mid_t\[1\] is None"),
        ({"speed": 1}, "a sampler has no speed; it has num_steps"),
        ({"sigma_max": math.nan}, "sigma_max is nan"),
    ],
)
def test_samplers_of_model_folders(values, message):
    with pytest.raises(ValueError, match=message):
        sampler_changes(values)


def test_policy_dtypes():
    assert (BF16.param_dtype.name, FLOAT32.compute_dtype.name, BF16.island_dtype.name) == (
        "bfloat16",
        "float32",
        "float32",
    )


# Presets against the released files
# ---------------------------------------------------------------------------------------

# Manifest of a file -> the presets that have its network: others' weights under Wan's own names,
# with the patch embedding flat or not and layers of 8 bits or not, have no manifest of their own.
FILES = [
    *(
        (f"{name}{q}", f"{name.lower()}{q}")
        for name in (
            "TurboWan2.1-T2V-1.3B-480P",
            "TurboWan2.1-T2V-14B-480P",
            "TurboWan2.1-T2V-14B-720P",
        )
        for q in ("", "-quant")
    ),
    *(
        (f"TurboWan2.2-I2V-A14B-{e}-720P{q}", f"turbowan2.2-i2v-a14b-720p{q}")
        for e in ("high", "low")
        for q in ("", "-quant")
    ),
    ("Wan-AI_Wan2.1-T2V-1.3B", "wan2.1-t2v-1.3b"),
    ("Wan-AI_Wan2.1-T2V-14B", "wan2.1-t2v-14b"),
    ("Wan-AI_Wan2.2-I2V-A14B", "wan2.2-i2v-a14b"),
    ("Wan-AI_Wan2.1-T2V-14B", "wan2.2-t2v-a14b"),
    ("Wan-AI_Wan2.2-I2V-A14B", "wan2.2-i2v-a14b-lightx2v"),
    ("Wan-AI_Wan2.2-I2V-A14B", "wan2.2-i2v-a14b-lightx2v-int8"),
    ("Wan-AI_Wan2.1-T2V-1.3B", "rcm-wan2.1-t2v-1.3b-480p"),
    ("Wan-AI_Wan2.1-T2V-14B", "rcm-wan2.1-t2v-14b-480p"),
    ("Wan-AI_Wan2.1-T2V-14B", "rcm-wan2.1-t2v-14b-720p"),
]


@pytest.mark.parametrize("file, alias", FILES)
def test_presets_have_the_shapes_of_their_files(manifest, file, alias):
    tensors = {key: row["shape"] for key, row in manifest(file)["tensors"].items()}
    preset, blocks = (
        PRESETS[alias],
        {int(key.split(".")[1]) for key in tensors if key.startswith("blocks.")},
    )
    cfg = preset.config
    int8, sla = (
        any("int8_weight" in key for key in tensors),
        any("proj_l" in key for key in tensors),
    )
    linear = cfg.linear.removesuffix("_channel") if "lightx2v" in alias else cfg.linear
    stored = "int8" if int8 or alias.endswith("int8") else "float"
    assert (linear, cfg.attention) == (stored, "sla" if sla else "dense")
    assert blocks == set(range(cfg.layers))
    weight = "int8_weight" if int8 else "weight"
    assert tensors[f"blocks.0.ffn.0.{weight}"] == [cfg.ffn_dim, cfg.dim]
    patch = tensors["patch_embedding.weight"]
    assert patch in ([cfg.dim, cfg.in_channels * 4], [cfg.dim, cfg.in_channels, *cfg.patch])
    assert tensors["head.head.weight"] == [cfg.out_channels * 4, cfg.dim]
    assert tensors["text_embedding.0.weight"] == [cfg.dim, cfg.text_dim]
    assert tensors["time_embedding.0.weight"] == [cfg.dim, cfg.freq_dim]
    assert ("img_emb.proj.0.weight" in tensors) == (cfg.image_dim is not None)
    if sla:
        assert tensors["blocks.0.self_attn.attn_op.local_attn.proj_l.weight"] == [
            cfg.head_dim,
            cfg.head_dim,
        ]
    assert preset.distilled == (not alias.startswith("wan") or "lightx2v" in alias)
    assert len(preset.dit) == (2 if "a14b" in alias else 1)
    assert cfg.task == ("i2v" if "i2v" in alias else "t2v") and preset.resolution in VIDEO_SIZES


def test_every_preset_has_a_file_here():
    assert {alias for _, alias in FILES} == set(PRESETS)
    published = {
        file.removesuffix(".pth")
        for name, preset in PRESETS.items()
        if name.startswith("turbo")
        for file in preset.dit
    }
    assert published == {file for file, _ in FILES if file.startswith("Turbo")}


def test_vae_and_text_encoder_have_the_shapes_of_their_files(manifest):
    vae = {key: row["shape"] for key, row in manifest("Wan2.1_VAE")["tensors"].items()}
    widths = [WAN_VAE.dim * m for m in WAN_VAE.multipliers]
    assert vae["encoder.conv1.weight"][0] == WAN_VAE.dim and vae["decoder.conv1.weight"][:2] == [
        widths[-1],
        WAN_VAE.latent_channels,
    ]
    assert (
        vae["conv1.weight"][:2] == [2 * WAN_VAE.latent_channels] * 2
        and vae["conv2.weight"][0] == WAN_VAE.latent_channels
    )
    assert len(
        [key for key in vae if key.startswith("encoder") and key.endswith("time_conv.weight")]
    ) == sum(WAN_VAE.temporal_down)
    assert (WAN_VAE.spatial, WAN_VAE.temporal) == (8, 4)
    text = {
        key: row["shape"] for key, row in manifest("models_t5_umt5-xxl-enc-bf16")["tensors"].items()
    }
    assert text["token_embedding.weight"] == [UMT5_XXL.vocab, UMT5_XXL.dim]
    assert text["blocks.0.attn.q.weight"] == [UMT5_XXL.attention_dim, UMT5_XXL.dim]
    assert text["blocks.0.ffn.fc1.weight"] == [UMT5_XXL.ffn_dim, UMT5_XXL.dim]
    assert text["blocks.0.pos_embedding.embedding.weight"] == [UMT5_XXL.buckets, UMT5_XXL.heads]
    assert {int(key.split(".")[1]) for key in text if key.startswith("blocks.")} == set(
        range(UMT5_XXL.layers)
    )
    assert all(
        preset.config.text_dim == UMT5_XXL.dim and preset.config.text_len == UMT5_XXL.text_len
        for preset in PRESETS.values()
    )
