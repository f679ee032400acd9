"""Adapters and weights trained over a frozen base: against the dense network with the change added,
and their files against what reads them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import put
from dit_cases import clip, dit, jit
from flax import nnx
from run_cases import TINY, fails, training_run, words
from safetensors.numpy import load_file
from tolerances import assert_close

from convert.export import export
from convert.leaves import open_leaves
from tdjax.checkpoints import orbax
from tdjax.checkpoints.published.checkpoint import open_checkpoint
from tdjax.models.linear import LINEAR, WeightOnlyLinear
from tdjax.models.wan_dit import with_linear
from tdjax.precision import FLOAT32
from tdjax.train import checkpoints, metrics, partial
from tdjax.train.configs import LoRA

CLIP = clip(2, 4, 4)
TIMES = put([900.0, 300.0])
PULL = put(np.random.default_rng(7).normal(size=CLIP.latents.shape), jnp.float32)


def pulled(model):
    """(a number whose gradient is that of a cotangent, the output)"""
    v = model(CLIP.latents, TIMES, CLIP.text)
    return jnp.sum(v * PULL), v


def random(trained, seed=5):
    """With factors that are not zero, as after some steps."""
    draw = np.random.default_rng(seed).normal
    up = {stem: put(draw(size=x.shape), x.dtype) for stem, x in trained.up.items()}
    return dataclasses.replace(trained, up=up)


@pytest.fixture(scope="module")
def base():
    return dit(0)


@pytest.fixture(scope="module")
def adapters(base):
    selection = partial.select(base.cfg, None, LoRA(rank=3, alpha=1.5))
    return selection.create({}, jax.random.key(1))


def dense(trained, base):
    """The base with the change added to its weights."""
    leaves = orbax.named_leaves(base)
    frozen = lambda name: np.asarray(leaves[name])
    merged = {name: trained.merged(name, frozen) for name in leaves}
    return orbax.assemble(orbax.abstract("dit", trained.cfg), merged)


@pytest.mark.slow
def test_adapters_are_a_change_of_the_weights(base, adapters):
    """Output and gradient, by the chain rule through W + scale down up. The output is bit-equal to
    the base's while the factors `up` are zero."""
    both = jit(jax.grad(lambda trained, base: pulled(trained.over(base)), has_aux=True))
    plain = jit(jax.grad(pulled, has_aux=True))
    assert adapters.down.keys() == {
        *(f"blocks.{a}_attn.{p}" for a in ("self", "cross") for p in "qkvo"),
        "blocks.up",
        "blocks.down",
    }
    begun = jit(lambda trained, base: pulled(trained.over(base))[1])(adapters, base)
    assert np.array_equal(begun, jit(lambda base: pulled(base)[1])(base))
    trained = random(adapters)
    grads, v = both(trained, base)
    by_weight, expected = plain(dense(trained, base))
    assert_close(v, expected, "float32")
    named, large = orbax.named_leaves(by_weight), 0.0
    for stem, down in trained.down.items():
        whole = np.asarray(named[f"{stem}.kernel"], np.float64)
        one = 0.5 * whole @ np.swapaxes(np.asarray(trained.up[stem], np.float64), 1, 2)
        two = 0.5 * np.swapaxes(np.asarray(down, np.float64), 1, 2) @ whole
        for actual, wanted in ((grads.down[stem], one), (grads.up[stem], two)):
            assert_close(actual / np.abs(wanted).max(), wanted / np.abs(wanted).max(), "float32")
            large = max(large, np.abs(wanted).max())
    assert large > 0.1


@pytest.mark.parametrize("kind", ["int8", "int8_channel", "fp8"])
def test_a_layer_of_8_bits(kind):
    """Its product is that of the floats that the 8 bits stand for, and has a derivative by x."""
    rng = np.random.default_rng(2)
    x, pull = (put(rng.normal(size=(1, 5, n)), jnp.float32) for n in (16, 12))
    layer = LINEAR[kind](16, 12, FLOAT32, rngs=nnx.Rngs(1))
    frozen = WeightOnlyLinear(layer, kind)
    assert orbax.named_leaves(frozen).keys() == orbax.named_leaves(layer).keys()
    leaves = [getattr(layer, name)[...] for name in LINEAR[kind].leaves]
    weight = np.asarray(LINEAR[kind].unpacked(*leaves))
    assert_close(frozen(x), x @ weight.T + layer.bias[...], "float32")
    by_x = jax.grad(lambda x: jnp.sum(frozen(x) * pull))(x)
    assert_close(by_x, pull @ weight, "float32")


def test_a_network_of_8_bits_keeps_its_arrays(base):
    stored = jax.eval_shape(lambda model: with_linear(model, "int8_channel"), base)
    leaves = orbax.named_leaves(partial.weight_only(stored))
    assert leaves.keys() == orbax.named_leaves(stored).keys()
    assert sum(x.dtype == np.int8 for x in leaves.values()) == 10
    assert partial.weight_only(base) is base


def test_what_is_trained(base):
    cfg = dataclasses.replace(base.cfg, attention="sla")
    everything = partial.select(cfg, None, None)
    assert everything is None and partial.select(cfg, ".*", None) is None
    chosen = partial.select(cfg, r".*(norm|core\.proj).*", None)
    assert chosen.layers == () and len(chosen.weights) == 8
    adapted = partial.select(cfg, None, LoRA(layers=r"blocks\.self_attn\.[qk]"))
    assert adapted.layers == ("blocks.self_attn.k", "blocks.self_attn.q")
    assert adapted.weights == tuple(f"blocks.self_attn.core.proj.{x}" for x in ("bias", "kernel"))
    assert partial.select(base.cfg, None, LoRA()).weights == ()


@pytest.mark.parametrize(
    ("preset", "changes", "expected"),
    [
        ("lora-1.3b", ["model.weights="], ["model.weights is not given", "random numbers"]),
        ("lora-1.3b", ["model.lora.layers=head"], ["no linear layer matches 'head'"]),
        ("lora-1.3b", ["model.lora.layers=("], ["'(' is no pattern", "regular expression"]),
        ("lora-1.3b", ["model.lora.rank=0"], ["LoRA.rank is 0"]),
        ("lora-1.3b", ["model.frozen=int4"], ["ModelConfig.frozen is 'int4'", "int8_channel"]),
        ("lora-1.3b", ["optimizer.train=.*"], ["model.lora has adapters on blocks."]),
        ("lora-1.3b", ["model.lora=none", "model.frozen=int8"], ["every weight is trained"]),
        ("rcm-1.3b", ["critic.train=.*norm.*"], ["critic.train is '.*norm.*'"]),
    ],
)
def test_refusals(folder, tmp_path, capsys, preset, changes, expected):
    given = [f"model.weights={folder / 'dense'}", f"run.folder={tmp_path / 'run'}", *changes]
    err = fails(capsys, preset, *words(folder, *given))
    assert all(word in err for word in expected), err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "more"),
    [
        ("rcm-1.3b", ["model.lora.rank=2", "loss.frequency=2", "loss.warmup=0"]),
        ("sla-1.3b", ["model.lora.rank=2", "model.frozen=int8_channel"]),
        ("sla-1.3b", [r"optimizer.train=.*(core\.proj|norm).*"]),
    ],
)
def test_only_what_is_trained_is_in_a_state(folder, preset, more):
    """Every step is traced on the way. The teacher is the base."""
    run = training_run(preset, *words(folder, f"model.weights={folder / 'dense'}", *more))
    whole = sum(x.size for x in jax.tree.leaves(run.networks.abstract_teacher()))
    state = dataclasses.replace(run.shapes, key=None)
    assert sum(x.size for x in jax.tree.leaves(state)) < (2.5 if preset[0] == "r" else 1) * whole
    assert run.networks.base is None and run.networks.abstract_base() is None
    names = orbax.named_leaves(run.shapes)
    assert not any(name.startswith("model.") and "patch_embed" in name for name in names)


@pytest.fixture(scope="module")
def trial(folder, tmp_path_factory):
    """(folder, shapes of the state) of a run of adapters in float32, with some weights beside them,
    and its base as a published file."""
    out = tmp_path_factory.mktemp("lora")
    export(open_leaves(folder / "dense", dtype="float32"), out / "base.safetensors", "wan")
    own = [
        f"run.folder={out / 'run'}",
        f"model.weights={folder / 'dense'}",
        "model.lora.rank=2",
        "model.lora.alpha=6",
        r"optimizer.train=blocks\.(norm3\..*|modulation|up\.bias)",
        "optimizer.learning_rate=1e-2",
        "optimizer.warmup=0",
        "loss.accumulate=1",
        "loss.ema.decay=0.5",
        "run.steps=3",
        "run.save_every=2",
    ]
    run = training_run("lora-1.3b", *words(folder, *own))
    run.export(run.train(resume=False))
    return out, run.shapes


@pytest.mark.slow
def test_the_file_of_a_run_gives_the_video_of_its_state(folder, trial, capsys):
    """The file over the base, and the network that is exported beside it, have the weights of the
    state, so that all that is computed with them is the same."""
    out, shapes = trial
    run = out / "run"
    rows = metrics.read(run)
    assert rows and all(row["flow/grad_norm"] > 0 for row in rows)
    ema = checkpoints.restore(checkpoints.latest(run), shapes).ema
    moved = [np.abs(x).max() for x in ema.up.values()]
    assert len(moved) == 10 and min(moved) > 1e-3

    lora = [(str(run / "lora.safetensors"), 1.0)]
    file = open_checkpoint(out / "base.safetensors", lora=lora)
    read = file.load(dataclasses.replace(file.config, policy=FLOAT32), None)
    merged = dense(ema, orbax.restore(folder / "dense", config=TINY)[1])
    for name, b in orbax.named_leaves(merged).items():
        assert_close(orbax.named_leaves(read)[name], b, "float32", name)
        assert_close(orbax.read(run / "dit", name), b, "float32", name)


@pytest.fixture(scope="module")
def quantised(folder, tmp_path_factory):
    """The base in 8 bits."""
    model = with_linear(orbax.restore(folder / "dense")[1], "int8_channel")
    out = tmp_path_factory.mktemp("quantised") / "dit"
    return orbax.save(out, orbax.named_leaves(model), "dit", model.cfg)


@pytest.mark.slow
def test_adapters_over_a_file_of_8_bits(folder, quantised, tmp_path):
    """The exported network is the floats that the 8 bits stand for, with the change added."""
    run = tmp_path / "run"
    own = [f"model.weights={quantised}", f"run.folder={run}", "run.steps=2"]
    own += ["model.lora.rank=2", "optimizer.learning_rate=1e-2", "optimizer.warmup=0"]
    given = words(folder, *own, "loss.accumulate=1", "loss.ema.decay=0.5")
    trained = training_run("lora-1.3b", *given)
    trained.export(trained.train(resume=False))
    ema = checkpoints.restore(checkpoints.latest(run), trained.shapes).ema
    assert min(np.abs(x).max() for x in ema.up.values()) > 1e-3
    eight = dataclasses.replace(TINY, linear="int8_channel")
    floats = with_linear(orbax.restore(quantised, config=eight)[1], "float")
    for name, leaf in orbax.named_leaves(dense(ema, floats)).items():
        assert_close(orbax.read(run / "dit", name), leaf, "float32", name)


@pytest.mark.parametrize(
    ("preset", "more"),
    [
        ("lora-1.3b", ["model.lora=none"]),
        ("lora-1.3b", ["model.lora.layers=blocks.up", r"optimizer.train=blocks\.down\.kernel"]),
        ("sla-1.3b", ["model.lora.rank=2"]),
    ],
)
def test_what_8_bits_are_no_base_of(folder, quantised, tmp_path, capsys, preset, more):
    given = [f"model.weights={quantised}", f"run.folder={tmp_path / 'run'}", *more]
    err = fails(capsys, preset, *words(folder, *given), code=3)
    assert "holds int8_channel weights" in err and "train adapters" in err


@pytest.mark.slow
def test_diffusers_and_comfyui_read_the_file(trial):
    """What diffusers makes of it under its own names; ComfyUI wants its prefix and the names of the
    model file, whose factors it takes as they are where there is no alpha (comfy/lora.py)."""
    from diffusers.loaders import lora_conversion_utils
    from safetensors.torch import load_file as torch_file

    out, _ = trial
    run, there = out / "run", {}
    for naming in ("wan", "diffusers"):
        for name in ("dense", "merged"):
            source = out / "base.safetensors" if name == "dense" else run / "dit"
            leaves = open_leaves(source, dtype="float32")
            path = out / f"{name}_{naming}.safetensors"
            export(leaves, path, naming)
            there[naming, name] = load_file(path)
    tensors = torch_file(run / "lora.safetensors")
    read = lora_conversion_utils._convert_non_diffusers_wan_lora_to_diffusers(tensors)
    downs = [key for key in read if key.endswith(".lora_A.weight")]
    assert len(downs) == 20
    for key in downs:
        change = (read[key.replace("lora_A", "lora_B")] @ read[key]).numpy()
        own = key.removeprefix("transformer.").replace(".lora_A", "")
        wanted = there["diffusers", "merged"][own] - there["diffusers", "dense"][own]
        assert np.abs(wanted).max() > 1e-3
        assert_close(change, wanted, "bf16", key)
    keys = list(load_file(run / "lora.safetensors"))
    assert all(key.startswith("diffusion_model.") for key in keys)
    for key in keys:
        if ".lora_" in key:
            stem = key.removeprefix("diffusion_model.").partition(".lora_")[0]
            assert f"{stem}.weight" in there["wan", "dense"]
    assert {key.rpartition(".")[2] for key in keys if ".lora_" not in key} == {
        "diff",
        "diff_b",
        "diff_m",
    }


@pytest.mark.slow
def test_a_sparse_network_is_no_lora_of_a_dense_one(folder):
    own = [f"model.weights={folder / 'dense'}", "model.lora.rank=2"]
    run = training_run("sla-1.3b", *words(folder, *own))
    trained = run.networks.load_student(None, 0)
    assert run._export_lora(trained) == []
    assert len(trained.weights) == 2 and not any(np.any(x) for x in trained.weights.values())
