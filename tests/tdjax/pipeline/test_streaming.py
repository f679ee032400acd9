"""Blocks of the transformer that wait in the host's memory: the same weights, the same latents,
three of them on the device at most, and no program of their own."""

import dataclasses

import jax
import numpy as np
import pytest
import random_model
from random_model import SMALL
from tolerances import assert_close

import tdjax
from convert.export import export
from convert.leaves import open_leaves
from tdjax.checkpoints import orbax
from tdjax.config import DiTConfig, TextConfig, VAEConfig, VideoSize
from tdjax.errors import UsageError
from tdjax.models.wan_dit import without_blocks
from tdjax.pipeline import memory, streaming
from tdjax.pipeline.adapters import Adapters, choose
from tdjax.pipeline.components import open_component
from tdjax.pipeline.options import PipelineOptions

CFG = dataclasses.replace(random_model.DIT, layers=3, attention="dense")
CALL = {"output_type": "latent", "num_steps": 2, **SMALL}
FOURTEEN = DiTConfig(dim=5120, ffn_dim=13824, layers=40, heads=40, linear="int8_channel")


@pytest.fixture(scope="module")
def small(model, tmp_path_factory):
    """A model folder with a transformer of three layers."""
    return random_model.with_dit(model, tmp_path_factory.mktemp("models") / "three", CFG)


def whole(streamed):
    """{leaf name: values} of a `Streamed`, its blocks stacked."""
    blocks = [orbax.named_leaves(block) for block in streamed.blocks]
    stacked = {f"blocks.{name}": np.stack([b[name] for b in blocks]) for name in blocks[0]}
    return orbax.named_leaves(streamed.outer) | stacked


def same(leaves, module):
    others = orbax.named_leaves(module)
    return leaves.keys() == others.keys() and all(
        np.array_equal(np.asarray(leaves[n]), np.asarray(others[n])) for n in leaves
    )


@pytest.mark.slow
@pytest.mark.parametrize("linear", ["float", "int8_channel"])
def test_weights_are_those_of_the_whole(small, tmp_path, linear):
    ours = small / "dit"
    theirs = export(open_leaves(ours), tmp_path / "turbo.safetensors")
    for path in (ours, theirs):
        component = open_component(path, "dit")
        component.config = dataclasses.replace(component.config, linear=linear)
        module = component.read()
        component.stream(True)
        streamed = component.load()
        assert same(whole(streamed), module)
        structure = jax.tree.structure(orbax.abstract("dit", component.config).blocks)
        assert all(jax.tree.structure(block) == structure for block in streamed.blocks)
        kinds = {x.sharding.memory_kind for x in jax.tree.leaves(streamed.blocks)}
        assert kinds == {streaming.HOST_MEMORY}
        component.free()
        assert all(x.is_deleted() for x in jax.tree.leaves(streamed))


def test_a_block_is_on_its_way_before_the_one_before_it_is_called(monkeypatch):
    told, there = [], set()

    def on_device(block):
        told.append(("copy", block))
        there.add(block)
        assert len(there) <= memory.STREAMED_BLOCKS
        return block

    def run(block, x, *inputs):
        told.append(("call", block))
        there.discard(block - 1)  # the one before is done at the latest by then
        return x + [block]

    monkeypatch.setattr(streaming, "on_device", on_device)
    begin, end = lambda *inputs: ([], None, None, None), lambda outer, x, *inputs: x
    model = streaming.Streamed(None, tuple(range(5)))
    assert streaming.step((begin, run, end), model, None, None, None, None) == [0, 1, 2, 3, 4]
    for block in range(4):
        assert told.index(("copy", block + 1)) < told.index(("call", block))
    assert told.index(("call", 0)) < told.index(("copy", 2))  # one at a time, not all at once


@pytest.mark.slow
def test_latents_are_those_of_the_whole(small):
    streamed = tdjax.load(small, transformer_device="stream")
    plain = tdjax.load(small)
    first = streamed("a red circle", **CALL)
    # XLA fuses sums over the border of two blocks in the program of all of them.
    assert_close(first.latents, plain("a red circle", **CALL).latents, "float32")
    made = lambda: {k for k in streamed.programs.compiled if k[0].__name__.startswith("step_")}
    programs = made()
    assert len(programs) == 3
    again = streamed("a red circle", **CALL)
    streamed("another", seed=3, **(CALL | {"num_steps": 3}))
    assert made() == programs and np.array_equal(again.latents, first.latents)
    assert isinstance(streamed.components["dit"].module, streaming.Streamed)  # it stays


@pytest.mark.slow
def test_two_experts_under_guidance(i2v_model):
    image = random_model.photograph(32, 32)
    call = {"image": image, "sampler": "euler", "guidance_scale": 2.0, "shift": 1.0, **CALL}
    how = {"low_memory": True, "text_encoder_device": "device"}
    streamed = tdjax.load(i2v_model, transformer_device="stream", **how)
    made = streamed("a", **call).latents
    assert_close(made, tdjax.load(i2v_model, **how)("a", **call).latents, "float32")
    assert streamed.components["dit"].module is streamed.components["dit_low"].module is None


@pytest.mark.slow
@pytest.mark.parametrize("linear", ["float", "int8_channel"])
def test_loras_on_blocks_that_wait(small, tmp_path, write_safetensors, linear):
    """The bits of the whole network with them; and those of before, once they are off."""
    rng = np.random.default_rng(0)
    values = lambda *shape: rng.normal(0, 0.1, shape).astype(np.float32)
    tensors = {
        "blocks.0.self_attn.q.lora_B.weight": values(128, 4),
        "blocks.0.self_attn.q.lora_A.weight": values(4, 128),
        "blocks.2.norm3.diff": values(128),
        "head.modulation.diff": values(1, 2, 128),
    }
    file = str(write_safetensors(tmp_path / "lora.safetensors", tensors))
    component = open_component(small / "dit", "dit")
    component.config = dataclasses.replace(component.config, linear=linear)
    chosen = choose(((file, 0.5),), component.config, low_noise=False)
    before, held = component.read(), Adapters()
    held.chosen = chosen
    expected = held.merged(component.read())
    component.stream(True)
    component.load()
    component.adapt(chosen)
    assert same(whole(component.module), expected) and not same(whole(component.module), before)
    structure = jax.tree.structure(component.abstract().blocks)  # programs are made of it
    assert all(jax.tree.structure(block) == structure for block in component.module.blocks)
    component.adapt(choose((), component.config, low_noise=False))
    assert same(whole(component.module), before)


def test_plans_of_small_gpus(monkeypatch):
    """14B in 8 bits: blocks stream where the whole does not fit, and the host's share is told."""
    configs = {"dit": FOURTEEN, "vae": VAEConfig(), "text": TextConfig()}
    size = VideoSize(frames=81, height=480, width=832)
    plan = lambda **how: memory.make_plan(configs, size, guided=False, **how)
    monkeypatch.setattr(memory, "host_memory", lambda: 64 * memory.GIB)
    for limit, streams in ((11, True), (15, True), (40, False)):
        monkeypatch.setattr(memory, "memory_limit", lambda limit=limit: limit * memory.GIB)
        made = plan()
        assert made.stream_transformer is streams, limit
        assert plan(stream_transformer=not streams).stream_transformer is not streams
        row = made.of("dit")
        assert row.total < memory.USABLE * limit * memory.GIB
        blocks = FOURTEEN.layers * memory.block_bytes(FOURTEEN)
        assert row.host == (blocks if streams else 0)
        assert ("page-locked" in made.table()) is streams
    monkeypatch.setattr(memory, "memory_limit", lambda: 15 * memory.GIB)
    assert plan(tiled_vae=True).keep_resident
    monkeypatch.setattr(memory, "host_memory", lambda: 16 * memory.GIB)  # too little to keep them
    assert not plan(tiled_vae=True).keep_resident


def test_what_is_left_has_no_blocks():
    abstract = orbax.abstract("dit", CFG)
    names = orbax.named_leaves(without_blocks(abstract))
    expected = [n for n in orbax.named_leaves(abstract) if not n.startswith("blocks.")]
    assert list(names) == expected


def test_not_on_a_mesh():
    with pytest.raises(UsageError, match="transformer_device stream with a mesh"):
        PipelineOptions(transformer_device="stream", mesh="sp=2")
    assert PipelineOptions(mesh="sp=2").stream_transformer is False
