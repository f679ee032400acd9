"""umT5: the golden vectors of the official encoder, transformers' own at other sizes, and what the
DiT relies on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import put
from flax import nnx
from tolerances import assert_close

from tdjax.config import TextConfig
from tdjax.models.abstract import as_shapes
from tdjax.models.umt5 import UMT5, intermediates, relative_bucket, relative_positions
from tdjax.precision import BF16, FLOAT32
from tdjax.presets import UMT5_XXL

# name of a leaf -> (official key, transformers key), both with {} for the layer
KEYS = {
    "embed.embedding": ("token_embedding.weight", "shared.weight"),
    "blocks.norm1.scale": ("blocks.{}.norm1.weight", "encoder.block.{}.layer.0.layer_norm.weight"),
    "blocks.attn.q.kernel": (
        "blocks.{}.attn.q.weight",
        "encoder.block.{}.layer.0.SelfAttention.q.weight",
    ),
    "blocks.attn.k.kernel": (
        "blocks.{}.attn.k.weight",
        "encoder.block.{}.layer.0.SelfAttention.k.weight",
    ),
    "blocks.attn.v.kernel": (
        "blocks.{}.attn.v.weight",
        "encoder.block.{}.layer.0.SelfAttention.v.weight",
    ),
    "blocks.attn.o.kernel": (
        "blocks.{}.attn.o.weight",
        "encoder.block.{}.layer.0.SelfAttention.o.weight",
    ),
    "blocks.relative_bias": (
        "blocks.{}.pos_embedding.embedding.weight",
        "encoder.block.{}.layer.0.SelfAttention.relative_attention_bias.weight",
    ),
    "blocks.norm2.scale": ("blocks.{}.norm2.weight", "encoder.block.{}.layer.1.layer_norm.weight"),
    "blocks.gate.kernel": (
        "blocks.{}.ffn.gate.0.weight",
        "encoder.block.{}.layer.1.DenseReluDense.wi_0.weight",
    ),
    "blocks.up.kernel": (
        "blocks.{}.ffn.fc1.weight",
        "encoder.block.{}.layer.1.DenseReluDense.wi_1.weight",
    ),
    "blocks.down.kernel": (
        "blocks.{}.ffn.fc2.weight",
        "encoder.block.{}.layer.1.DenseReluDense.wo.weight",
    ),
    "norm.scale": ("norm.weight", "encoder.final_layer_norm.weight"),
}


def name(path):
    return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")


def build(cfg, weights, dialect):
    """A UMT5 with the weights of a state dict in one of the two dialects of KEYS."""
    model = as_shapes(UMT5, cfg)

    def leaf(path, shape):
        key = KEYS[name(path)][dialect]
        array = (
            np.stack([weights[key.format(i)] for i in range(cfg.layers)])
            if "{}" in key
            else weights[key]
        )
        array = (
            array.swapaxes(-1, -2)
            if key.endswith(("q.weight", "k.weight", "v.weight", "o.weight"))
            or "kernel" in name(path)
            else array
        )
        assert array.shape == shape.shape, name(path)
        return put(array, shape.dtype)

    return jax.tree_util.tree_map_with_path(leaf, model)


def text_config(golden, policy=FLOAT32):
    c = golden.config
    return TextConfig(
        vocab=c["vocab_size"],
        dim=c["dim"],
        attention_dim=c["dim_attn"],
        ffn_dim=c["dim_ffn"],
        heads=c["num_heads"],
        layers=c["encoder_layers"],
        buckets=c["num_buckets"],
        text_len=c["text_len"],
        policy=policy,
    )


@pytest.fixture(scope="module")
def tiny(golden):
    g = golden("umt5_tiny")
    return g, build(text_config(g), g.weights(), 0)


def run(model, ids, mask):
    return jax.jit(lambda m, i, k: m(i, k))(model, put(ids), put(mask))


def test_golden_embedding(tiny):
    g, model = tiny
    assert g["in/mask"].sum(1).tolist() == [160, 23, 1]
    out = np.asarray(run(model, g["in/ids"], g["in/mask"]))
    assert_close(out, g["out/embedding"], "umt5", "embedding")
    assert (out[g["in/mask"] == 0] == 0).all()


def test_golden_intermediates(tiny):
    g, model = tiny
    values = jax.jit(intermediates)(model, g["in/ids"], g["in/mask"])
    compared = 0
    for key, value in values.items():
        if f"mid/{key}" not in g:
            continue
        compared += 1
        if np.issubdtype(value.dtype, np.integer):
            assert np.array_equal(value, g[f"mid/{key}"]), key
        else:
            assert_close(value, g[f"mid/{key}"], "umt5", key)
    assert (
        compared == 9
    )  # rel_pos, rel_bucket, embed, three values of block 0, the outputs of blocks 1 and 2, the end


def test_loaded_in_bfloat16(tiny):
    g, _ = tiny
    out = run(build(text_config(g, BF16), g.weights(), 0), g["in/ids"], g["in/mask"])
    assert out.dtype == jnp.bfloat16
    error = np.linalg.norm(np.asarray(out, np.float32) - g["out/embedding"]) / np.linalg.norm(
        g["out/embedding"]
    )
    assert error < 0.02  # three layers of bfloat16 rounding, 2^-8 each


@pytest.mark.slow
@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (16, 64), (10, 50)])
def test_buckets_of_every_distance_agree_with_transformers(buckets, max_distance):
    torch = pytest.importorskip("torch")
    from transformers import UMT5Config
    from transformers.models.umt5.modeling_umt5 import UMT5Attention

    cfg = UMT5Config(
        d_model=8,
        d_kv=4,
        num_heads=2,
        relative_attention_num_buckets=buckets,
        relative_attention_max_distance=max_distance,
    )
    rel = relative_positions(512)
    expected = UMT5Attention(cfg)._relative_position_bucket(torch.from_numpy(rel).long())
    assert np.array_equal(relative_bucket(rel, buckets, max_distance), expected.numpy())


@pytest.mark.slow
def test_transformers_encoder_of_prime_sizes():
    torch = pytest.importorskip("torch")
    from transformers import UMT5Config, UMT5EncoderModel

    cfg = TextConfig(
        vocab=101,
        dim=26,
        attention_dim=33,
        ffn_dim=43,
        heads=3,
        layers=2,
        buckets=16,
        max_distance=50,
        text_len=71,
        policy=FLOAT32,
    )
    torch.manual_seed(3)
    oracle = UMT5EncoderModel(
        UMT5Config(
            vocab_size=101,
            d_model=26,
            d_kv=11,
            d_ff=43,
            num_layers=2,
            num_heads=3,
            relative_attention_num_buckets=16,
            relative_attention_max_distance=50,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            pad_token_id=0,
        ),
    ).eval()
    with torch.no_grad():
        for p in oracle.parameters():
            p.copy_(torch.randn_like(p) * 0.3 + (1.0 if p.ndim == 1 else 0.0))
        lengths = np.array([71, 17, 1])
        ids = np.random.default_rng(0).integers(1, 101, (3, 71)).astype(np.int32)
        mask = (np.arange(71) < lengths[:, None]).astype(np.int32)
        expected = oracle(
            torch.from_numpy(ids * mask).long(), attention_mask=torch.from_numpy(mask).long()
        ).last_hidden_state
    model = build(cfg, {k: v.numpy() for k, v in oracle.state_dict().items()}, 1)
    assert_close(
        run(model, ids * mask, mask),
        expected.numpy() * mask[..., None],
        "oracle_umt5",
        "transformers",
    )


def test_ids_after_the_end_do_not_matter(tiny):
    g, model = tiny
    ids = np.where(g["in/mask"] > 0, g["in/ids"], 7)
    assert np.array_equal(run(model, ids, g["in/mask"]), run(model, g["in/ids"], g["in/mask"]))


def test_a_row_without_any_token_is_zero_and_finite(tiny):
    g, model = tiny
    out = np.asarray(run(model, g["in/ids"][:1], np.zeros_like(g["in/mask"][:1])))
    assert (out == 0).all()


@pytest.mark.slow
def test_gradient_reaches_every_leaf():
    cfg = TextConfig(
        vocab=11,
        dim=6,
        attention_dim=10,
        ffn_dim=7,
        heads=2,
        layers=2,
        buckets=8,
        max_distance=16,
        text_len=5,
        policy=FLOAT32,
    )
    rng = np.random.default_rng(0)
    abstract = as_shapes(UMT5, cfg)
    model = jax.tree.map(lambda leaf: put(rng.normal(size=leaf.shape), jnp.float32), abstract)
    ids, mask = put([[3, 4, 1, 0, 0]]), put([[1, 1, 1, 0, 0]])
    target = put(rng.normal(size=(1, 5, 6)), jnp.float32)
    grads = jax.jit(jax.grad(lambda m: jnp.sum(m(ids, mask) * target)))(model)
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(leaf).all(), name(path)
        assert np.any(leaf != 0), name(path)


def test_published_sizes(manifest):
    """Abstract umT5-xxl: names, shapes and parameter count of the published file."""
    model = as_shapes(UMT5, UMT5_XXL)
    leaves = {name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(model)}
    assert set(leaves) == set(KEYS)
    published = manifest("models_t5_umt5-xxl-enc-bf16")
    assert sum(leaf.size for leaf in leaves.values()) == published["header"]["num_elements"]
    assert all(leaf.dtype == jnp.bfloat16 for leaf in leaves.values())
    for leaf, (key, _) in KEYS.items():
        shape = published["tensors"][key.format(0)]["shape"]
        assert sorted(leaves[leaf].shape[-len(shape) :]) == sorted(shape), leaf


@pytest.mark.slow
def test_initial_features_have_unit_size():
    """T5's start: q is small, so that unscaled dot products do not saturate the softmax."""
    cfg = TextConfig(
        vocab=64,
        dim=32,
        attention_dim=32,
        ffn_dim=48,
        heads=4,
        layers=2,
        text_len=7,
        policy=FLOAT32,
    )
    out = jax.jit(lambda ids: UMT5(cfg, rngs=nnx.Rngs(0))(ids, jnp.ones_like(ids)))(
        jnp.arange(14).reshape(2, 7)
    )
    assert 0.5 < np.asarray(out).std() < 2.0
