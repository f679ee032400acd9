"""Rows backwards: every file comes back under its names bit for bit, through our folder and through
other namings."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

from convert.export import export
from convert.leaves import open_leaves
from tdjax.checkpoints import orbax
from tdjax.checkpoints.published.checkpoint import open_checkpoint
from tdjax.errors import UsageError

BF16 = ml_dtypes.bfloat16


def contents(path):
    """{key: array} as the format's own library reads it."""
    with safe_open(path, "numpy") as f:
        return {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118 (not a dict)


def same(got, want):
    assert got.keys() == want.keys()
    for key, value in want.items():
        assert (got[key].dtype, got[key].shape) == (value.dtype, value.shape), key
        assert got[key].tobytes() == value.tobytes(), key


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, heads",
    [
        ("dit", 4),
        ("clip", 4),
        ("sla", None),
        ("diffusers", 4),
        ("vae", None),
        ("text", None),
        ("transformers", None),
    ],
)
def test_bf16_files_come_back_bit_for_bit(tmp_path, states, write_safetensors, kind, heads):
    state = {k: v.astype(np.float32 if "proj_l" in k else BF16) for k, v in states(kind).items()}
    known = {} if heads is None else {"heads": heads}
    source = write_safetensors(tmp_path / "source.safetensors", state)
    direct = export(open_leaves(source, **known), tmp_path / "direct.safetensors")
    same(contents(direct), state)
    leaves = open_leaves(source, **known)
    orbax.save(tmp_path / "ours", leaves.lazy, leaves.kind, leaves.config, source=leaves.facts)
    back = export(open_leaves(tmp_path / "ours"), tmp_path / "back.safetensors")
    assert back.read_bytes() == direct.read_bytes()
    again = open_checkpoint(back)  # the config travels with the file: no --heads
    assert again.config == leaves.config and again.found.naming == leaves.naming


def test_int8_and_stacked_layers(tmp_path, states, write_safetensors):
    rng = np.random.default_rng(0)
    state = {}
    for key, value in states("sla").items():
        if key.startswith("blocks.") and value.ndim == 2 and "proj_l" not in key:
            stem = key.removesuffix("weight")
            state[f"{stem}int8_weight"] = rng.integers(-128, 128, value.shape).astype(np.int8)
            state[f"{stem}scale"] = rng.random([-(-n // 128) for n in value.shape]).astype(
                np.float32
            )
        else:
            state[key] = value.astype(np.float32 if "proj_l" in key else BF16)
    source = write_safetensors(tmp_path / "source.safetensors", state)
    same(contents(export(open_leaves(source), tmp_path / "back.safetensors")), state)


@pytest.mark.parametrize(
    "kind, naming, other",
    [
        ("dit", "diffusers", "diffusers"),
        ("vae", "diffusers", "diffusers_vae"),
        ("text", "transformers", "transformers"),
    ],
)
def test_other_names(tmp_path, states, write_safetensors, kind, naming, other):
    known = {"heads": 4} if kind == "dit" else {}
    source = write_safetensors(tmp_path / "source.safetensors", states(kind))
    got = contents(
        export(open_leaves(source, "float32", **known), tmp_path / "other.safetensors", naming)
    )
    same(got, states(other))


def test_the_projection_of_sla_has_a_name_everywhere(tmp_path, states, write_safetensors):
    leaves = open_leaves(write_safetensors(tmp_path / "source.safetensors", states("sla")))
    theirs = export(leaves, tmp_path / "x.safetensors", "diffusers")
    assert "blocks.0.attn1.attn_impl.proj_l.weight" in contents(theirs)
    again = open_leaves(theirs)
    assert again.config.attention == "sla" and again.lazy.keys() == leaves.lazy.keys()


def test_patches_of_another_size(tmp_path, write_safetensors, states):
    """The config in the file tells a patch that the flat embedding cannot show."""
    state = dict(states("dit"))
    state["patch_embedding.weight"] = state["patch_embedding.weight"][:, :24]
    state["head.head.weight"], state["head.head.bias"] = (
        state["head.head.weight"][:24],
        state["head.head.bias"][:24],
    )
    leaves = open_leaves(
        write_safetensors(tmp_path / "source.safetensors", state),
        "float32",
        heads=4,
        patch=(1, 1, 3),
    )
    assert (leaves.config.in_channels, leaves.config.out_channels) == (8, 8)
    wan = export(leaves, tmp_path / "wan.safetensors", "wan")
    assert contents(wan)["patch_embedding.weight"].shape == (80, 8, 1, 1, 3)
    turbo = export(open_leaves(wan, "float32"), tmp_path / "turbo.safetensors", "turbo")
    same(contents(turbo), state)
    assert open_checkpoint(turbo).config.patch == (1, 1, 3)


def test_an_export_appears_complete_or_not_at_all(tmp_path, states, write_safetensors):
    leaves = open_leaves(write_safetensors(tmp_path / "source.safetensors", states("text")))
    target = export(leaves, tmp_path / "out.safetensors")
    before = target.read_bytes()
    with pytest.raises(UsageError, match="exists"):
        export(leaves, target)
    calls = []

    def fails():
        calls.append(1)
        raise KeyboardInterrupt

    last = list(leaves.lazy)[-1]
    broken = dataclasses.replace(
        leaves, lazy=leaves.lazy | {last: dataclasses.replace(leaves.lazy[last], read=fails)}
    )
    with pytest.raises(KeyboardInterrupt):
        export(broken, target, overwrite=True)
    assert calls and target.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.safetensors", "source.safetensors"]
