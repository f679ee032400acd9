import dataclasses

import described
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import put
from dit_cases import channels_last, clip, dit, inputs, jit, load, module
from einops import rearrange
from jaxprs import equations
from tolerances import assert_close

from pallas_kernels import norm_modulate
from pallas_kernels.norm_modulate import reference
from tdjax.config import DiTConfig
from tdjax.models.abstract import as_shapes
from tdjax.models.intermediates import intermediates
from tdjax.models.linear import LINEAR
from tdjax.models.wan_dit import DiT, with_linear
from tdjax.parallel.sharding import leaf_name
from tdjax.precision import FLOAT32
from tdjax.presets import WAN_14B

FILES = ("dit_t2v_tiny", "dit_i2v22_tiny", "dit_i2v21_tiny", "dit_sla_tiny")
TINY = DiTConfig(
    dim=24,
    heads=2,
    ffn_dim=20,
    layers=2,
    in_channels=7,
    out_channels=5,
    freq_dim=16,
    text_dim=6,
    text_len=4,
    round_time=False,
    policy=FLOAT32,
)
run = jax.jit(lambda model, *args: model(*args))


def tiny(**changes):
    """A model whose every leaf is random: the head and the biases of a fresh one are zero."""
    cfg = dataclasses.replace(TINY, **changes)
    draw = np.random.default_rng(0).normal
    width = lambda leaf: leaf.shape[-2] ** 0.5 if leaf.ndim > 1 and leaf.shape[-2] > 6 else 3
    return jax.tree.map(
        lambda leaf: put(draw(size=leaf.shape) / width(leaf), leaf.dtype), abstract(cfg)
    )


def abstract(cfg):
    return as_shapes(DiT, cfg)


def normal(seed, *shape):
    return put(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def batch(b=2):
    return (
        normal(0, b, 2, 4, 6, 5),
        put(np.linspace(977.3, 104.8, b), jnp.float32),
        normal(1, b, 4, 6),
        normal(2, b, 2, 4, 6, 2),
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_golden(golden, name):
    g, kind = golden(name), "sla" if "sla" in name else "dit"
    v, values = jax.jit(lambda model, *args: (model(*args), intermediates(model, *args)))(
        load(g), *inputs(g)
    )
    for key in g.keys("mid/"):
        assert_close(values[key.removeprefix("mid/").removesuffix("_f64")], g[key], kind, key)
    if kind == "sla":
        np.testing.assert_array_equal(
            np.asarray(values["block0/sparse_map"]), g["mid/block0/sparse_map"]
        )
    assert v.dtype == jnp.float32
    for output in (v, values["v"]):  # blocks scanned, blocks unrolled
        assert_close(output, channels_last(g["out/v"]), kind)


@pytest.mark.slow
def test_published_fast_norm_explains_its_output(golden, monkeypatch):
    """With the padded variance of the published LayerNorm in the blocks (never in the head), ours
    gives its numbers too."""
    g = golden("dit_t2v_tiny")
    model, args = load(g), inputs(g)

    def padded(x, y, gate, factor, shift, *, eps, floats, dtype):
        x = x if y is None else reference.stream(x, y, gate)
        mean, extra = x.mean(-1, keepdims=True), 128 / 80 - 1
        h = (x - mean) * jax.lax.rsqrt(x.var(-1, keepdims=True) + extra * mean**2 + eps)
        return x, h * factor[:, None] + shift[:, None], None

    with monkeypatch.context() as patch:
        patch.setitem(norm_modulate.IMPLEMENTATIONS["norm"], "reference", padded)
        values = jax.jit(lambda *a: intermediates(*a))(model, *args)
    v = model.unpatchify(model.head(values["block1/out"], values["e"]), model.grid(args[0]))
    assert_close(v, channels_last(g["out/v_fastnorm"]), "dit")
    assert np.abs(v - channels_last(g["out/v"])).max() > 1e-3


@pytest.mark.slow
def test_agrees_with_another_port():
    """diffusers' WanTransformer3DModel with random weights, at sizes that share no factor with the
    golden ones."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    cfg = DiTConfig(
        dim=3 * 26,
        heads=3,
        ffn_dim=101,
        layers=3,
        freq_dim=34,
        text_dim=23,
        in_channels=18,
        out_channels=7,
        round_time=False,
        policy=FLOAT32,
    )
    torch.manual_seed(0)
    theirs = diffusers.WanTransformer3DModel(
        patch_size=cfg.patch,
        num_attention_heads=3,
        attention_head_dim=26,
        in_channels=18,
        out_channels=7,
        text_dim=23,
        freq_dim=34,
        ffn_dim=101,
        num_layers=3,
        cross_attn_norm=True,
        rope_max_seq_len=64,
    ).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(
                torch.randn_like(p) * (0.5 / p.shape[-1] ** 0.5 if p.ndim > 1 else 0.1)
                + (p.ndim == 1 and p.mean() == 1)
            )
    model = module({k: v.numpy() for k, v in theirs.state_dict().items()}, heads=3)
    assert model.cfg == dataclasses.replace(cfg, text_len=model.cfg.text_len)
    x, text, t = (
        np.array(normal(0, 2, 18, 3, 10, 14)),
        np.array(normal(1, 2, 13, 23)),
        np.array([999.0, 12.5], np.float32),
    )
    with torch.no_grad():
        expected = theirs(torch.tensor(x), torch.tensor(t), torch.tensor(text), return_dict=False)[
            0
        ].numpy()
    x = channels_last(x)
    v = run(model, x[..., :7], t, text, x[..., 7:])
    assert_close(v, channels_last(expected), "oracle_dit")
    assert np.abs(expected).max() > 0.5


def direction(tree, seed):
    """Random arrays like those of a tree."""
    draw = np.random.default_rng(seed).normal
    return jax.tree.map(lambda x: draw(size=x.shape).astype(np.float32), tree)


def inner(a, b):
    return sum(np.vdot(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def moved(tree, way, step):
    return jax.tree.map(lambda x, w: np.asarray(x) + np.float32(step) * w, tree, way)


@pytest.mark.slow
def test_derivatives_of_both_modes():
    """Through scan and checkpoint, in weights, latents and time: the tangent is the slope, the
    gradient is its transpose."""
    model, (x, t, *rest) = tiny(), batch()
    at = (model, x, t)
    way, out = direction(at, 3), direction(x, 4)
    f = jax.jit(lambda *at: at[0](*at[1:], *rest))
    v, tangent = jax.jit(lambda *at: jax.jvp(f, at, jax.tree.map(jnp.asarray, way)))(*at)
    assert_close(v, f(*at), "dit")
    step = lambda s: np.asarray(f(*moved(at, way, s)), np.float64)
    slope = (step(1e-3) - step(-1e-3)) / 2e-3
    assert np.linalg.norm(tangent - slope) < 5e-3 * np.linalg.norm(slope)
    grads = jax.jit(lambda *at: jax.vjp(f, *at)[1](put(out)))(*at)
    np.testing.assert_allclose(inner(grads, way), inner(out, tangent), rtol=1e-4)


@pytest.mark.slow
def test_gradient_of_sparse_linear_attention_is_the_slope():
    model, args = tiny(attention="sla"), batch()
    way = direction(model, 1)
    loss = jax.jit(jax.value_and_grad(lambda model, args: jnp.square(model(*args)).mean()))
    step = lambda s: float(loss(moved(model, way, s), args)[0])
    np.testing.assert_allclose(
        inner(loss(model, args)[1], way), (step(1e-3) - step(-1e-3)) / 2e-3, rtol=5e-3
    )


@pytest.mark.slow
def test_tangent_as_a_target_of_a_bfloat16_student():
    """The shape of a distillation step: the tangent in a constant target, beside the gradient of
    the weights."""
    model, (x, t, text, image) = (
        tiny(policy=dataclasses.replace(FLOAT32, compute="bfloat16")),
        batch(),
    )

    def loss(model):
        target = jax.lax.stop_gradient(
            jax.jvp(lambda x, t: model(x, t, text, image), (x, t), (x, jnp.ones(2)))[1]
        )
        return jnp.square(model(x, t, text, image) - target).mean()

    grads = jax.tree.leaves(jax.jit(jax.grad(loss))(model))
    assert all(np.isfinite(np.asarray(g, np.float32)).all() for g in grads) and all(
        g.dtype == jnp.float32 for g in grads
    )


@pytest.mark.slow
def test_timestep_is_rounded_and_its_derivative_is_not():
    """Compiled, where a cast to bfloat16 and back would be removed."""
    t = put([977.3, 104.8])
    coarse = t.astype(jnp.bfloat16).astype(jnp.float32)
    assert np.abs(coarse - t).max() > 0.1
    time = jax.jit(lambda model, t: jax.jvp(model.time, (t,), (jnp.full(2, 1.001),)))
    for actual, expected in zip(
        *map(jax.tree.leaves, (time(tiny(round_time=True), t), time(tiny(), coarse))), strict=True
    ):
        assert_close(actual, expected, "float32")


@pytest.mark.slow
def test_bfloat16_flows_between_float32_islands():
    model, args = tiny(), batch()
    half = jax.tree.map(lambda x: x, model)
    half.cfg = dataclasses.replace(TINY, policy=dataclasses.replace(FLOAT32, compute="bfloat16"))
    for block in (half.blocks, half.blocks.self_attn, half.blocks.cross_attn):
        block.cfg = half.cfg
    values = jax.jit(intermediates)(half, *args)
    islands = (
        "sinusoid",
        "e",
        "e0",
        "rope_freqs",
        "rope_cos",
        "rope_sin",
        "head_in",
        "head_out",
        "v",
    )
    for name, value in values.items():
        assert value.dtype == (jnp.float32 if name in islands else jnp.bfloat16), name
    v = np.asarray(run(model, *args))
    assert np.linalg.norm(values["v"] - v) < 2e-2 * np.linalg.norm(v)


def test_samples_of_a_batch_do_not_meet():
    model, args = tiny(), batch()
    others = tuple(a.at[1].multiply(0.5) for a in args)
    v, w = run(model, *args), run(model, *others)
    assert_close(w[0], v[0], "dit")
    assert np.abs(w[1] - v[1]).max() > 0.1


@pytest.mark.slow
def test_coordinates_tell_places_apart():
    model = tiny(in_channels=5, patch=(1, 1, 1), coordinates=True)
    assert model.cfg.task == "t2v" and model.patch_embed.kernel.shape == (8, 24)
    x, t, text, _ = batch()
    v = run(model, jnp.ones_like(x), t, text)
    assert np.abs(v[0, 0, 0, 0] - v[0, 1, 3, 5]).max() > 0.1  # a constant clip, and yet
    rows = rearrange(
        model.patchify(jnp.zeros_like(x), None)[0] - model.patch_embed.bias[...],
        "(t h w) d -> t h w d",
        t=2,
        h=4,
    )
    kernel = np.asarray(model.patch_embed.kernel[...])[5:]
    assert_close(rows[0, 0, 0], -kernel.sum(0), "float32")
    assert_close(rows[1, 3, 5], kernel.sum(0), "float32")
    assert_close(rows[0, 3, 0], [-1, 1, -1] @ kernel, "float32")
    assert_close(rows[0, 0, 1], [-1, -1, -0.6] @ kernel, "float32")


def names(tree):
    return {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.slow
@pytest.mark.parametrize(
    "linear, step", [("int8", 1 / 128), ("int8_channel", 0.5 / 127), ("fp8", 1 / 28)]
)
def test_blocks_of_8_bits_and_back(linear, step):
    model, args = tiny(dim=128, heads=2, ffn_dim=256, attention="sla"), batch()
    small = with_linear(model, linear)
    assert small.cfg.linear == linear and small.blocks.cfg == small.cfg
    assert jax.tree.structure(small) == jax.tree.structure(abstract(small.cfg))
    values, scale = LINEAR[linear].leaves
    assert names(small)[f"blocks.up.{values}"].shape == (2, 256, 128)
    assert names(small)[f"blocks.up.{scale}"].shape == {"int8": (2, 2, 1)}.get(linear, (2, 256))
    assert names(small)["blocks.self_attn.core.proj.kernel"].dtype == jnp.float32
    v = np.asarray(run(model, *args))
    assert np.linalg.norm(run(small, *args) - v) < 0.1 * np.linalg.norm(v)
    again = with_linear(small, "float")
    assert {n: x.shape for n, x in names(again).items()} == {
        n: x.shape for n, x in names(model).items()
    }
    for name, leaf in names(again).items():
        before = names(model)[name]
        assert np.abs(leaf - before).max() <= np.abs(before).max() * step * 1.001, name
    assert with_linear(model, "float") is model


def test_conversion_frees_what_it_replaces():
    model = tiny(dim=128, ffn_dim=128, attention="sla", linear="int8")
    before = names(model)
    after = names(with_linear(model, "int8_channel", free=True))
    assert (
        before["blocks.up.int8_weight"].is_deleted()
        and before["blocks.self_attn.o.scale"].is_deleted()
    )
    assert (
        not any(leaf.is_deleted() for leaf in after.values())
        and not before["blocks.up.bias"].is_deleted()
    )
    assert not before["blocks.self_attn.core.proj.kernel"].is_deleted()


def test_wrong_inputs_are_named():
    model, (x, t, text, image) = tiny(), batch()
    for message, args in {
        r"image is missing, but this model takes \('b', 't', 'h', 'w', 2\)": (x, t, text),
        "features is given, but this model takes none": (x, t, text, image, x),
        r"text has shape \(2, 4, 5\); expected \('b', 's', 6\)": (x, t, text[..., :5], image),
        r"timestep has shape \(2, 1\); expected \('b',\)": (x, t[:, None], text, image),
        r"latents of \(2, 3, 6\) frames, rows and columns are not multiples of the patch \(1, 2": (
            x[:, :, 1:],
            t,
            text,
            image[:, :, 1:],
        ),
    }.items():
        with pytest.raises(ValueError, match=message):
            model(*args)


def test_fourteen_billion_parameters_cost_nothing_until_they_are_loaded():
    model = abstract(WAN_14B)
    assert 14.2e9 < sum(x.size for x in jax.tree.leaves(model)) < 14.4e9
    assert {x.dtype for x in jax.tree.leaves(model)} == {jnp.dtype("bfloat16")}


@pytest.mark.slow
@pytest.mark.parametrize(
    "attention, linear", [("dense", "float"), ("sla", "int8"), ("sagesla", "float")]
)
def test_lowers_for_cuda_at_real_size(attention, linear):
    model = abstract(DiTConfig(attention=attention, linear=linear))
    arg = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    lowered = described.lower(
        described.trace(run, model, arg(1, 21, 60, 104, 16), arg(1), arg(1, 512, 4096))
    )
    assert lowered.out_info.shape == (1, 21, 60, 104, 16)
    assert (
        len(lowered.as_text()) < 1_000_000
    )  # kernels travel in it; a table of the size of the video would be 16 MB


@pytest.mark.slow
@pytest.mark.parametrize(
    ("attention", "linear"),
    [("dense", "float"), ("sla", "int8"), ("sagesla", "int8_channel"), ("sagesla", "fp8")],
)
def test_lowers_for_a_tpu_without_kernels(attention, linear):
    model = abstract(DiTConfig(layers=2, attention=attention, linear=linear))
    arg = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    traced = run.trace(model, arg(1, 5, 32, 32, 16), arg(1), arg(1, 512, 4096))
    assert "custom_call" not in traced.lower(lowering_platforms=("tpu",)).as_text()


def test_a_profile_speaks_the_models_language():
    model = abstract(DiTConfig(layers=2))
    arg = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    lowered = run.trace(model, arg(1, 5, 32, 32, 16), arg(1), arg(1, 512, 4096)).lower()
    text = lowered.as_text(debug_info=True)
    for scope in ("patch_embed", "time", "text_embed", "head", "block/norm", "block/mlp"):
        assert f"{scope}/" in text, scope
    for attention in ("self_attention", "cross_attention"):
        assert f"block/{attention}/core/" in text, attention


def traced(f, *args):
    """(the jaxpr of f, what it gives), traced once."""
    found = jit(f).trace(*args)
    return found.jaxpr, found.lower().compile()(*args)


CLIP = clip(1, 4, 4, b=1)


def loss(model):
    return jnp.sum(model(CLIP.latents, put([300.0]), CLIP.text) ** 2)


def derivatives(model):
    """Of the loss by the weights, and of the velocity along the latents."""
    of_input = lambda x: model(x, put([300.0]), CLIP.text)
    return jax.grad(loss)(model), jax.jvp(of_input, (CLIP.latents,), (CLIP.latents + 1,))


@pytest.fixture(scope="module")
def looped():
    """(a model, the jaxpr of its derivatives, these) with a loop over blocks, as usual."""
    model = dit(0)
    return model, *traced(derivatives, model)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["products", "offload"])
def test_what_is_kept_of_a_block_changes_no_gradient(looped, remat):
    """What a policy keeps is in the program: activations moved to the host, fewer products."""
    model, _, (usual, _) = looped
    program, gradient = traced(jax.grad(loss), dit(0, remat=remat))
    for a, b in zip(*map(jax.tree.leaves, (usual, gradient)), strict=True):
        assert_close(b, a, "float32")
    texts = str(jax.make_jaxpr(jax.grad(loss))(model)), str(program)
    plain, changed = (text.count("dot_general") for text in texts)
    assert changed < plain if remat == "products" else changed == plain
    assert ("Host" in texts[1]) == (remat == "offload") and "Host" not in texts[0]


@pytest.mark.slow
def test_a_loop_over_blocks_has_the_derivatives_of_blocks_one_by_one(looped):
    """Rows that a loop reads by number: their gradients are stacked by the loop, and no turn adds
    zeros of all blocks."""
    model, program, loop = looped
    _, written_out = traced(derivatives, dit(0, remat="none"))
    for a, b in zip(*map(jax.tree.leaves, (loop, written_out)), strict=True):
        assert_close(a, b, "float32")
    stacked = {x.shape for x in jax.tree.leaves(model.blocks)}
    found = equations(program.jaxpr)
    sums = {e.outvars[0].aval.shape for e in found if e.primitive.name in ("add", "add_any")}
    assert sums and not sums & stacked


def test_remat_of_older_files():
    assert [dataclasses.replace(TINY, remat=x).remat for x in (True, False)] == ["block", "none"]
    with pytest.raises(ValueError, match="remat is 'all'; allowed: none, block, products, offload"):
        dataclasses.replace(TINY, remat="all")
