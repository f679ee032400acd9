"""LoRA files put on a loaded transformer and taken off: the weights of the file with them merged,
the bits of before without."""

import dataclasses

import jax
import numpy as np
import pytest
import random_model
from random_model import SMALL

import tdjax
from convert.export import export
from convert.leaves import open_leaves
from tdjax.checkpoints import orbax
from tdjax.checkpoints.published.checkpoint import open_checkpoint
from tdjax.errors import CheckpointError
from tdjax.models.wan_dit import with_linear
from tdjax.pipeline import adapters
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


@pytest.mark.parametrize("linear", ["float", "int8", "int8_channel", "fp8"])
def test_off_is_as_never_on(file, lora, linear):
    """Bit by bit, also after several; two files at once are their sum."""
    module = with_linear(loaded(file), linear)
    before, held = leaves(module), Adapters()
    one, two = lora(LOW_RANK, "one"), lora(OTHERS | pair("blocks.0.self_attn.q", DIM, DIM, 3, 20))
    module = on(module, held, (one,))
    alone = leaves(module)
    assert any(not np.array_equal(before[name], alone[name]) for name in before)
    module = on(on(module, held, (one, two)), held, (one,))
    for name, leaf in leaves(module).items():
        np.testing.assert_array_equal(leaf, alone[name], err_msg=name)
    for name, leaf in leaves(on(module, held, ())).items():
        np.testing.assert_array_equal(leaf, before[name], err_msg=name)


@pytest.mark.parametrize("linear, bound", [("int8", 0.02), ("int8_channel", 0.02), ("fp8", 0.06)])
def test_weights_of_8_bits_are_quantised_again(file, lora, linear, bound):
    """Values and scales mean the sum, to the rounding of the kind; layers that no file touches keep
    their bits."""
    files, plain = (lora(LOW_RANK),), with_linear(loaded(file), linear)
    before = leaves(plain)
    merged = on(plain, Adapters(), files)
    floats = with_linear(merged, "float")
    want = leaves(loaded(file, files))["blocks.self_attn.q.kernel"]
    got = np.asarray(floats.blocks.self_attn.q.kernel[...])
    assert np.linalg.norm(got - want) < bound * np.linalg.norm(want)
    values = next(
        name for name in before if name.startswith("blocks.self_attn.q.") and "weight" in name
    )
    after = leaves(merged)[values]
    np.testing.assert_array_equal(after[1], before[values][1])
    assert not np.array_equal(after[0], before[values][0])


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
    pipe.set_loras()
    again = make()
    assert np.array_equal(again.latents, plain.latents) and again.metadata["lora"] == {}
    assert len(pipe.programs.compiled) == compiled
    with pytest.raises(CheckpointError, match="does not exist"):
        pipe.set_loras("nothing.safetensors")
    assert isinstance(pipe.components["dit"].adapters.chosen, Chosen)
    assert jax.tree.leaves(pipe.components["dit"].load())
