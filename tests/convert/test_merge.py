"""base + w (target - diff_base) and LoRA against numpy, in every key layout; nothing is left out
silently."""

import ml_dtypes
import numpy as np
import pytest

from convert import merge
from tdjax.checkpoints.published.checkpoint import open_checkpoint
from tdjax.errors import CheckpointError

BF16 = ml_dtypes.bfloat16
PROJ = "blocks.0.self_attn.attn_op.local_attn.proj_l"
Q = "blocks.0.self_attn.q"


@pytest.fixture
def file(tmp_path, write_safetensors):
    """file(name, state, **known) -> a Checkpoint of it."""

    def make(name, state, **known):
        return open_checkpoint(write_safetensors(tmp_path / f"{name}.safetensors", state), **known)

    return make


def noisy(state, seed):
    rng = np.random.default_rng(seed)
    return {
        k: (v + 0.1 * rng.standard_normal(v.shape)).astype(np.float32) for k, v in state.items()
    }


@pytest.fixture
def three(states):
    """rCM student, pretrained and SLA-tuned weights: the last alone has the projection."""
    sla = states("sla")
    plain = {k: v for k, v in sla.items() if "proj_l" not in k}
    return noisy(plain, 1), plain, noisy(sla, 2)


def test_numbers_and_counts(file, three):
    student, plain, tuned = three
    tensors, counts = merge.merge(
        file("student", student), file("plain", plain), file("tuned", tuned), 0.5
    )
    assert (counts["matched"], counts["kept"], counts["copied"]) == (len(student), 0, 2)
    assert tensors.keys() == tuned.keys()
    for key in student:
        want = student[key] + np.float32(0.5) * (tuned[key] - plain[key])
        np.testing.assert_array_equal(tensors[key].read(), want, err_msg=key)
    np.testing.assert_array_equal(tensors[f"{PROJ}.weight"].read(), tuned[f"{PROJ}.weight"])


def test_result_has_the_dtype_of_the_base_and_one_rounding(file, three):
    student, plain, tuned = three
    half = {k: v.astype(BF16) for k, v in student.items()}
    tensors, _ = merge.merge(file("student", half), file("plain", plain), file("tuned", tuned), 1.0)
    want = (
        half[f"{Q}.weight"].astype(np.float32) + (tuned[f"{Q}.weight"] - plain[f"{Q}.weight"])
    ).astype(BF16)
    got = tensors[f"{Q}.weight"].read()
    assert got.dtype == BF16
    np.testing.assert_array_equal(got, want)


def test_prefixes_and_names_do_not_matter(file, states):
    """The official script returns the base unchanged here, without a word."""
    wan, diffusers = states("dit"), states("diffusers")
    base, target = noisy(wan, 1), {f"net.{k}": v for k, v in noisy(wan, 2).items()}
    tensors, counts = merge.merge(
        file("a", base, heads=4), file("b", diffusers, heads=4), file("c", target, heads=4), 1.0
    )
    assert (counts["matched"], counts["kept"], counts["copied"]) == (len(wan), 0, 0)
    for key in base:
        want = base[key] + (target[f"net.{key}"] - wan[key])
        np.testing.assert_array_equal(tensors[key].read(), want, err_msg=key)


def test_wider_patch_embedding_is_kept(file, states):
    base, narrow = states("i2v"), states("dit")
    tensors, counts = merge.merge(
        file("a", base, heads=4),
        file("b", narrow, heads=4),
        file("c", noisy(narrow, 3), heads=4),
        4.0,
    )
    assert counts["kept_keys"] == ["patch_embedding.weight"] and counts["matched"] == len(base) - 1
    np.testing.assert_array_equal(
        tensors["patch_embedding.weight"].read(), base["patch_embedding.weight"]
    )


def test_what_cannot_be_merged(file, states, three):
    student, plain, tuned = three
    with pytest.raises(
        CheckpointError, match="only 1 of 42 tensors of sla.safetensors are in both"
    ):
        merge.merge(
            file("sla", plain),
            file("b", states("dit"), heads=4),
            file("c", states("dit"), heads=4),
            1.0,
        )
    with pytest.raises(CheckpointError, match="only like can be merged"):
        merge.merge(file("sla", plain), file("text", states("text")), file("c", plain), 1.0)
    quantised = {k: v for k, v in plain.items() if not k.startswith(f"{Q}.")}
    quantised |= {
        f"{Q}.int8_weight": np.ones((128, 128), np.int8),
        f"{Q}.scale": np.ones((1, 1), np.float32),
        f"{Q}.bias": np.ones(128, np.float32),
    }

    class Half:
        tensors, name, kind = quantised, "q.pth", "dit"

    with pytest.raises(CheckpointError, match="q.pth holds 8-bit weights"):
        merge.merge(Half, file("b", plain), file("c", plain), 1.0)


# LoRA
# --------------------------------------------------------------------------------------------------

RANK = 3


def factors(shape, seed=0, rank=RANK):
    rng = np.random.default_rng(seed)
    inputs = int(np.prod(shape[1:]))
    return rng.standard_normal((shape[0], rank)).astype(np.float32), rng.standard_normal(
        (rank, inputs)
    ).astype(np.float32)


def layout(kind, module, up, down, alpha=None):
    """Keys of one LoRA module as different tools write them."""
    flat = module.replace(".", "_")
    names = {
        "peft": (f"{module}.lora_B.weight", f"{module}.lora_A.weight", f"{module}.alpha"),
        "peft_prefix": (
            f"diffusion_model.{module}.lora_B.weight",
            f"diffusion_model.{module}.lora_A.weight",
            f"diffusion_model.{module}.alpha",
        ),
        "peft_saved": (
            f"base_model.model.{module}.lora_B.default.weight",
            f"base_model.model.{module}.lora_A.default.weight",
            f"{module}.alpha",
        ),
        "diffusers": (
            f"transformer.{module}.lora_B.weight",
            f"transformer.{module}.lora_A.weight",
            f"transformer.{module}.alpha",
        ),
        "old_diffusers": (
            f"transformer.{module}.lora.up.weight",
            f"transformer.{module}.lora.down.weight",
            f"transformer.{module}.alpha",
        ),
        "kohya": (
            f"lora_unet_{flat}.lora_up.weight",
            f"lora_unet_{flat}.lora_down.weight",
            f"lora_unet_{flat}.alpha",
        ),
        "comfy": (
            f"diffusion_model.{module}.lora_up.weight",
            f"diffusion_model.{module}.lora_down.weight",
            f"diffusion_model.{module}.alpha",
        ),
    }[kind]
    out = {names[0]: up, names[1]: down}
    return out if alpha is None else out | {names[2]: np.float32(alpha)}


@pytest.mark.parametrize(
    "kind", ["peft", "peft_prefix", "peft_saved", "diffusers", "old_diffusers", "kohya", "comfy"]
)
@pytest.mark.parametrize("names", ["wan", "diffusers"])
@pytest.mark.parametrize("alpha", [None, 1.5])
def test_lora_layouts(tmp_path, write_safetensors, states, kind, names, alpha):
    state = states("dit")
    if alpha is not None and kind == "peft_saved":
        pytest.skip("this layout keeps alpha in a file of its own")
    modules = {
        "blocks.1.self_attn.q": "blocks.1.attn1.to_q",
        "blocks.0.ffn.2": "blocks.0.ffn.net.2",
        "blocks.1.cross_attn.o": "blocks.1.attn2.to_out.0",
    }
    lora, wants = {}, {}
    for i, (wan, diffusers) in enumerate(modules.items()):
        up, down = factors(state[f"{wan}.weight"].shape, i)
        lora |= layout(kind, wan if names == "wan" else diffusers, up, down, alpha)
        scale = np.float32(0.8 * (1.0 if alpha is None else alpha / RANK))
        wants[f"{wan}.weight"] = state[f"{wan}.weight"] + scale * (up @ down)
    path = write_safetensors(tmp_path / "lora.safetensors", lora)
    file = open_checkpoint(
        write_safetensors(tmp_path / "base.safetensors", state), heads=4, lora=((path, 0.8),)
    )
    assert file.changes[0] == {
        "lora": "lora.safetensors",
        "weight": 0.8,
        "low_rank": 3,
        "full": 0,
        "tensors": len(lora),
    }
    for key, value in state.items():
        np.testing.assert_allclose(
            file.tensors[key].read(), wants.get(key, value), rtol=1e-6, atol=1e-6, err_msg=key
        )
    module = file.load()
    np.testing.assert_array_equal(
        module.blocks.down.kernel[...][0],
        file.tensors["blocks.0.ffn.2.weight"].read().T.astype(BF16),
    )


def test_whole_differences_and_patch_convolutions(tmp_path, write_safetensors, states):
    state = dict(states("diffusers"))
    rng = np.random.default_rng(0)
    noise = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    up, down = factors((80, 64))
    lora = {
        "diffusion_model.blocks.0.norm3.diff": noise(80),
        "diffusion_model.blocks.0.norm3.diff_b": noise(80),
        "diffusion_model.blocks.1.diff_m": noise(1, 6, 80),
        "diffusion_model.blocks.1.self_attn.q.diff_b": noise(80),
        "diffusion_model.patch_embedding.lora_up.weight": up.reshape(80, RANK, 1, 1, 1),
        "diffusion_model.patch_embedding.lora_down.weight": down.reshape(RANK, 16, 1, 2, 2),
        "diffusion_model.head.head.diff_b": noise(64),
    }
    targets = dict(
        zip(
            lora,
            (
                "blocks.0.norm2.weight",
                "blocks.0.norm2.bias",
                "blocks.1.scale_shift_table",
                "blocks.1.attn1.to_q.bias",
            ),
            strict=False,
        )
    )
    targets["diffusion_model.head.head.diff_b"] = "proj_out.bias"
    path = write_safetensors(tmp_path / "lora.safetensors", lora)
    file = open_checkpoint(
        write_safetensors(tmp_path / "base.safetensors", state), heads=4, lora=((path, 2.0),)
    )
    assert (file.changes[0]["low_rank"], file.changes[0]["full"]) == (1, 5)
    for key, target in targets.items():
        np.testing.assert_allclose(
            file.tensors[target].read(), state[target] + 2 * lora[key], rtol=1e-6, err_msg=key
        )
    want = state["patch_embedding.weight"] + 2 * (up @ down).reshape(80, 16, 1, 2, 2)
    np.testing.assert_allclose(
        file.tensors["patch_embedding.weight"].read(), want, rtol=1e-6, atol=1e-6
    )


def test_two_loras_are_rounded_once(tmp_path, write_safetensors, states):
    state = {k: v.astype(BF16) for k, v in states("dit").items()}
    up, down = factors((80, 80))
    paths = [
        write_safetensors(tmp_path / f"{i}.safetensors", layout("peft", Q, up, down))
        for i in range(2)
    ]
    file = open_checkpoint(
        write_safetensors(tmp_path / "b.safetensors", state),
        heads=4,
        lora=((paths[0], 0.01), (paths[1], 0.02)),
    )
    want = (
        state[f"{Q}.weight"].astype(np.float32)
        + np.float32(0.01) * (up @ down)
        + np.float32(0.02) * (up @ down)
    )
    np.testing.assert_array_equal(file.tensors[f"{Q}.weight"].read(), want.astype(BF16))


@pytest.mark.parametrize(
    "lora, message",
    [
        ({"blocks.7.self_attn.q": (80, 80)}, "1 of 1 changes have no tensor.*blocks.7.self_attn.q"),
        ({"blocks.0.cross_attn.k_img": (80, 80)}, "k_img"),
        ({"lora_te_text_model": (80, 80)}, "have no tensor"),
        ({"blocks.0.self_attn.q": (81, 80)}, "factors.*another model size"),
        ({"blocks.0.self_attn.q": (80, 81)}, "another model size"),
    ],
)
def test_lora_of_another_model(tmp_path, write_safetensors, states, lora, message):
    import re

    tensors = {}
    for module, shape in lora.items():
        tensors |= layout("comfy", module, *factors(shape))
    path = write_safetensors(tmp_path / "lora.safetensors", tensors)
    base = write_safetensors(tmp_path / "base.safetensors", states("dit"))
    with pytest.raises(CheckpointError) as e:
        open_checkpoint(base, heads=4, lora=((path, 1.0),))
    assert re.search(message, str(e.value), re.DOTALL), str(e.value)


def test_odd_lora_files(tmp_path, write_safetensors, states):
    base = write_safetensors(tmp_path / "base.safetensors", states("dit"))
    up, down = factors((80, 80))
    for tensors, message in (
        ({f"{Q}.lora_A.weight": down}, "only down"),
        ({f"{Q}.alpha": np.float32(1)}, "only alpha"),
        ({f"{Q}.dora_scale": up} | layout("peft", Q, up, down), "dora_scale"),
        (states("dit"), "known keys end in lora_A/lora_B"),
        ({f"{Q}.diff": np.ones((3, 3), np.float32)}, r"blocks.0.self_attn.q \(weight\)"),
    ):
        path = write_safetensors(tmp_path / "lora.safetensors", tensors)
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(base, heads=4, lora=((path, 1.0),))
    with pytest.raises(CheckpointError, match="is a LoRA, not a model"):
        open_checkpoint(
            write_safetensors(tmp_path / "lora.safetensors", layout("kohya", Q, up, down))
        )
