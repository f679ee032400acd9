"""open_checkpoint: leaves in the file's orientation, modules in ours, from every container and
naming."""

import dataclasses
import tracemalloc

import jax
import ml_dtypes
import numpy as np
import pytest
from einops import rearrange
from train_cases import mesh

from tdjax.checkpoints import orbax
from tdjax.checkpoints.published.checkpoint import open_checkpoint, targets
from tdjax.errors import CheckpointError
from tdjax.parallel.sharding import shardings
from tdjax.precision import FLOAT32

HEADS = {"dit": 4, "i2v": 4, "clip": 4, "diffusers": 4}


@pytest.fixture
def opened(states, tmp_path, write_safetensors):
    """opened(kind) -> the Checkpoint of a tiny safetensors file."""

    def open_(kind, **known):
        path = write_safetensors(tmp_path / f"{kind}.safetensors", states(kind))
        return open_checkpoint(path, **({"heads": HEADS[kind]} if kind in HEADS else {}), **known)

    return open_


def equal(a, b):
    a, b = orbax.named_leaves(a), orbax.named_leaves(b)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        np.testing.assert_array_equal(np.asarray(a[name]), np.asarray(b[name]), err_msg=name)


@pytest.mark.parametrize(
    "kind, other", [("dit", "diffusers"), ("vae", "diffusers_vae"), ("text", "transformers")]
)
def test_two_namings_give_the_same_module(opened, kind, other):
    ours, theirs = opened(kind), opened(other)
    assert ours.config == theirs.config and ours.kind == theirs.kind
    equal(ours.load(), theirs.load())


@pytest.mark.parametrize("kind", ["dit", "diffusers", "sla", "clip", "text", "vae"])
def test_parts_of_a_file_are_those_of_the_module(opened, kind):
    """Each device gets what a process would read that has it alone."""
    file = opened(kind)
    module = file.load()
    lies = shardings(module, mesh(fsdp=2, tensor=2))
    shapes, claims = targets(file.kind, file.config), file.binding(file.config).claims
    divided = {
        name: file._divided(claims[name], shapes[name], where)
        for name, where in orbax.named_leaves(lies).items()
    }
    assert kind == "vae" or not all(x.is_fully_replicated for x in divided.values())
    equal(module, orbax.assemble(orbax.abstract(file.kind, file.config), divided))


def test_values_and_layouts(opened, states):
    state, file = states("dit"), opened("dit")
    config = dataclasses.replace(file.config, policy=FLOAT32)
    leaves = {name: (x, layout, dtype) for name, x, layout, dtype in file.leaves(config)}
    x, layout, dtype = leaves["blocks.self_attn.q.kernel"]
    assert (x.shape, layout, dtype) == ((2, 80, 80), "n o i -> n i o", np.float32)
    np.testing.assert_array_equal(x[1], state["blocks.1.self_attn.q.weight"])
    module = file.load(config)
    np.testing.assert_array_equal(module.blocks.up.kernel[...][1], state["blocks.1.ffn.0.weight"].T)
    np.testing.assert_array_equal(module.head.modulation[...], state["head.modulation"][0])
    np.testing.assert_array_equal(module.patch_embed.kernel[...], state["patch_embedding.weight"].T)
    assert file.load().blocks.up.kernel.dtype == ml_dtypes.bfloat16


def test_convolutions(opened, states):
    state, file = states("vae"), opened("vae")
    module = file.load(dataclasses.replace(file.config, policy=FLOAT32))
    up = module.decoder.up[3]
    np.testing.assert_array_equal(
        up.time_conv.kernel[...],
        rearrange(state["decoder.upsamples.3.time_conv.weight"], "o i t h w -> t h w i o"),
    )
    np.testing.assert_array_equal(
        up.conv.kernel[...],
        rearrange(state["decoder.upsamples.3.resample.1.weight"], "o i h w -> h w i o"),
    )
    np.testing.assert_array_equal(
        module.encoder.norm_out.scale[...], state["encoder.head.0.gamma"][:, 0, 0, 0]
    )


def test_torch_files_and_prefixes(states, tmp_path):
    torch = pytest.importorskip("torch")
    state = {f"net.{k}": torch.from_numpy(v).to(torch.bfloat16) for k, v in states("sla").items()}
    torch.save({"state_dict": state, "iteration": 3}, tmp_path / "rcm.pth")
    file = open_checkpoint(tmp_path / "rcm.pth")
    assert (file.kind, file.task, file.name, file.config.attention) == (
        "dit",
        "t2v",
        "rcm.pth",
        "sla",
    )
    facts = file.facts()
    assert (
        facts["stripped"] == {"net.": len(state)}
        and facts["ignored"] == 0
        and facts["dtypes"] == {"bfloat16": len(state)}
    )
    module = file.load()
    assert (
        module.blocks.self_attn.core.proj.kernel.dtype == np.float32
    )  # never stored narrower, whatever the policy
    np.testing.assert_array_equal(
        module.blocks.self_attn.core.proj.kernel[...][0],
        states("sla")["blocks.0.self_attn.attn_op.local_attn.proj_l.weight"].T,
    )


def test_dense_attention_drops_the_projection(opened):
    file = opened("sla")
    dense = dataclasses.replace(file.config, attention="dense")
    module = file.load(dense)
    assert not [name for name in orbax.named_leaves(module) if "core" in name]
    assert len(file.binding(dense).dropped) == 2 and not file.binding(file.config).dropped
    sage = file.load(dataclasses.replace(file.config, attention="sagesla"))
    assert module.cfg == dense and sage.cfg.attention == "sagesla"


def test_sla_from_dense_weights_is_refused(opened):
    file = opened("dit")
    with pytest.raises(
        CheckpointError, match="missing blocks.0.self_attn.attn_op.local_attn.proj_l"
    ):
        file.load(dataclasses.replace(file.config, attention="sla"))


def test_int8(tmp_path, states, write_safetensors):
    rng = np.random.default_rng(0)
    state = {}
    for key, value in states("sla").items():
        linear = key.startswith("blocks.") and value.ndim == 2 and "proj_l" not in key
        if linear:
            stem = key.removesuffix("weight")
            state[f"{stem}int8_weight"] = rng.integers(-128, 128, value.shape).astype(np.int8)
            state[f"{stem}scale"] = np.ones([-(-n // 128) for n in value.shape], np.float32)
        else:
            state[key] = value
    file = open_checkpoint(write_safetensors(tmp_path / "q.safetensors", state))
    assert file.config.linear == "int8"
    module = file.load()
    np.testing.assert_array_equal(
        module.blocks.up.int8_weight[...][0], state["blocks.0.ffn.0.int8_weight"]
    )
    assert module.blocks.up.scale.dtype == np.float32
    state["blocks.0.ffn.0.int8_weight"] = state["blocks.0.ffn.0.int8_weight"].astype(np.float32)
    with pytest.raises(CheckpointError, match="int8_weight is float32, expected int8"):
        open_checkpoint(write_safetensors(tmp_path / "q.safetensors", state))


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16", "float8_e4m3fn"])
def test_other_storage(tmp_path, states, dtype, torch_save):
    state = states("text")
    path = torch_save(tmp_path / "t.pth", state, dtype)
    file = open_checkpoint(path)
    module = file.load(dataclasses.replace(file.config, policy=FLOAT32))
    want = (
        state["norm.weight"].astype(np.dtype(getattr(ml_dtypes, dtype, dtype))).astype(np.float32)
    )
    np.testing.assert_array_equal(module.norm.scale[...], want)


@pytest.fixture
def torch_save():
    torch = pytest.importorskip("torch")

    def save(path, state, dtype):
        torch.save(
            {k: torch.from_numpy(v).to(getattr(torch, dtype)) for k, v in state.items()}, path
        )
        return path

    return save


def test_layers_of_different_storage(tmp_path, states, write_safetensors):
    state = dict(states("dit"))
    state["blocks.1.self_attn.norm_q.weight"] = state["blocks.1.self_attn.norm_q.weight"].astype(
        ml_dtypes.bfloat16
    )
    file = open_checkpoint(write_safetensors(tmp_path / "t.safetensors", state), heads=4)
    got = file.load(dataclasses.replace(file.config, policy=FLOAT32)).blocks.self_attn.norm_q.scale[
        ...
    ]
    np.testing.assert_array_equal(
        got[1], state["blocks.1.self_attn.norm_q.weight"].astype(np.float32)
    )


def test_final_leaves_are_those_of_the_module(opened):
    for kind in ("sla", "vae"):
        file = opened(kind)
        module = orbax.named_leaves(file.load())
        for name, lazy in file.lazy().items():
            got = lazy.read()
            assert (
                (got.shape, got.dtype)
                == (lazy.shape, lazy.dtype)
                == (module[name].shape, module[name].dtype)
            )
            np.testing.assert_array_equal(got, np.asarray(module[name]), err_msg=name)


@pytest.mark.slow
def test_transposition_on_a_device(opened, monkeypatch):
    """The path that accelerators take gives the same bits as the host's."""
    from tdjax.checkpoints.published import checkpoint

    file, host = opened("dit"), opened("dit").load()
    monkeypatch.setattr(checkpoint, "ON_DEVICE", 0)
    monkeypatch.setattr(checkpoint, "HOST", ())
    equal(file.load(), host)


def test_devices_and_shardings(opened):
    file = opened("dit")
    second = jax.devices()[1]
    assert {x.sharding.device_set.pop() for x in jax.tree.leaves(file.load(device=second))} == {
        second
    }
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("fsdp",))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, None, "fsdp"))
    where = dict.fromkeys(orbax.named_leaves(orbax.abstract("dit", file.config)), whole) | {
        "blocks.up.kernel": split
    }
    module = file.load(device=where)
    assert module.blocks.up.kernel[...].sharding == split
    equal(module, file.load())


def test_host_memory_peaks_at_about_one_leaf(tmp_path, write_safetensors, states):
    """Eight layers of a large embedding-free text encoder: reading all leaves holds one stacked
    leaf and one layer at a time."""
    d, f, n = 256, 1024, 8
    one = {
        "norm1.weight": (d,),
        "norm2.weight": (d,),
        "ffn.gate.0.weight": (f, d),
        "ffn.fc1.weight": (f, d),
        "ffn.fc2.weight": (d, f),
    }
    one |= {f"attn.{p}.weight": (d, d) for p in "qkvo"} | {
        "pos_embedding.embedding.weight": (32, 4)
    }
    state = {
        f"blocks.{i}.{k}": np.ones(shape, np.float32) for i in range(n) for k, shape in one.items()
    }
    state |= {
        "token_embedding.weight": np.ones((10, d), np.float32),
        "norm.weight": np.ones(d, np.float32),
    }
    file = open_checkpoint(write_safetensors(tmp_path / "t.safetensors", state))
    leaf = n * f * d * 4
    tracemalloc.start()
    for _, x, _, _ in file.leaves():
        del x
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    for lazy in file.lazy().values():
        lazy.read()
    written = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert leaf <= peak < 1.3 * leaf
    assert written < 1.3 * leaf  # bfloat16 stacks, and one layer as it is read


def test_repr_names_what_it_is(opened):
    assert "text to video, 1 layers of 128, sla attention" in repr(opened("sla"))
    assert opened("vae").task is None
