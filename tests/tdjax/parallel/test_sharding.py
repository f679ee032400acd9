import dataclasses
import functools
import json
import math
import re

import eight_devices_step
import hosts_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import put
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, NamedSharding, use_abstract_mesh
from jax.sharding import PartitionSpec as P
from random_model import random_leaves
from tolerances import assert_close

from tdjax.bench.stages import with_random_lora
from tdjax.checkpoints import orbax
from tdjax.config import DiTConfig, SLAConfig, TextConfig, VAEConfig
from tdjax.models.abstract import as_shapes
from tdjax.models.linear import LINEAR
from tdjax.models.umt5 import UMT5
from tdjax.models.wan_dit import DiT, with_linear
from tdjax.models.wan_vae import VAE
from tdjax.parallel import sharding
from tdjax.parallel.sharding import (
    PARAM_AXES,
    RULES,
    axes_of,
    constrain,
    halves,
    leaf_name,
    missing_tokens,
    over_heads,
    over_queries,
    shardings,
    spec,
    twice,
)
from tdjax.precision import FLOAT32

TINY = DiTConfig(
    dim=256,
    heads=4,
    ffn_dim=384,
    layers=2,
    freq_dim=32,
    text_dim=24,
    text_len=8,
    policy=FLOAT32,
    sla=SLAConfig(topk=0.5),
)
MODELS = {
    "dense": (DiT, TINY),
    "sla": (DiT, dataclasses.replace(TINY, attention="sla")),
    "int8": (DiT, dataclasses.replace(TINY, attention="sla", linear="int8")),
    "channel": (
        DiT,
        dataclasses.replace(TINY, in_channels=36, image_dim=40, linear="int8_channel"),
    ),
    "fp8": (DiT, dataclasses.replace(TINY, attention="sla", linear="fp8")),
    "lora": (with_random_lora, dataclasses.replace(TINY, linear="int8_channel")),
    "image": (DiT, dataclasses.replace(TINY, in_channels=36, image_dim=40)),
    "image int8": (DiT, dataclasses.replace(TINY, in_channels=36, image_dim=40, linear="int8")),
    "text": (UMT5, TextConfig(vocab=64, dim=32, attention_dim=32, ffn_dim=48, heads=4, layers=2)),
    "vae": (VAE, VAEConfig(dim=8)),
}


def mesh(**axes):
    return jax.make_mesh(
        tuple(axes.values()), tuple(axes), axis_types=(jax.sharding.AxisType.Auto,) * len(axes)
    )


def abstract(name):
    make, cfg = MODELS[name]
    if name != "lora":
        return as_shapes(make, cfg)
    return jax.eval_shape(functools.partial(make, rank=4), as_shapes(DiT, cfg))


def leaves(name):
    paths = jax.tree_util.tree_leaves_with_path(abstract(name))
    return {leaf_name(path): leaf for path, leaf in paths}


@pytest.mark.parametrize("name", MODELS)
def test_every_leaf_matches_exactly_one_row(name):
    for leaf, value in leaves(name).items():
        axes = axes_of(leaf)
        assert len(axes) <= value.ndim, leaf
        assert all(axis is None or axis in RULES for axis in axes), leaf


def test_every_row_is_needed():
    names = {leaf for name in MODELS for leaf in leaves(name)}
    for pattern, _ in PARAM_AXES:
        assert any(re.fullmatch(pattern, name) for name in names), pattern


def test_unknown_leaf_is_an_error():
    with pytest.raises(
        ValueError,
        match=(
            "leaf blocks.norm9x must match exactly one row of"
            " tdjax.parallel.sharding.PARAM_AXES; matches: none"
        ),
    ):
        axes_of("blocks.norm9x")


def test_axes_that_are_missing_or_do_not_divide_are_left_whole():
    assert spec((2, 64, 96), ("n", "embed", "heads"), {"fsdp": 2, "tensor": 4}) == P(
        None, "fsdp", "tensor"
    )
    assert spec((2, 64, 96), ("n", "embed", "heads"), {"tensor": 4}) == P(None, None, "tensor")
    assert spec((2, 64, 97), ("n", "embed", "heads"), {"fsdp": 2, "tensor": 4}) == P(
        None, "fsdp", None
    )
    sizes = {"data": 2, "fsdp": 2, "tensor": 3, "seq": 2}
    axes = ("batch", "tokens", "heads", None)
    assert spec((4, 10, 6, 8), axes, sizes) == P(("data", "fsdp"), "seq", "tensor", None)
    assert spec((2, 9, 6, 8), axes, sizes) == P("data", None, "tensor", None)


def test_only_a_doubled_batch_is_divided_by_guidance():
    lies = lambda rows, **sizes: spec((rows, 3), ("batch",), sizes)[0]
    assert lies(2, guidance=2) == "guidance" and lies(1, guidance=2) is None
    assert lies(4, guidance=2, data=2) == ("data", "guidance")
    assert lies(2, guidance=2, fsdp=2) == "guidance" and lies(2, fsdp=2) == "fsdp"
    for copies in (2, 4):
        assert lies(copies, guidance=2, data=copies) == "data"


def test_halves_of_a_doubled_batch():
    x = jnp.arange(12.0).reshape(4, 3)
    double = jax.jit(twice)
    whole = double(x)
    with jax.set_mesh(mesh(data=2, guidance=2)):
        doubled = jax.jit(twice)(x)
        parts = jax.jit(halves)(doubled)
        plain = jax.jit(halves)(whole)
    assert np.array_equal(doubled, whole) and doubled.sharding.spec[0] == ("data", "guidance")
    for part in (*parts, *plain, *halves(twice(x))):
        assert np.array_equal(part, x)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 16])
def test_tiles_end_with_the_samples_of_a_device(rank):
    """150 tokens are two tiles of each sample, whatever the other one holds."""
    rngs = nnx.Rngs(0)
    layer = LINEAR["int8"](256, 384, FLOAT32, rngs=rngs)
    if rank:
        layer.low_rank_down = nnx.Variable(rngs.params.normal((rank, 256)) / 16)
        layer.low_rank_up = nnx.Variable(rngs.params.normal((384, rank)) / 4)
    x = np.random.default_rng(0).normal(size=(2, 150, 256)).astype(np.float32)
    x *= np.float32([1.0, 9.0])[:, None, None]
    alone = np.concatenate([jax.jit(lambda layer, x: layer(x))(layer, row[None]) for row in x])
    with jax.set_mesh(mesh(data=2, seq=2)):
        rows = jax.jit(lambda layer, x: layer.quantize_input(x).scale)(layer, x)
        made = jax.jit(lambda layer, x: layer(x))(layer, x)
    assert rows.shape == (2 * 2, 2)
    assert np.linalg.norm(made - alone) < 1e-5 * np.linalg.norm(alone)


def test_without_a_mesh_constrain_is_the_identity():
    x = jnp.ones((2, 3))
    assert constrain(x, "batch", None) is x


def test_constrain_lays_out_activations():
    with jax.set_mesh(mesh(data=2, seq=2)):
        y = jax.jit(lambda x: constrain(x, "batch", "tokens", None))(jnp.ones((2, 4, 3)))
        odd = jax.jit(lambda x: constrain(x, "batch", "tokens", None))(jnp.ones((3, 5, 3)))
    assert y.sharding.spec == P("data", "seq")
    assert odd.sharding.is_fully_replicated


def random_model(name):
    draw = np.random.default_rng(0).normal
    value = lambda leaf: put((draw(size=leaf.shape) / 16).astype(leaf.dtype))
    return jax.tree.map(value, abstract(name))


def sharded_and_whole(run, model, *args, **axes):
    """run(model, *args) on a mesh of these axes, and without one."""
    whole, devices = run(model, *args), mesh(**axes)
    with jax.set_mesh(devices):
        return run(jax.device_put(model, shardings(model, devices)), *args), whole


def with_impl(model, impl):
    """The same weights under another `impl`."""
    abstract = as_shapes(DiT, dataclasses.replace(model.cfg, impl=impl))
    return jax.tree.unflatten(jax.tree.structure(abstract), jax.tree.leaves(model))


@pytest.fixture
def inputs():
    normal = lambda seed, *shape: put(np.random.default_rng(seed).normal(size=shape), jnp.float32)
    return normal(1, 2, 2, 16, 18, 16), put([999.0, 417.5]), normal(2, 2, 8, 24)


@pytest.mark.slow
def test_sharded_forward_equals_the_unsharded_one(inputs):
    """Tokens and heads divided: heads take over the devices of the tokens inside attention."""
    model, devices = random_model("sla"), mesh(tensor=2, seq=2)
    split = jax.device_put(model, shardings(model, devices))
    assert {shard.data.shape for shard in split.blocks.up.kernel[...].addressable_shards} == {
        (2, 256, 192)
    }
    actual, whole = sharded_and_whole(
        jax.jit(lambda model, *args: model(*args)), model, *inputs, tensor=2, seq=2
    )
    assert len(actual.sharding.device_set) == 4
    assert np.abs(np.asarray(whole)).max() > 0.1
    assert_close(actual, whole, "dit")


SIZES_ONTO = (64, 256), (64, 384), (1, 384)  # tokens and channels of x, a stream and its gate


@pytest.mark.slow
@pytest.mark.parametrize("linear, impl", [("int8_channel", "interpret"), ("int8", "auto")])
def test_sharded_layers_of_8_bits(inputs, linear, impl):
    """Kernels see their part, against the reference of the whole; rows keep their scales. A last
    bit may move a value over an edge, and that moves the next layer's."""
    model, run = with_linear(random_model("dense"), linear), jax.jit(lambda model, *x: model(*x))
    whole = np.asarray(run(with_impl(model, "reference"), *inputs))
    split, devices = with_impl(model, impl), mesh(data=2, seq=2)
    with jax.set_mesh(devices):
        actual = np.asarray(run(jax.device_put(split, shardings(split, devices)), *inputs))
    assert np.linalg.norm(actual - whole) < 1e-2 * np.linalg.norm(whole)


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("axes", [{"seq": 2, "tensor": 2}, {"data": 2, "seq": 2}])
def test_a_layer_adds_itself_to_a_divided_stream(axes, samples):
    """One sample's gate is that of all rows; of two each has its own, and is added after it."""
    layer = LINEAR["int8_channel"](256, 384, FLOAT32, rngs=nnx.Rngs(0), impl="interpret")
    normal = lambda seed, *shape: np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    x, stream, gate = (normal(i, samples, n, o) for i, (n, o) in enumerate(SIZES_ONTO))
    run = jax.jit(lambda layer, *arrays: layer.onto(*arrays))
    with jax.set_mesh(mesh(**axes)):
        divided = np.asarray(run(layer, stream, x, gate))
    whole = run(layer, stream, x, gate)
    expected = stream + np.asarray(jax.jit(lambda layer, x: layer(x))(layer, x)) * gate
    assert np.linalg.norm(whole - expected) < 1e-6 * np.linalg.norm(expected)
    assert np.linalg.norm(divided - whole) < 1e-6 * np.linalg.norm(whole)


@pytest.mark.slow
def test_sharded_gradient_equals_the_unsharded_one(inputs):
    """Through rows divided by samples and tokens: what they share sums its gradient over the
    devices."""
    model = random_model("dense")
    grad = jax.jit(jax.grad(lambda model, *args: jnp.square(model(*args)).mean()))
    actual, whole = sharded_and_whole(grad, model, *inputs, data=2, seq=2)
    for (path, a), w in zip(
        jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(whole), strict=True
    ):
        a, w = np.asarray(a), np.asarray(w)
        assert np.linalg.norm(a - w) <= 1e-4 * np.linalg.norm(w), leaf_name(path)


@pytest.mark.slow
@pytest.mark.parametrize("linear, rank", [*((kind, 0) for kind in LINEAR), ("int8_channel", 16)])
def test_divided_weights_give_the_same_layer(linear, rank):
    """An MLP's two layers, divided over width and features: both operands of each product are in
    parts. rank: of factors of LoRA files beside them."""
    cfg = dataclasses.replace(TINY, linear=linear)

    class Pair(nnx.Module):
        def __init__(self):
            up, down = nnx.Rngs(0), nnx.Rngs(1)
            self.blocks = nnx.Dict(
                up=LINEAR[linear](256, 384, cfg.policy, rngs=up),
                down=LINEAR[linear](384, 256, cfg.policy, rngs=down),
            )
            for layer, i, o in (("up", 256, 384), ("down", 384, 256)) if rank else ():
                self.blocks[layer].low_rank_down = nnx.Variable(up.params.normal((rank, i)) / 16)
                self.blocks[layer].low_rank_up = nnx.Variable(up.params.normal((o, rank)) / 4)

        def __call__(self, x):
            return self.blocks["down"](self.blocks["up"](x))

    pair, x = (
        jax.jit(Pair)(),
        put(np.random.default_rng(0).normal(size=(2, 150, 256)), jnp.float32),
    )
    run = jax.jit(lambda pair, x: pair(constrain(x, "batch", "tokens", None)))
    whole = np.asarray(run(pair, x))
    devices = mesh(fsdp=2, tensor=2)

    def place(path, leaf):
        axes = axes_of(leaf_name(path))[1:]  # not stacked here
        return jax.device_put(
            leaf, NamedSharding(devices, spec(leaf.shape, axes, dict(devices.shape)))
        )

    with jax.set_mesh(devices):
        split = jax.tree_util.tree_map_with_path(place, pair)
        assert {
            shard.data.size for shard in jax.tree.leaves(split.blocks["up"])[-1].addressable_shards
        } <= {256 * 96, 4, 6, 256, 384}
        actual = np.asarray(run(split, x))
    assert np.linalg.norm(actual - whole) < 1e-5 * np.linalg.norm(
        whole
    )  # an int8 value on a rounding edge may move


@pytest.mark.parametrize("heads", [8, 6, 3])
@pytest.mark.parametrize("tokens", [12, 10])
def test_heads_and_tokens_that_do_not_divide_are_filled_up(heads, tokens):
    """Over four devices every head sees all tokens of the clip and no others."""
    q, k, v = (
        put(np.random.default_rng(i).normal(size=(2, tokens, heads, 4)), jnp.float32)
        for i in range(3)
    )
    op = lambda q, k, v: jax.nn.dot_product_attention(q, k, v)
    whole = jax.jit(op)(q, k, v)
    with jax.set_mesh(mesh(seq=4)):
        fill = missing_tokens(tokens)
        assert (tokens + fill) % 4 == 0 and fill < 4
        rows = lambda x: jnp.pad(x, ((0, 0), (0, fill), (0, 0), (0, 0)), constant_values=9.0)
        run = jax.jit(lambda *x: over_heads(op, *map(rows, x), tokens=tokens))
        filled = run(q, k, v)
    assert filled.shape[1] == tokens + fill
    assert_close(filled[:, :tokens], whole, "float32")


def test_queries_stay_where_they_are():
    q, kv = jnp.ones((1, 8, 4, 4)), jnp.ones((1, 5, 4, 4))
    op = lambda q, k, v: jax.nn.dot_product_attention(q, k, v)
    here = mesh(seq=4)
    with jax.set_mesh(here):
        lies = NamedSharding(here, P(None, "seq"))
        program = jax.jit(lambda *x: over_queries(op, *x), in_shardings=(lies, None, None))
        text = program.lower(q, kv, kv).compile().as_text()
    assert not re.findall(r" (all-gather|all-to-all|all-reduce|collective-permute)", text)


@pytest.mark.slow
@pytest.mark.parametrize(
    "attention, linear, impl",
    [("sla", "float", "auto"), ("sagesla", "int8_channel", "interpret")],
)
def test_blocks_that_lie_whole_on_each_device(monkeypatch, attention, linear, impl):
    """180 tokens are filled up to 256 in blocks of 64. Means of blocks are taken where tokens lie,
    heads change devices in groups as kernels write them, and nothing of it changes a call. A block
    has five exchanges: v, k, q, the means, and what comes of them."""
    monkeypatch.setattr(sharding, "MOST_FILL", 1.0)
    sla = SLAConfig(topk=0.5, block_q=64, block_k=64)
    kinds = {"attention": attention, "linear": "float", "impl": impl, "sla": sla}
    cfg = dataclasses.replace(TINY, **kinds)
    leaves = jax.device_put(random_leaves("dit", cfg, 0))
    model = with_linear(orbax.assemble(orbax.abstract("dit", cfg), leaves), linear)
    rng = np.random.default_rng(0)
    draw = lambda *shape: put(rng.normal(size=shape), jnp.float32)
    args = draw(1, 3, 12, 20, 16), jnp.full(1, 500.0), draw(1, 8, 24)
    step = lambda model, x, t, text: model.velocity(x, t, model.text_kv(text))
    one = jax.jit(step)(model, *args)
    here = mesh(seq=4)
    whole = NamedSharding(here, P())
    placed = jax.device_put((model, *args), whole)
    with jax.set_mesh(here):
        assert missing_tokens(180, 64) == 76
        program = jax.jit(step, out_shardings=whole).lower(*placed).compile()
    distance = np.linalg.norm(program(*placed) - one) / np.linalg.norm(one)
    assert distance < (1e-5 if linear == "float" else 1e-3)  # an int8 value on an edge may move
    bodies = re.split(r"\n(?=%|ENTRY)", program.as_text())
    exchanges = [re.findall(r" (all-[\w-]+|collective-permute)\(", body) for body in bodies]
    (of_block,) = [found for found in exchanges if "all-to-all" in found]
    assert of_block == 5 * ["all-to-all"]


@pytest.mark.parametrize("tokens, devices", [(32760, 2), (75600, 2), (75600, 8), (32760, 8)])
def test_tokens_are_filled_up_to_whole_blocks_where_that_is_little(tokens, devices):
    here = AbstractMesh((devices,), ("seq",), axis_types=(AxisType.Auto,))
    with use_abstract_mesh(here):
        fill = missing_tokens(tokens, 128)
        assert (tokens + fill) % (devices * 128) == 0 and fill < tokens / 64
        assert missing_tokens(100, 128) == -100 % devices  # where it is much: equal shares
        assert missing_tokens(tokens) == -tokens % devices  # where attention has no blocks


@pytest.mark.slow
def test_a_step_exchanges_heads_for_tokens_in_a_block_and_gathers_its_result():
    """q, k and v, and what attention gives back, once each; cross-attention, norms and layers move
    nothing. The loop over blocks is one body of the program."""
    cfg = dataclasses.replace(TINY, attention="sla", heads=2, dim=256)
    model = jax.eval_shape(lambda: DiT(cfg, rngs=nnx.Rngs(0)))
    here = mesh(seq=4)
    whole = NamedSharding(here, P())
    model, x, t, text = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole),
        (
            model,
            jnp.zeros((1, 3, 8, 8, 16)),
            jnp.zeros(1),
            jnp.zeros((1, 8, 24)),
        ),
    )
    step = lambda model, x, t, text: model.velocity(x, t, model.text_kv(text))
    with jax.set_mesh(here):
        program = jax.jit(step, out_shardings=whole).lower(model, x, t, text).compile()
    found = re.findall(
        r"= (.+?) (all-[\w-]+|collective-permute|reduce-scatter)\(", program.as_text()
    )
    assert sorted(kind for _, kind in found) == ["all-gather", *4 * ["all-to-all"]]
    (gathered,) = [shape for shape, kind in found if kind == "all-gather"]
    sizes = map(int, re.match(r"f32\[([\d,]+)\]", gathered)[1].split(","))
    assert math.prod(sizes) == x.size


@pytest.mark.slow
def test_a_step_over_eight_devices(tmp_path):
    """Equal to one device; a block sends q, k, v and what comes of them once, a share of the tokens
    each, and the whole stream is gathered nowhere."""
    done = hosts_cases.output(eight_devices_step.__file__, tmp_path, devices=8)
    out = json.loads(done.splitlines()[-1])
    cfg, tokens = eight_devices_step.CFG, 48
    assert_close(out["error"], 0.0, "float32")
    parts = [size for kind, size in out["exchanges"] if kind == "all-to-all"]
    assert parts == 4 * [tokens // 8 * cfg.head_dim]  # of one of eight heads, for each device
    others = [size for kind, size in out["exchanges"] if kind != "all-to-all"]
    assert len(others) == 1 and others[0] < tokens * cfg.dim  # the result
