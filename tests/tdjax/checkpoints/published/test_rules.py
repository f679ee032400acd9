"""Rows, and every published key list: each key claimed once, each leaf filled once, and back to the
same keys and shapes."""

import dataclasses
import re

import numpy as np
import pytest
from einops import rearrange

from convert.export import pieces
from convert.leaves import Leaves
from tdjax.checkpoints.orbax import Lazy
from tdjax.checkpoints.published import detect, rules
from tdjax.checkpoints.published.checkpoint import targets
from tdjax.checkpoints.published.rules import Row
from tdjax.errors import CheckpointError

DITS = {  # name: (dim, layers, in channels, attention, linear, names)
    "TurboWan2.1-T2V-1.3B-480P": (1536, 30, 16, "sla", "float", "turbo"),
    "TurboWan2.1-T2V-1.3B-480P-quant": (1536, 30, 16, "sla", "int8", "turbo"),
    "TurboWan2.1-T2V-14B-480P": (5120, 40, 16, "sla", "float", "turbo"),
    "TurboWan2.1-T2V-14B-480P-quant": (5120, 40, 16, "sla", "int8", "turbo"),
    "TurboWan2.1-T2V-14B-720P": (5120, 40, 16, "sla", "float", "turbo"),
    "TurboWan2.1-T2V-14B-720P-quant": (5120, 40, 16, "sla", "int8", "turbo"),
    "TurboWan2.2-I2V-A14B-high-720P": (5120, 40, 36, "sla", "float", "turbo"),
    "TurboWan2.2-I2V-A14B-high-720P-quant": (5120, 40, 36, "sla", "int8", "turbo"),
    "TurboWan2.2-I2V-A14B-low-720P": (5120, 40, 36, "sla", "float", "turbo"),
    "TurboWan2.2-I2V-A14B-low-720P-quant": (5120, 40, 36, "sla", "int8", "turbo"),
    "Wan-AI_Wan2.1-T2V-1.3B": (1536, 30, 16, "dense", "float", "wan"),
    "Wan-AI_Wan2.1-T2V-14B": (5120, 40, 16, "dense", "float", "wan"),
    "Wan-AI_Wan2.2-I2V-A14B": (5120, 40, 36, "dense", "float", "wan"),
    "diffusers_Wan2.1-T2V-1.3B_transformer": (1536, 30, 16, "dense", "float", "diffusers"),
    "diffusers_Wan2.1-T2V-14B_transformer": (5120, 40, 16, "dense", "float", "diffusers"),
    "diffusers_Wan2.2-I2V-A14B_transformer": (5120, 40, 36, "dense", "float", "diffusers"),
}
OTHERS = {
    "Wan2.1_VAE": ("vae", "wan"),
    "diffusers_Wan2.1_VAE": ("vae", "diffusers"),
    "models_t5_umt5-xxl-enc-bf16": ("text", "wan"),
    "transformers_umt5-xxl-encoder": ("text", "transformers"),
}


@pytest.mark.parametrize("name", [*DITS, *OTHERS])
def test_published_key_lists(name, published):
    tensors = published(name)
    found = detect.detect(tensors, name)
    leaves = targets(found.kind, found.config)
    binding = rules.bind(tensors, found.rows, leaves, name)
    if name in DITS:
        dim, layers, channels, attention, linear, naming = DITS[name]
        c = found.config
        assert (c.dim, c.layers, c.in_channels, c.attention, c.linear) == (
            dim,
            layers,
            channels,
            attention,
            linear,
        )
        assert (found.kind, found.naming, c.heads) == ("dit", naming, dim // 128)
    else:
        assert (found.kind, found.naming) == OTHERS[name]
    used = [key for claim in binding.claims.values() for key in claim.keys]
    assert sorted([*used, *binding.dropped]) == sorted(tensors)
    assert binding.dropped == (("encoder.embed_tokens.weight",) if "transformers" in name else ())
    assert binding.claims.keys() == leaves.keys()
    back = {key for _, _, keys in rules.invert(leaves, found.rows, twins=True) for _, key in keys}
    assert back == tensors.keys()
    lazy = {n: Lazy(tuple(x.shape), np.dtype(x.dtype), None) for n, x in leaves.items()}
    shapes = {
        p.key: p.shape
        for p in pieces(Leaves(None, found.kind, found.config, lazy, {}), found.naming)
    }
    assert shapes == {key: t.shape for key, t in tensors.items() if key not in binding.dropped}


def test_configs_are_those_of_the_presets(published):
    from tdjax.presets import PRESETS, UMT5_XXL, WAN_VAE

    for name in DITS:
        preset = PRESETS.get(name.lower())
        if preset:
            assert detect.detect(published(name), name).config == preset.config
    assert (
        detect.detect(published("TurboWan2.2-I2V-A14B-low-720P"), "x").config
        == PRESETS["turbowan2.2-i2v-a14b-720p"].config
    )
    assert detect.detect(published("Wan2.1_VAE"), "x").config == WAN_VAE
    assert detect.detect(published("transformers_umt5-xxl-encoder"), "x").config == UMT5_XXL


@pytest.mark.parametrize(
    "kind, table",
    [
        ("dit", "diffusers_Wan2.1-T2V-14B_transformer"),
        ("vae", "diffusers_Wan2.1_VAE"),
        ("text", "transformers_umt5-xxl-encoder"),
    ],
)
def test_two_names_of_a_tensor_fill_the_same_leaf(kind, table, manifest, published):
    config = detect.detect(published(table), table).config
    theirs, ours = (
        ("transformers" if kind == "text" else "diffusers"),
        ("turbo" if kind == "dit" else "wan"),
    )
    for original, other in manifest("name_maps")[table].items():
        a, b = (
            rules.slots([key], detect.rows(kind, naming, config))[0]
            for key, naming in ((original, ours), (other, theirs))
        )
        assert len(a) == 1 and a.keys() == b.keys(), (original, other)


@pytest.mark.slow
def test_image_branch_names_are_those_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=1,
        attention_head_dim=128,
        in_channels=36,
        out_channels=16,
        text_dim=8,
        freq_dim=8,
        ffn_dim=24,
        num_layers=2,
        image_dim=40,
        added_kv_proj_dim=128,
    )
    shapes = {
        k: type("S", (), {"shape": tuple(v.shape), "dtype": np.dtype("float32")})
        for k, v in model.state_dict().items()
    }
    found = detect.detect(shapes, "tiny")
    assert (found.config.image_dim, found.config.in_channels, found.naming) == (40, 36, "diffusers")
    assert len(rules.bind(shapes, found.rows, targets("dit", found.config), "tiny").claims) > 50


# Rows
# --------------------------------------------------------------------------------------------------

ROWS = (
    Row(
        "blocks.{i}.{a:self|cross}_attn.{p:q|k}.weight", "blocks.{a}_attn.{p}.kernel", "o i -> i o"
    ),
    Row("patch.weight", "patch.kernel", "o c h w -> (c h w) o"),
    Row("down.{b}.gamma", "down.{b}.scale", "c 1 1 -> c"),
    Row("extra.{i}.proj", "core.proj", role="optional"),
    Row("again", "patch.kernel", "o c h w -> (c h w) o", role="twin"),
    Row("rope.freqs", None),
)


@dataclasses.dataclass
class Shape:
    shape: tuple
    dtype: np.dtype = dataclasses.field(default_factory=lambda: np.dtype("float32"))


LEAVES = {
    "blocks.self_attn.q.kernel": Shape((2, 3, 5)),
    "blocks.cross_attn.k.kernel": Shape((2, 3, 7)),
    "patch.kernel": Shape((12, 5)),
    "down.0.scale": Shape((4,)),
    "down.10.scale": Shape((4,)),
}
TENSORS = {
    **{f"blocks.{i}.self_attn.q.weight": Shape((5, 3)) for i in range(2)},
    **{f"blocks.{i}.cross_attn.k.weight": Shape((7, 3)) for i in range(2)},
    "patch.weight": Shape((5, 3, 2, 2)),
    "down.0.gamma": Shape((4, 1, 1)),
    "down.10.gamma": Shape((4, 1, 1)),
    "extra.0.proj": Shape((2,)),
    "extra.1.proj": Shape((2,)),
    "again": Shape((5, 3, 2, 2)),
    "rope.freqs": Shape((9,)),
}


def bind(tensors=None, leaves=None, rows=ROWS):
    return rules.bind(
        TENSORS if tensors is None else tensors, rows, LEAVES if leaves is None else leaves, "x.pth"
    )


def test_binding():
    binding = bind()
    assert binding.claims["blocks.self_attn.q.kernel"].keys == (
        "blocks.0.self_attn.q.weight",
        "blocks.1.self_attn.q.weight",
    )
    assert binding.claims["blocks.self_attn.q.kernel"].row.stacked_layout == "n o i -> n i o"
    assert binding.dropped == ("again", "extra.0.proj", "extra.1.proj", "rope.freqs")
    assert bind({k: v for k, v in TENSORS.items() if k != "patch.weight"}).claims[
        "patch.kernel"
    ].keys == ("again",)
    assert "core.proj" in bind(leaves=LEAVES | {"core.proj": Shape((2, 2))}).claims


@pytest.mark.parametrize(
    "change, lines",
    [
        ({"blocks.1.self_attn.q.weight": None}, ["missing     blocks.1.self_attn.q.weight"]),
        (
            {"blocks.2.self_attn.q.weight": Shape((5, 3))},
            ["unexpected  blocks.2.self_attn.q.weight (layer 2 of 2)"],
        ),
        (
            {"blocks.01.self_attn.q.weight": Shape((5, 3))},
            ["unexpected  blocks.01.self_attn.q.weight [5, 3]"],
        ),
        (
            {"blocks.0.self_attn.v.weight": Shape((5, 3))},
            ["unexpected  blocks.0.self_attn.v.weight [5, 3]"],
        ),
        (
            {"blocks.0.self_attn.k.weight": Shape((5, 3))},
            [
                "unexpected  blocks.0.self_attn.k.weight [5, 3] (this model has no"
                " blocks.self_attn.k.kernel)"
            ],
        ),
        (
            {"blocks.0.self_attn.q.weight": Shape((3, 5))},
            ["different   blocks.0.self_attn.q.weight [3, 5], expected [3, 5] after o i -> i o"],
        ),
        (
            {"patch.weight": Shape((5, 12))},
            ["different   patch.weight [5, 12], expected [12, 5] after o c h w -> (c h w) o"],
        ),
        (
            {"patch.weight": Shape((5, 3, 2, 2), np.dtype("int8"))},
            ["different   patch.weight is int8, expected float32"],
        ),
        (
            {"down.10.gamma": None, "extra.0.proj": None, "odd": Shape(())},
            ["missing     down.10.gamma", "unexpected  odd []"],
        ),
    ],
)
def test_every_difference_is_listed(change, lines):
    tensors = {k: v for k, v in (TENSORS | change).items() if v is not None}
    with pytest.raises(CheckpointError) as e:
        bind(tensors)
    what, why, *rest = str(e.value).splitlines()
    assert "x.pth does not fit" in what and why.startswith("first: ")
    assert rest == ["all:", *(f"  {line}" for line in sorted(lines))]


def test_mistakes_in_rows_are_programming_errors():
    with pytest.raises(ValueError, match=r"patch\.weight is claimed by 2 rows"):
        bind(rows=(*ROWS, Row("{x}.weight", "other.{x}")))
    with pytest.raises(ValueError, match="both fill"):
        bind(TENSORS | {"second": Shape((5, 3, 2, 2))}, rows=(*ROWS, Row("second", "patch.kernel")))
    with pytest.raises(ValueError, match="patch.kernel is filled by 0 rows"):
        bind(rows=tuple(r for r in ROWS if not r.source.startswith(("patch", "again"))))


@pytest.mark.parametrize(
    "kind, name",
    [
        ("dit", "TurboWan2.1-T2V-1.3B-480P"),
        ("dit", "diffusers_Wan2.1-T2V-1.3B_transformer"),
        ("vae", "Wan2.1_VAE"),
    ],
)
def test_layouts_read_backwards(kind, name, published):
    """Every layout undoes its inverse, on axes of different prime lengths."""
    found = detect.detect(published(name), name)
    for row in {r.layout: r for r in found.rows if r.layout}.values():
        axes = re.findall(r"\w+", row.layout.split("->")[0])
        shape = [1 if a == "1" else p for a, p in zip(axes, (2, 3, 5, 7, 11, 13), strict=False)]
        x = np.arange(np.prod(shape)).reshape(shape)
        sizes = dict(zip("thw", shape[2:], strict=False)) if "(" in row.layout else {}
        np.testing.assert_array_equal(
            rearrange(rearrange(x, row.layout), row.inverse_layout, **sizes), x
        )
