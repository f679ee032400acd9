"""LoRA files put on a loaded transformer and taken off: the weights of the file with them merged,
the bits of before without."""

import dataclasses

import jax
import numpy as np
import pytest
import random_model
from arrays import put
from random_model import SMALL
from tolerances import assert_close

import tdjax
from convert.export import export
from convert.leaves import open_leaves
from tdjax.checkpoints import orbax
from tdjax.checkpoints.published.checkpoint import open_checkpoint
from tdjax.errors import CheckpointError, UsageError
from tdjax.models.wan_dit import with_linear
from tdjax.pipeline import adapters, memory
from tdjax.pipeline.adapters import Adapters, Chosen, choose
from tdjax.pipeline.components import open_component

CFG = dataclasses.replace(random_model.DIT, layers=3)
DIM, FFN = CFG.dim, CFG.ffn_dim


def noise(seed, *shape):
    return np.random.default_rng(seed).normal(0, 0.1, shape).astype(np.float32)


def pair(module, outputs, inputs, rank, seed):
    return {
        f"diffusion_model.{module}.lora_B.weight": noise(seed, outputs, rank),
        f"diffusion_model.{module}.lora_A.weight": noise(seed + 1, rank, inputs),
    }


LOW_RANK = {
    **pair("blocks.0.self_attn.q", DIM, DIM, 4, 0),
    **pair("blocks.2.self_attn.q", DIM, DIM, 2, 2),
    **pair("blocks.1.ffn.0", FFN, DIM, 4, 4),
    "diffusion_model.blocks.1.ffn.0.alpha": np.float32(2),
}
OTHERS = {
    **pair("head.head", 8, DIM, 4, 6),
    "diffusion_model.blocks.1.norm3.diff": noise(8, DIM),
    "diffusion_model.blocks.2.self_attn.k.diff_b": noise(9, DIM),
    "diffusion_model.blocks.0.modulation.diff": noise(10, 1, 6, DIM),
    "diffusion_model.blocks.1.cross_attn.v.lokr_w1": noise(11, 2, 2),
    "diffusion_model.blocks.1.cross_attn.v.lokr_w2": noise(12, DIM // 2, DIM // 2),
}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """The transformer as a published file."""
    folder = tmp_path_factory.mktemp("adapters")
    ours = random_model.dit_folder(folder / "dit", CFG)
    return export(open_leaves(ours), folder / "turbo.safetensors")


@pytest.fixture
def lora(tmp_path, write_safetensors):
    return lambda tensors, name="lora": (
        str(write_safetensors(tmp_path / f"{name}.safetensors", tensors)),
        0.5,
    )


def loaded(file, lora=()):
    opened = open_checkpoint(file, lora=lora)
    return opened.load(dataclasses.replace(opened.config, policy=CFG.policy))


def on(module, held, files):
    held.chosen = choose(files, module.cfg, low_noise=False)
    return held.merged(module)


def leaves(module):
    return {name: np.asarray(leaf) for name, leaf in orbax.named_leaves(module).items()}


@pytest.mark.parametrize("tensors", [LOW_RANK, OTHERS, LOW_RANK | OTHERS])
def test_merged_as_at_load(file, lora, tensors):
    files = (lora(tensors),)
    ours, expected = leaves(on(loaded(file), Adapters(), files)), leaves(loaded(file, files))
    plain = leaves(loaded(file))
    assert ours.keys() == expected.keys()
    changed = [name for name in ours if not np.array_equal(expected[name], plain[name])]
    assert len(changed) >= 2
    for name in ours:
        np.testing.assert_allclose(ours[name], expected[name], rtol=1e-5, atol=1e-6, err_msg=name)
        if name not in changed:
            np.testing.assert_array_equal(ours[name], plain[name], err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("linear", ["float", "int8", "int8_channel", "fp8"])
def test_off_is_as_never_on(file, lora, linear):
    """Bit by bit, also after several; two files at once are their sum."""
    module = with_linear(loaded(file), linear)
    before, held = leaves(module), Adapters()
    one, two = lora(LOW_RANK, "one"), lora(OTHERS | pair("blocks.0.self_attn.q", DIM, DIM, 3, 20))
    module = on(module, held, (one,))
    alone = leaves(module)
    same = lambda name: name in before and np.array_equal(before[name], alone[name])
    assert not all(map(same, alone))
    module = on(on(module, held, (one, two)), held, (one,))
    for name, leaf in leaves(module).items():
        np.testing.assert_array_equal(leaf, alone[name], err_msg=name)
    for name, leaf in leaves(on(module, held, ())).items():
        np.testing.assert_array_equal(leaf, before[name], err_msg=name)


@pytest.mark.parametrize("linear, bound", [("int8", 0.02), ("int8_channel", 0.02), ("fp8", 0.06)])
def test_weights_of_8_bits_are_quantised_again(file, lora, linear, bound):
    """For changes that are no product of two factors: values and scales mean the sum, to the
    rounding of the kind; layers that no file touches keep their bits."""
    files, plain = (lora(OTHERS),), with_linear(loaded(file), linear)
    before = leaves(plain)
    merged = on(plain, Adapters(), files)
    floats = with_linear(merged, "float")
    want = leaves(loaded(file, files))["blocks.cross_attn.v.kernel"]
    got = np.asarray(floats.blocks.cross_attn.v.kernel[...])
    assert np.linalg.norm(got - want) < bound * np.linalg.norm(want)
    values = next(
        name for name in before if name.startswith("blocks.cross_attn.v.") and "weight" in name
    )
    after = leaves(merged)[values]
    np.testing.assert_array_equal(after[0], before[values][0])
    assert not np.array_equal(after[1], before[values][1])


@pytest.mark.slow
@pytest.mark.parametrize("linear", ["int8", "int8_channel", "fp8"])
def test_low_rank_beside_weights_of_8_bits(file, lora, linear):
    """The product of two layers is that of the dequantised weights with the change added in
    float64, although the change is smaller than a step of them; the weights keep their bits."""
    tiny = {name: x * 0.02 if "lora_B" in name else x for name, x in LOW_RANK.items()}
    plain = with_linear(loaded(file), linear)
    before = leaves(plain)
    files = (lora(tiny, "one"), (lora(tiny, "two")[0], -0.25))
    module = on(plain, Adapters(), files)
    after = leaves(module)
    assert all(np.array_equal(before[name], after[name]) for name in before)
    added = {name: after[name].shape for name in after.keys() - before.keys()}
    rank, layers = adapters.LEAST_RANK, CFG.layers
    assert added == {
        "blocks.self_attn.q.low_rank_down": (layers, rank, DIM),
        "blocks.self_attn.q.low_rank_up": (layers, DIM, rank),
        "blocks.up.low_rank_down": (layers, rank, DIM),
        "blocks.up.low_rank_up": (layers, FFN, rank),
    }
    for block, key, scale in ((0, "self_attn.q", 1.0), (1, "ffn.0", 0.5)):
        one = jax.tree.map(lambda leaf, block=block: leaf[block], module.blocks)
        layer = one.up if key == "ffn.0" else one.self_attn.q
        x = layer.quantize_input(noise(30, 1, 7, DIM))
        read = np.float64(layer.dequantize(layer.rows(x.values, x.scale)))
        up, down = (
            np.float64(tiny[f"diffusion_model.blocks.{block}.{key}.lora_{k}.weight"]) for k in "BA"
        )
        change = (0.5 - 0.25) * scale * up @ down
        weight = np.float64(layer.unpacked(*(getattr(layer, name)[...] for name in layer.leaves)))
        step = np.abs(weight).max() / 127
        assert np.abs(change).max() < step / 2  # of which a merge would leave next to nothing
        got = np.asarray(layer(x), np.float64)[0] - np.asarray(layer.bias[...])
        assert_close(got, read @ (weight + change).T, "float32")
    one = jax.tree.map(lambda leaf: leaf[1], module.blocks)  # a block that no file changes
    x = one.self_attn.q.quantize_input(noise(30, 1, 7, DIM))
    narrow, up = one.self_attn.q.low_rank(x)
    assert not np.asarray(narrow[0] @ up.T).any()


def test_ranks_have_few_programs_and_strengths_none(file, lora):
    """Files of other strengths, and of other ranks up to the same power of two, make networks of
    one structure; off is that of never."""
    structure = lambda module: (
        jax.tree.structure(module),
        [x.shape for x in jax.tree.leaves(module)],
    )
    module = with_linear(loaded(file), "int8_channel")
    never, held, seen = structure(module), Adapters(), []
    for files in (
        (lora(LOW_RANK, "one"),),
        ((lora(LOW_RANK, "one")[0], 1.7),),
        (lora(LOW_RANK, "one"), lora(pair("blocks.2.self_attn.q", DIM, DIM, 9, 20), "two")),
    ):
        module = on(module, held, files)
        seen.append(structure(module))
        abstract = held.abstract(orbax.abstract("dit", module.cfg))
        assert structure(abstract) == seen[-1]
    assert seen[0] == seen[1] == seen[2] != never
    assert structure(on(module, held, ())) == never


def test_two_experts_share_their_ranks(file, lora):
    """One program runs both: the layers that either file changes have factors in both, of zeros
    where there is nothing."""
    components = {name: open_component(file, "dit") for name in ("dit", "dit_low")}
    for component in components.values():
        cfg = dataclasses.replace(component.stored, policy=CFG.policy, linear="int8_channel")
        component.config = cfg
    high = lora(pair("blocks.0.self_attn.q", DIM, DIM, 20, 0), "high")
    low = lora(pair("blocks.1.ffn.0", FFN, DIM, 4, 4), "low")
    adapters.adapt(components, (), high, low)
    first, second = (component.load() for component in components.values())
    assert jax.tree.structure(first) == jax.tree.structure(second)
    shapes = [[x.shape for x in jax.tree.leaves(module)] for module in (first, second)]
    assert shapes[0] == shapes[1]
    zeros = leaves(second)["blocks.self_attn.q.low_rank_up"]
    assert zeros.shape[-1] == 32 and not zeros.any()


def test_the_second_product_of_rank_64_at_14b_takes_few_operations():
    """Beside those of the layers alone, without attention's own."""
    dim, ffn = 5120, 13824
    layers = [(dim, dim)] * 6 + [(dim, ffn), (ffn, dim)]  # those that video tokens pass
    more = sum(64 * (i + o) for i, o in layers) / sum(i * o for i, o in layers)
    assert more < 0.06


@pytest.mark.parametrize("at", [0, 1])
def test_an_interrupt_leaves_the_files_of_before(file, lora, monkeypatch, at):
    """Whichever leaf it comes at: the next call loads the network anew, and off is as never on."""
    component = open_component(file, "dit")
    component.config = dataclasses.replace(component.stored, policy=CFG.policy)
    plain = leaves(component.load())
    one, two = lora(LOW_RANK, "one"), lora(pair("blocks.0.self_attn.q", DIM, DIM, 3, 20), "two")
    first, second = (choose(files, CFG, low_noise=False) for files in ((one,), (one, two)))
    component.adapt(first)
    alone, calls, added = leaves(component.load()), iter(range(9)), adapters._added

    def interrupted(*args, **kind):
        if next(calls) == at:
            raise KeyboardInterrupt
        return added(*args, **kind)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(adapters, "_added", interrupted)
        component.adapt(second)
    assert component.module is None and component.adapters.chosen is first
    for expected in (alone, plain):
        for name, leaf in leaves(component.load()).items():
            np.testing.assert_array_equal(leaf, expected[name], err_msg=name)
        component.adapt(Chosen((), [], {}))


def test_no_leaf_is_held_twice(file, lora):
    """What is replaced is deleted, both as files come and as they go."""
    module, held = loaded(file), Adapters()
    for files in ((lora(LOW_RANK | OTHERS),), ()):
        before = orbax.named_leaves(module)
        module = on(module, held, files)
        after = orbax.named_leaves(module)
        replaced = [name for name in before if before[name] is not after[name]]
        assert "blocks.self_attn.q.kernel" in replaced and "head.proj.kernel" in replaced
        assert all(before[name].is_deleted() for name in replaced)


@pytest.mark.parametrize("linear", ["float", "int8_channel"])
@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_a_file_that_is_not_finite_is_named_by_its_layer(file, lora, linear, factor):
    damaged = {name: x.copy() for name, x in LOW_RANK.items()}
    damaged[f"diffusion_model.blocks.2.self_attn.q.{factor}.weight"][1, 1] = np.inf
    with pytest.raises(CheckpointError, match="blocks.2.self_attn.q holds NaN or infinity"):
        on(with_linear(loaded(file), linear), Adapters(), (lora(damaged),))


@pytest.mark.parametrize(
    "linear, down, up, message",
    [
        ("float", 1e30, 1e30, "q: its values are too large"),
        ("int8_channel", 1e30, 3e38, "q: its values are too large"),
        ("float", 1e-30, 3e38, "q.*: a LoRA is too strong"),
        ("int8_channel", 1e-30, 3e38, "q.*: a LoRA is too strong"),
    ],
)
def test_a_file_whose_numbers_are_too_large_is_refused(file, lora, linear, down, up, message):
    """Finite factors whose product is not, and those that the strength makes infinite."""
    damaged = {name: x.copy() for name, x in LOW_RANK.items()}
    layer = "diffusion_model.blocks.2.self_attn.q"
    damaged[f"{layer}.lora_A.weight"][...] = down
    damaged[f"{layer}.lora_B.weight"][...] = up
    with pytest.raises(CheckpointError, match=message):
        on(with_linear(loaded(file), linear), Adapters(), ((lora(damaged)[0], 8.0),))


@pytest.mark.parametrize("dtypes", [("bfloat16", "bfloat16"), ("float16", "bfloat16")])
def test_factors_of_16_bits_are_those_of_the_file(file, lora, dtypes):
    """Also of two files of other dtypes at once: a scale is multiplied in float32."""
    cast = lambda dtype: {name: x.astype(dtype) for name, x in LOW_RANK.items()}
    files = [lora(cast(np.dtype(dtype)), f"{n}") for n, dtype in enumerate(dtypes)]
    module = on(with_linear(loaded(file), "int8_channel"), Adapters(), tuple(files))
    up, down = (leaves(module)[f"blocks.up.low_rank_{which}"][1] for which in ("up", "down"))
    change = sum(
        0.5
        * 0.5
        * np.float64(own["diffusion_model.blocks.1.ffn.0.lora_B.weight"])
        @ np.float64(own["diffusion_model.blocks.1.ffn.0.lora_A.weight"])
        for own in map(cast, map(np.dtype, dtypes))
    )
    assert_close(np.float64(up) @ np.float64(down), change, "float32")


def test_a_network_is_copied_to_the_host_once(file, lora):
    """The leaves as they were stay there from one file to the next."""
    one, two = lora(LOW_RANK, "one"), lora(LOW_RANK, "two")
    module, held = loaded(file), Adapters()
    before = leaves(module)
    module = on(module, held, (one,))
    kept = dict(held._base)
    module = on(module, held, (two,))
    assert held._base.keys() == kept.keys()
    assert all(held._base[name] is kept[name] for name in kept)
    module = on(module, held, ())
    assert not held._base
    assert all(np.array_equal(leaf, before[name]) for name, leaf in leaves(module).items())


@pytest.mark.parametrize("linear", ["float", "int8_channel"])
def test_another_file_in_its_place_compiles_nothing(file, lora, caplog, linear):
    """Also where the leaves were not bound to a device when they were loaded."""
    one, two = lora(LOW_RANK, "one"), lora(LOW_RANK, "two")
    module, held = with_linear(loaded(file), linear), Adapters()
    module = jax.tree.map(lambda x: put(np.asarray(x)), module)
    assert not jax.tree.leaves(module)[0].committed
    module = on(module, held, (one,))
    with jax.log_compiles():
        on(module, held, (two,))
    assert "XLA compilation" not in caplog.text


def test_nothing_fits(lora):
    with pytest.raises(CheckpointError, match="have no tensor in the base model"):
        choose((lora(pair("blocks.9.ffn.0", FFN, DIM, 4, 0)),), CFG, low_noise=False)


@pytest.mark.slow
def test_a_pipeline_switches_without_compiling(model, lora):
    pipe = tdjax.load(model)
    make = lambda: pipe("a red circle", output_type="latent", **SMALL)
    plain, compiled = make(), len(pipe.programs.compiled)
    file, strength = lora(pair("blocks.0.ffn.0", FFN, DIM, 4, 0))
    pipe.set_loras((file, strength))
    changed = make()
    assert changed.metadata["lora"] == {"dit": [["lora.safetensors", 0.5]]}
    assert not np.array_equal(changed.latents, plain.latents)
    pipe.free("dit")  # loaded again, with it
    assert np.array_equal(make().latents, changed.latents)
    opened = tdjax.load(model, lora=[(file, strength)])  # the model is in our own layout
    begun = opened("a red circle", output_type="latent", **SMALL)
    assert np.array_equal(begun.latents, changed.latents)
    assert begun.metadata["lora"] == changed.metadata["lora"]
    pipe.set_loras()
    again = make()
    assert np.array_equal(again.latents, plain.latents) and again.metadata["lora"] == {}
    assert len(pipe.programs.compiled) == compiled
    for put_on in (pipe.set_loras, lambda lora: tdjax.load(model, lora=lora)):
        with pytest.raises(CheckpointError, match="does not exist"):
            put_on("nothing.safetensors")
        for weight in (float("nan"), float("inf"), -1e9):
            with pytest.raises(UsageError, match="the weight of lora is"):
                put_on((file, weight))
    for name in ("lora_high", "lora_low"):
        for put_on in (pipe.set_loras, lambda **given: tdjax.load(model, **given)):
            with pytest.raises(UsageError, match="with one transformer"):
                put_on(**{name: file})
    assert isinstance(pipe.components["dit"].adapters.chosen, Chosen)
    assert jax.tree.leaves(pipe.components["dit"].load())


@pytest.mark.slow
def test_a_pipeline_of_8_bits(model, tmp_path, lora):
    """Files of a load stay beside stored 8-bit weights; another strength has no program of its own,
    off is as never on, and streamed blocks give the same."""
    cfg = dataclasses.replace(CFG, attention="dense", layers=2)
    floats = random_model.with_dit(model, tmp_path / "floats", cfg)
    opened = open_component(floats / "dit", "dit")
    module = with_linear(opened.load(), "int8_channel")
    source = {"name": "test"}
    orbax.save(tmp_path / "ours", leaves(module), kind="dit", cfg=module.cfg, source=source)
    quant = export(open_leaves(tmp_path / "ours"), tmp_path / "quant.safetensors")
    one = lora({n: x for n, x in LOW_RANK.items() if "blocks.2" not in n}, "one")
    two = lora(pair("blocks.1.ffn.2", DIM, FFN, 4, 30), "two")
    call = {"output_type": "latent", "num_steps": 2, **SMALL}
    pipe = tdjax.load(floats, dit_path=quant, lora=one)
    dit = pipe.components["dit"]
    assert (dit.lora, dit.beside, dit.adapters.chosen.files) == ((), (one,), (one,))
    planned = lambda pipe: pipe.plan(pipe.request("a", **call)).of("dit")
    with_one = pipe("a", **call)
    assert with_one.metadata["lora"] == {"dit": [["one.safetensors", 0.5]]}
    assert planned(pipe).weights == memory.module_bytes(dit.load()) > memory.module_bytes(module)
    pipe.set_loras(two)
    both = pipe("a", **call)
    assert planned(pipe).weights == memory.module_bytes(dit.load())
    compiled = len(pipe.programs.compiled)
    pipe.set_loras((two[0], 0.1))
    assert not np.array_equal(pipe("a", **call).latents, both.latents)
    assert len(pipe.programs.compiled) == compiled
    pipe.set_loras()
    assert np.array_equal(pipe("a", **call).latents, with_one.latents)
    streamed = tdjax.load(floats, dit_path=quant, transformer_device="stream", lora=one)
    assert_close(streamed("a", **call).latents, with_one.latents, "float32")
    assert planned(streamed).host == memory.module_bytes(streamed.components["dit"].load().blocks)
