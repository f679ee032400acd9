"""Our checkpoint folder: round trip, shardings, other configs, damage, atomic writing, silence."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from tdjax.checkpoints import arrays, orbax
from tdjax.config import DiTConfig, TextConfig, VAEConfig
from tdjax.errors import CheckpointError, UsageError
from tdjax.precision import FLOAT32, Policy

DIT = DiTConfig(
    dim=24,
    ffn_dim=40,
    layers=3,
    heads=2,
    in_channels=36,
    freq_dim=8,
    text_dim=7,
    image_dim=5,
    attention="sla",
)
CONFIGS = {
    "dit": DIT,
    "int8": dataclasses.replace(DIT, linear="int8", attention="dense"),
    "int8_channel": dataclasses.replace(DIT, linear="int8_channel"),
    "fp8": dataclasses.replace(DIT, linear="fp8"),
    "vae": VAEConfig(
        dim=2,
        latent_channels=3,
        multipliers=(1, 2),
        temporal_down=(True,),
        res_blocks=1,
        mean=(0.0,) * 3,
        std=(1.0,) * 3,
    ),
    "text": TextConfig(
        vocab=11, dim=6, attention_dim=8, ffn_dim=10, heads=2, layers=2, policy=FLOAT32
    ),
}


def kind_of(name):
    return name if name in orbax.MODULES else "dit"


@pytest.fixture(scope="module")
def modules():
    """Modules of random values, without compiling their initialisation."""
    rng = np.random.default_rng(0)
    out = {}
    for name, cfg in CONFIGS.items():
        module = orbax.abstract(kind_of(name), cfg)
        values = {
            n: jnp.asarray(rng.integers(-99, 99, x.shape), x.dtype)
            for n, x in orbax.named_leaves(module).items()
        }
        out[name] = orbax.assemble(module, values)
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory, modules):
    """A saved SLA transformer, for tests that only read."""
    return orbax.save(
        tmp_path_factory.mktemp("ck") / "dit",
        modules["dit"],
        "dit",
        DIT,
        source={"name": "x.pth", "sha256": "0"},
    )


@pytest.fixture
def copy(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "dit")
    return tmp_path / "dit"


def same(a, b):
    a, b = orbax.named_leaves(a), orbax.named_leaves(b)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        np.testing.assert_array_equal(np.asarray(a[name]), np.asarray(b[name]), err_msg=name)


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip(tmp_path, modules, name):
    kind, cfg = kind_of(name), CONFIGS[name]
    orbax.save(tmp_path / "x", modules[name], kind, cfg, source="made here")
    got_cfg, got = orbax.restore(tmp_path / "x")
    assert got_cfg == cfg
    same(got, modules[name])
    assert jax.tree.structure(got) == jax.tree.structure(modules[name])
    manifest = orbax.inspect(tmp_path / "x")
    assert (manifest["format"], manifest["kind"], manifest["source"]) == (
        1,
        kind,
        {"name": "made here"},
    )
    assert orbax.config_of(manifest) == cfg
    assert manifest["leaves"] == {
        n: [list(x.shape), x.dtype.name] for n, x in orbax.named_leaves(got).items()
    }
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x"]
    one = next(iter(manifest["leaves"]))
    np.testing.assert_array_equal(
        orbax.read(tmp_path / "x", one), np.asarray(orbax.named_leaves(got)[one])
    )
    files = [path.read_bytes() for path in (tmp_path / "x").rglob("*") if path.is_file()]
    assert not any(
        str(tmp_path).encode() in data for data in files
    )  # nothing of the machine travels with the weights


def test_a_restored_module_does_not_trace_again(folder, modules):
    traced = []

    @jax.jit
    def f(module):
        traced.append(1)
        return module.head.modulation[...].sum()

    f(modules["dit"])
    f(orbax.restore(folder)[1])
    assert len(traced) == 1


@pytest.mark.slow
def test_shardings_and_device_counts(tmp_path, folder, modules):
    second = jax.devices()[1]
    for where in (second, SingleDeviceSharding(second)):
        module = orbax.restore(folder, where)[1]
        assert {d for x in jax.tree.leaves(module) for d in x.devices()} == {second}
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("a", "b"))
    whole, split = (
        NamedSharding(mesh, PartitionSpec()),
        NamedSharding(mesh, PartitionSpec(None, "a", "b")),
    )
    leaves = orbax.named_leaves(modules["dit"])
    where = {
        name: split if x.ndim == 3 and x.shape[1] % 2 == 0 and x.shape[2] % 2 == 0 else whole
        for name, x in leaves.items()
    }
    module = orbax.restore(folder, where)[1]
    assert module.blocks.up.kernel[...].sharding == split
    same(module, modules["dit"])
    tree = jax.tree.unflatten(
        jax.tree.structure(modules["dit"]), list(where.values())
    )  # as tdjax.parallel.sharding.shardings gives it
    assert orbax.restore(folder, tree)[1].blocks.up.kernel[...].sharding == split
    with pytest.raises(KeyError, match="head.modulation"):  # of the argument: the folder is whole
        orbax.restore(folder, {name: one for name, one in where.items() if "head" not in name})
    orbax.save(tmp_path / "again", module, "dit", DIT)  # written from four devices, read on one
    same(orbax.restore(tmp_path / "again", jax.devices()[3])[1], modules["dit"])


@pytest.mark.slow
def test_another_config_of_the_same_weights(folder, modules):
    wide = dataclasses.replace(DIT, policy=FLOAT32)
    cfg, module = orbax.restore(folder, config=wide)
    assert cfg == wide and module.blocks.up.kernel.dtype == jnp.float32
    np.testing.assert_array_equal(
        module.blocks.up.kernel[...], np.asarray(modules["dit"].blocks.up.kernel[...], np.float32)
    )
    dense = dataclasses.replace(DIT, attention="dense")
    module = orbax.restore(folder, config=dense)[1]
    assert not [name for name in orbax.named_leaves(module) if ".core." in name]
    sage = dataclasses.replace(DIT, attention="sagesla")
    assert orbax.restore(folder, config=sage)[1].cfg == sage
    for wrong in ({"layers": 2}, {"image_dim": None}, {"linear": "int8"}):
        with pytest.raises(CheckpointError, match="cannot be read with the config asked for"):
            orbax.restore(folder, config=dataclasses.replace(DIT, **wrong))


def test_assemble_lists_every_difference():
    module = orbax.abstract("text", CONFIGS["text"])
    leaves = {n: np.zeros(x.shape, x.dtype) for n, x in orbax.named_leaves(module).items()}
    same(
        orbax.assemble(module, leaves),
        orbax.assemble(module, dict(reversed(leaves.items()))),
    )
    wrong = {k: v for k, v in leaves.items() if k != "norm.scale"} | {
        "odd": np.zeros(2),
        "embed.embedding": np.zeros((11, 7), np.float32),
    }
    wrong["blocks.up.kernel"] = wrong["blocks.up.kernel"].astype(np.float16)
    with pytest.raises(CheckpointError) as e:
        orbax.assemble(module, wrong)
    assert str(e.value).splitlines() == [
        "these weights do not fill the model: 4 of 12 leaves differ",
        "different   blocks.up.kernel [2, 6, 10] float16, expected [2, 6, 10] float32",
        "different   embed.embedding [11, 7] float32, expected [11, 6] float32",
        "missing     norm.scale [6] float32",
        "unexpected  odd [2] float64",
        "give the files of one network",
    ]


def test_save_checks_before_it_writes(tmp_path, modules):
    leaves = orbax.named_leaves(modules["text"])
    with pytest.raises(CheckpointError, match="not a text of this config.*"):
        orbax.save(
            tmp_path / "x",
            {k: v for k, v in leaves.items() if k != "norm.scale"},
            "text",
            CONFIGS["text"],
        )
    with pytest.raises(CheckpointError, match="not a dit of this config"):
        orbax.save(tmp_path / "x", modules["text"], "dit", DIT)
    assert not list(tmp_path.iterdir())


def test_leaves_are_read_one_after_another(tmp_path, modules, monkeypatch):
    """A leaf is asked for only after the one before is on disk; small ones go together."""
    events, real = [], arrays.InTurn.write

    async def write(*args):
        await real(*args)
        events.append("written")

    monkeypatch.setattr(arrays.InTurn, "write", write)
    leaves = {n: np.asarray(x) for n, x in orbax.named_leaves(modules["text"]).items()}
    lazy = {
        n: orbax.Lazy(x.shape, x.dtype, lambda x=x: events.append("read") or x)
        for n, x in leaves.items()
    }
    orbax.save(tmp_path / "together", lazy, "text", CONFIGS["text"])
    assert events == ["read"] * len(leaves) + ["written"]
    events.clear()
    monkeypatch.setattr(arrays, "GROUP_BYTES", 1)
    orbax.save(tmp_path / "apart", lazy, "text", CONFIGS["text"])
    assert events == ["read", "written"] * len(leaves)
    for folder in ("together", "apart"):
        same(orbax.restore(tmp_path / folder)[1], modules["text"])


# Messages
# --------------------------------------------------------------------------------------------------


def test_folders_that_are_not_ours(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "a.safetensors").touch()
    (tmp_path / "model" / "dit").mkdir(parents=True)
    (tmp_path / "model" / "dit" / "manifest.json").touch()
    for path, message in (
        (tmp_path / "empty", "manifest.json and params/"),
        (tmp_path / "absent", "does not exist\nthere is: .*empty"),
        (tmp_path / "absent" / "deeper", "does not exist"),
        (tmp_path / "weights", "published weights.*\n.*python -m convert"),
        (tmp_path / "weights" / "a.safetensors", "published weights"),
        (tmp_path / "model", "model folder with dit\nname one of them"),
    ):
        for ask in (orbax.inspect, orbax.restore):
            with pytest.raises(CheckpointError, match=message):
                ask(path)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "damaged or not ours"),
        ("[]", "damaged or not ours"),
        ("{}", "damaged or not ours"),
        ('{"format": 1, "kind": "dit", "config": {}, "leaves": {"a": 3}}', "damaged or not ours"),
        ('{"format": "1", "kind": "dit", "config": {}, "leaves": {}}', "is damaged or not ours"),
        (
            '{"format": 2, "kind": "dit", "config": {}, "leaves": {}}',
            "format 2\n.*reads format 1\nupdate tdjax",
        ),
        (
            '{"format": 0, "kind": "dit", "config": {}, "leaves": {}}',
            "format 0\n.*\nconvert the source file again",
        ),
        (
            '{"format": 1, "kind": "audio", "config": {}, "leaves": {}}',
            "'audio'\nknown kinds: dit, vae, tiny_vae, text",
        ),
        ('{"format": 1, "kind": "dit", "config": {"odd": 1}, "leaves": {}}', "no field odd"),
        (
            '{"format": 1, "kind": "dit", "config": {"dim": 25}, "leaves": {}}',
            "dim 25 over 12 heads",
        ),
        (
            '{"format": 1, "kind": "dit", "config": {"dim": "x"}, "leaves": {}}',
            "not one this version",
        ),
    ],
)
def test_manifests(copy, text, message):
    (copy / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        orbax.restore(copy)


def test_manifest_params_and_config_must_agree(copy):
    good = json.loads((copy / "manifest.json").read_text())
    for change, message in (
        ({"config": good["config"] | {"layers": 2}}, "does not describe its own config"),
        ({"leaves": good["leaves"] | {"odd": [[3], "float32"]}}, "unexpected  odd"),
        (
            {"leaves": good["leaves"] | {"head.modulation": [[2, 24], "float32"]}},
            "different   head.modulation",
        ),
    ):
        (copy / "manifest.json").write_text(json.dumps(good | change))
        with pytest.raises(CheckpointError, match=message):
            orbax.restore(copy)


@pytest.mark.slow
def test_params_of_another_checkpoint(copy, tmp_path, modules):
    cfg = dataclasses.replace(DIT, policy=Policy(param="float16"))
    other = jax.tree.map(
        lambda x: x.astype(jnp.float16) if x.dtype == jnp.bfloat16 else x, modules["dit"]
    )
    orbax.save(tmp_path / "other", orbax.named_leaves(other), "dit", cfg)
    shutil.rmtree(copy / "params")
    with pytest.raises(CheckpointError, match="missing or damaged"):
        orbax.restore(copy)
    shutil.copytree(tmp_path / "other" / "params", copy / "params")
    with pytest.raises(CheckpointError, match="does not hold what manifest.json lists"):
        orbax.restore(copy)


def test_truncated_or_missing_files(copy, capfd):
    files = sorted(p for p in (copy / "params").rglob("*") if p.is_file() and p.stat().st_size)
    named = lambda part: [p for p in files if part in p.as_posix()]
    data = max(files, key=lambda p: p.stat().st_size)
    for victim in (data, *named("manifest.ocdbt")[:1], *named("/_METADATA"), *named("params/d/")):
        whole = victim.read_bytes()
        for damage in (whole[: len(whole) // 2], b"", None):
            victim.unlink() if damage is None else victim.write_bytes(damage)
            with pytest.raises(CheckpointError, match="missing or damaged|does not hold") as e:
                orbax.restore(copy)
            assert str(copy) in str(e.value)
        victim.write_bytes(whole)
    orbax.restore(copy)
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")


# Atomic writing
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"x", None])
def test_every_file_has_the_size_that_it_was_written_with(copy, change):
    """TensorStore reads zeros where a file of values was cut."""
    for file in sorted(p for p in (copy / "params").rglob("*") if p.is_file()):
        whole = file.read_bytes()
        file.unlink()
        if change is not None:
            file.write_bytes(change(whole))
        with pytest.raises(CheckpointError, match="missing or damaged"):
            orbax.checked(copy)
        file.write_bytes(whole)
    orbax.checked(copy)


def test_nothing_is_overwritten_by_itself(tmp_path, modules):
    orbax.save(tmp_path / "x", modules["text"], "text", CONFIGS["text"])
    with pytest.raises(UsageError, match="exists"):
        orbax.save(tmp_path / "x", modules["vae"], "vae", CONFIGS["vae"])
    assert orbax.inspect(tmp_path / "x")["kind"] == "text"
    orbax.save(tmp_path / "x", modules["vae"], "vae", CONFIGS["vae"], overwrite=True)
    same(orbax.restore(tmp_path / "x")[1], modules["vae"])
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_failed_save_leaves_what_was_there(tmp_path, modules):
    orbax.save(tmp_path / "x", modules["text"], "text", CONFIGS["text"])
    leaves = {
        n: orbax.Lazy(x.shape, np.dtype(x.dtype), lambda: 1 / 0)
        for n, x in orbax.named_leaves(modules["text"]).items()
    }
    for target, options in (("x", {"overwrite": True}), ("y", {})):
        with pytest.raises(ZeroDivisionError):
            orbax.save(tmp_path / target, leaves, "text", CONFIGS["text"], **options)
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    same(orbax.restore(tmp_path / "x")[1], modules["text"])


def test_nothing_is_printed(tmp_path, modules, capfd):
    orbax.save(tmp_path / "x", modules["text"], "text", CONFIGS["text"])
    orbax.restore(tmp_path / "x")
    orbax.read(tmp_path / "x", "norm.scale")
    assert capfd.readouterr() == ("", "")


def test_relative_paths(tmp_path, modules, monkeypatch):
    monkeypatch.chdir(tmp_path)
    orbax.save("deep/x", modules["text"], "text", CONFIGS["text"])
    same(orbax.restore("deep/x")[1], modules["text"])
