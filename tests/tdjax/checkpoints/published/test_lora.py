"""What stands beside the factors of a LoRA, or is for another network: read, or left out and
said."""

import json
import math

import numpy as np
import pytest

from tdjax.checkpoints.published.checkpoint import open_checkpoint
from tdjax.checkpoints.published.lora import left_out_note
from tdjax.errors import CheckpointError

Q, K = "blocks.0.self_attn.q", "blocks.0.self_attn.k"
RANK = 4


def factors(shape, seed=0):
    rng = np.random.default_rng(seed)
    noise = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    return noise(shape[0], RANK), noise(RANK, shape[1])


def pair(module, up, down):
    return {f"{module}.lora_B.weight": up, f"{module}.lora_A.weight": down}


@pytest.fixture
def added(tmp_path, write_safetensors, states):
    """added(tensors, metadata=None, **known) -> (the base's arrays, the checkpoint with the LoRA at
    weight 0.5)."""

    def make(tensors, metadata=None, weight=0.5, name="lora.safetensors", **known):
        base = write_safetensors(tmp_path / "base.safetensors", states("dit"))
        lora = write_safetensors(tmp_path / name, tensors, metadata)
        return states("dit"), open_checkpoint(base, heads=4, lora=((lora, weight),), **known)

    return make


def check(file, key, want):
    np.testing.assert_allclose(file.tensors[key].read(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "foreign",
    [
        "lora_te1_text_model_encoder.lora_down.weight",
        "transformer_2.blocks.0.attn1.to_q.lora_A.weight",
        "diffusion_model.blocks.0.cross_attn.k_img.lora_A.weight",
        "diffusion_model.blocks.0.cross_attn.k_img.diff_b",
        "diffusion_model.blocks.9.ffn.0.lora_down.weight",
        "diffusion_model.patch_embedding.diff",
        f"diffusion_model.{Q}.oft_blocks",
        "text_model.embeddings.weight",
        "lora_te_text_model.alpha",
    ],
)
def test_parts_of_other_networks_are_left_out_and_told(added, foreign):
    up, down = factors((80, 80))
    lora = pair(f"transformer.{Q}", up, down)
    state, file = added(lora | {foreign: np.ones((4, 4), np.float32)})
    counts = file.changes[0]
    assert (counts["low_rank"], counts["left_out"], counts["tensors"]) == (1, 1, 3)
    note = left_out_note(counts)
    assert "lora.safetensors: 1 parts" in note
    assert counts["left_out_keys"][0].partition(" ")[0].partition(":")[0] in foreign
    check(file, f"{Q}.weight", state[f"{Q}.weight"] + 0.5 * (up @ down))
    check(file, f"{K}.weight", state[f"{K}.weight"])


@pytest.mark.parametrize("low", [False, True])
def test_each_expert_takes_its_own(added, low):
    (up, down), (up2, down2) = factors((80, 80)), factors((80, 80), 1)
    lora = pair("transformer.blocks.0.attn1.to_q", up, down)
    lora |= pair("transformer_2.blocks.0.attn1.to_q", up2, down2)
    state, file = added(lora, low_noise=low)
    product = up2 @ down2 if low else up @ down
    check(file, f"{Q}.weight", state[f"{Q}.weight"] + 0.5 * product)
    assert file.changes[0]["left_out"] == 1


def test_an_expert_s_own_file_on_the_other(added):
    with pytest.raises(CheckpointError, match="low-noise expert.*\n.*\n.*lora_low"):
        added(pair("transformer_2.blocks.0.attn1.to_q", *factors((80, 80))))
    _, file = added(pair("transformer.blocks.0.attn1.to_q", *factors((80, 80))), low_noise=True)
    assert "left_out" not in file.changes[0]


@pytest.mark.parametrize("shape", [(80, 1), (80,), (1, 128)])
def test_magnitudes(added, shape):
    """DoRA, equation 5: the sum has the length that the file says, for each output or input."""
    module = "blocks.0.ffn.2"  # 128 inputs, 80 outputs
    up, down = factors((80, 128))
    length = np.random.default_rng(3).uniform(0.5, 1.5, shape).astype(np.float32)
    state, file = added(pair(module, up, down) | {f"{module}.dora_scale": length}, weight=1.0)
    axis = 0 if shape[0] == 1 else 1
    whole = state[f"{module}.weight"] + up @ down
    want = (
        whole
        / np.linalg.norm(whole, axis=axis, keepdims=True)
        * length.reshape((1, -1) if axis == 0 else (-1, 1))
    )
    check(file, f"{module}.weight", want)


def lycoris(kind, shape, rank=RANK, seed=0):
    """(the parts of a change, the change itself in float64)."""
    rng = np.random.default_rng(seed)
    noise = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    (out, inputs), exact = shape, lambda x: x.astype(np.float64)
    if kind == "loha":
        parts = {f"hada_{w}_{x}": noise(*(out, rank) if x == "a" else (rank, inputs))
                 for w in ("w1", "w2") for x in "ab"}  # fmt: skip
        first, second = (exact(parts[f"hada_{w}_a"]) @ parts[f"hada_{w}_b"] for w in ("w1", "w2"))
        return parts, first * second
    small, large = noise(4, 8), (out // 4, inputs // 8)
    if kind == "lokr, whole":
        parts = {"lokr_w1": small, "lokr_w2": noise(*large)}
        return parts, np.kron(exact(small), parts["lokr_w2"])
    up, down = noise(large[0], rank), noise(rank, large[1])
    if kind == "lokr, second":
        parts = {"lokr_w1": small, "lokr_w2_a": up, "lokr_w2_b": down}
        return parts, np.kron(exact(small), exact(up) @ down)
    a, b = noise(4, rank), noise(rank, 8)
    parts = {"lokr_w1_a": a, "lokr_w1_b": b, "lokr_w2_a": up, "lokr_w2_b": down}
    return parts, np.kron(exact(a) @ b, exact(up) @ down)


LYCORIS = ("loha", "lokr, whole", "lokr, second", "lokr, both")


@pytest.mark.parametrize("alpha", [None, 2.0])
@pytest.mark.parametrize("kind", LYCORIS)
@pytest.mark.parametrize("prefix", ["diffusion_model.", "lycoris_"])
def test_lycoris(added, kind, alpha, prefix):
    """LoHa and LoKr, against float64; alpha says nothing where no factor is a product."""
    module = "blocks.0.ffn.2"
    parts, change = lycoris(kind, (80, 128))
    name = prefix + (module.replace(".", "_") if prefix == "lycoris_" else module)
    lora = {f"{name}.{part}": value for part, value in parts.items()}
    scale = 1.0
    if alpha is not None:
        lora[f"{name}.alpha"] = np.float32(alpha)
        scale = 1.0 if kind == "lokr, whole" else alpha / RANK
    state, file = added(lora)
    check(file, f"{module}.weight", state[f"{module}.weight"] + 0.5 * scale * change)
    assert file.changes[0]["low_rank"] == 1 and "left_out" not in file.changes[0]


@pytest.mark.parametrize("kind", LYCORIS)
def test_lycoris_of_another_size_or_without_a_part(added, kind):
    parts, _ = lycoris(kind, (80, 128))
    whole = {f"{Q}.{part}": value for part, value in parts.items()}
    with pytest.raises(CheckpointError, match="another model size"):
        added(whole)
    lacking = {f"blocks.0.ffn.2.{part}": value for part, value in list(parts.items())[1:]}
    with pytest.raises(CheckpointError, match="one of them is missing"):
        added(lacking)


def test_a_bias_of_the_factors(added):
    bias = np.linspace(-1, 1, 80, dtype=np.float32)
    lora = pair(Q, *factors((80, 80))) | {f"{Q}.lora_B.bias": bias, f"{Q}.alpha": np.float32(8)}
    state, file = added(lora)
    check(file, f"{Q}.bias", state[f"{Q}.bias"] + 0.5 * 8 / RANK * bias)


def test_a_bias_that_does_not_fit_its_factors_or_lacks_them(added):
    bias = {f"{Q}.lora_B.bias": np.ones(79, np.float32)}
    with pytest.raises(CheckpointError, match="lora_B.bias has 79 values\n.*80"):
        added(pair(Q, *factors((80, 80))) | bias)
    with pytest.raises(CheckpointError, match="has only up_bias\n.*missing"):
        added(pair(K, *factors((80, 80))) | bias)


def test_factors_and_a_whole_difference_of_one_layer(added):
    """Both are added, each once."""
    up, down = factors((80, 80))
    difference = np.random.default_rng(4).standard_normal((80, 80)).astype(np.float32)
    state, file = added(pair(Q, up, down) | {f"{Q}.diff": difference})
    check(file, f"{Q}.weight", state[f"{Q}.weight"] + 0.5 * (up @ down + difference))
    assert (file.changes[0]["low_rank"], file.changes[0]["full"]) == (1, 1)


def test_a_tensor_by_its_own_name(added):
    change = np.ones((1, 6, 80), np.float32)
    state, file = added({"diffusion_model.blocks.1.modulation.diff": change})
    check(file, "blocks.1.modulation", state["blocks.1.modulation"] + 0.5)


# Settings
# --------------------------------------------------------------------------------------------------

ADAPTER = {"peft_type": "LORA", "r": RANK, "lora_alpha": 16}


@pytest.mark.parametrize(
    "settings, scale",
    [
        ({}, 16 / RANK),
        ({"use_rslora": True}, 16 / math.sqrt(RANK)),
        ({"alpha_pattern": {"self_attn.q": 2}}, 2 / RANK),
        ({"alpha_pattern": {"attn.q": 2}}, 16 / RANK),
        ({"rank_pattern": {"self_attn.q": RANK}, "r": 99}, 16 / RANK),
    ],
)
@pytest.mark.parametrize("where", ["beside", "inside"])
def test_adapter_settings(tmp_path, added, settings, scale, where):
    up, down = factors((80, 80))
    values, metadata = ADAPTER | settings, None
    if where == "beside":
        (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    else:
        values = {f"transformer.{name}": value for name, value in values.items()}
        metadata = {"lora_adapter_metadata": json.dumps(values)}
    state, file = added(pair(f"base_model.model.{Q}", up, down), metadata)
    check(file, f"{Q}.weight", state[f"{Q}.weight"] + np.float32(0.5 * scale) * (up @ down))
    assert file.changes[0]["scaled_by"]


def test_alpha_among_the_metadata(added):
    up, down = factors((80, 80))
    flat = f"lora_unet_{Q.replace('.', '_')}"
    kohya = {f"{flat}.lora_up.weight": up, f"{flat}.lora_down.weight": down}
    state, file = added(kohya, {"ss_network_alpha": "2.0", "ss_network_dim": str(RANK)})
    check(file, f"{Q}.weight", state[f"{Q}.weight"] + np.float32(0.5 * 2 / RANK) * (up @ down))
    state, file = added(kohya | {f"{flat}.alpha": np.float32(4)}, {"ss_network_alpha": "2.0"})
    check(file, f"{Q}.weight", state[f"{Q}.weight"] + np.float32(0.5) * (up @ down))


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "is damaged"),
        ("[" * 100_000, "nested too deep"),
        ("[]", "not a table"),
        ('{"r": "4"}', "r is '4', not int"),
        ('{"lora_alpha": NaN}', "lora_alpha is nan"),
        ('{"alpha_pattern": []}', "alpha_pattern is a list"),
        ('{"peft_type": "LOHA"}', "another adapter .LOHA"),
        ('{"fan_in_fan_out": true}', "another adapter"),
        ('{"r": 8, "lora_alpha": 8}', "has rank 4, .*adapter_config.json says 8"),
    ],
)
def test_settings_that_are_not_read(tmp_path, added, text, message):
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        added(pair(Q, *factors((80, 80))))


@pytest.mark.parametrize("part", [0, 1])
def test_values_that_are_not_finite(added, part):
    both = factors((80, 80))
    both[part][0, 0] = np.nan
    _, file = added(pair(Q, *both))
    with pytest.raises(CheckpointError, match="self_attn.q holds NaN"):
        file.tensors[f"{Q}.weight"].read()


@pytest.mark.parametrize("magnitude", [{}, {f"{Q}.lora_magnitude_vector": np.ones(80, np.float32)}])
def test_values_whose_product_is_beyond_float32(added, magnitude):
    both = [np.full_like(each, 1e38) for each in factors((80, 80))]
    _, file = added(pair(Q, *both) | magnitude)
    with pytest.raises(CheckpointError, match="self_attn.q: its values are too large"):
        file.tensors[f"{Q}.weight"].read()


def test_one_factor_alone(added):
    up, down = factors((80, 80))
    lora = pair(K, up, down) | {f"{Q}.lora_A.weight": down}
    with pytest.raises(CheckpointError, match="self_attn.q has only down"):
        added(lora)
