"""`python -m tdjax.train`: keys and their types, messages, presets, and whole runs of a tiny
network."""

import dataclasses
import importlib
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import random_model
from tolerances import assert_close

from tdjax.checkpoints import orbax
from tdjax.config import DiTConfig
from tdjax.precision import FLOAT32, Policy
from tdjax.progress import Stages
from tdjax.train import __main__ as command
from tdjax.train import checkpoints, configs, loop, metrics, optimizer, rcm
from tdjax.train.configs import build
from tdjax.train.data import Position
from tdjax.train.loop import Outcome
from tdjax.train.presets import METHODS, PRESETS
from tdjax.train.run import Networks, Prepared
from tdjax.train.shards import torch_bytes, write_shard
from tdjax.train.sla import SLATrainingConfig
from tdjax.train.times import LogNormal

TINY = DiTConfig(
    dim=32,
    heads=2,
    ffn_dim=48,
    layers=2,
    in_channels=4,
    out_channels=4,
    freq_dim=16,
    text_dim=6,
    text_len=7,
    policy=FLOAT32,
)


def built(preset, *words):
    """The objects of a preset with settings over it."""
    return {first: build(tree) for first, tree in command.resolve(preset, list(words)).items()}


def fails(capsys, *argv, code=2):
    assert command.main(list(argv)) == code
    out = capsys.readouterr()
    assert out.out == ""
    return out.err


# Keys
# --------------------------------------------------------------------------------------------------------------------


def test_values_have_their_types():
    config = built(
        "rcm-1.3b",
        "run.steps=7",
        "optimizer.learning_rate=1e-3",
        "optimizer.clip=2",
        "loss.dmd_limit=5",
        "model.offline=True",
    )
    assert (
        config["run"].steps == 7
        and config["model"].offline is True
        and config["loss"].dmd_limit == 5.0
    )
    assert (config["optimizer"].learning_rate, config["optimizer"].clip) == (1e-3, 2.0)
    assert built("fm-tiny", "model.dit.patch=(1,2,2)", "optimizer.clip=none")[
        "model"
    ].dit.patch == (1, 2, 2)
    assert built("sla-14b", "data.path=a=b.c")["data"].path == "a=b.c"


def test_objects_inside_objects():
    assert built("sla-14b", "loss.time.deviation=2")["loss"].time == LogNormal(
        mean=1.5, deviation=2.0
    )  # the mean is this loss's default
    assert built("sla-14b", "loss.time=uniformshift", "loss.time.shift=3")["loss"].time.shift == 3.0
    loss = built("rcm-14b", "loss.consistency=DCM", "loss.consistency.steps=50")["loss"]
    assert loss.consistency == rcm.DCM(steps=50)
    assert built("rcm-14b", "loss.consistency=none")["loss"].consistency is None
    assert built("rcm-14b", "loss.consistency.kappa=0.3")["loss"].consistency == rcm.SCM(
        kappa=0.3, time=LogNormal(mean=1.5)
    )
    assert built("sla-14b", "model.sla.topk=0.2")["model"].sla.block_q == 64


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("sla-2b", ["unknown preset 'sla-2b'", "sla-1.3b, sla-14b", "did you mean sla-"]),
        (
            "sla-14b optimizer.lerning_rate=1",
            ["unknown key optimizer.lerning_rate", "did you mean optimizer.learning_rate?"],
        ),
        (
            "sla-14b learning_rate=1",
            ["unknown key learning_rate", "did you mean optimizer.learning_rate?"],
        ),
        ("sla-14b run=1", ["unknown key run"]),
        ("sla-14b critic.b1=0.5", ["unknown key critic.b1", "did you mean optimizer.b1?"]),
        ("sla-14b run.steps", ["cannot read 'run.steps'", "key=value", "run.steps=1000"]),
        ("sla-14b run.steps=1.5", ["run.steps is '1.5'", "a whole number", "2000"]),
        ("sla-14b optimizer.b1=high", ["optimizer.b1 is 'high'", "a number"]),
        ("sla-14b optimizer.clip=yes", ["a number, or none", "none"]),
        ("sla-14b model.offline=1", ["true or false", "false"]),
        ("fm-tiny model.dit.patch=1,2", ["three numbers"]),
        ("sla-14b loss.ema=1", ["loss.ema is '1'", "loss.ema.width, loss.ema.decay"]),
        (
            "sla-14b loss.ema.decay.x=1",
            ["unknown key loss.ema.decay.x", "loss.ema.decay is a float or None"],
        ),
        (
            "rcm-14b loss.consistency=none loss.consistency.kappa=1",
            ["loss.consistency is none", "loss.consistency=SCM or DCM"],
        ),
        ("sla-14b run.steps=0", ["RunConfig.steps is 0"]),
        ("sla-14b run.keep=-1", ["keep is -1"]),
        ("sla-14b data.batch=0", ["DataConfig.batch is 0"]),
        ("sla-14b model.attention=sparse", ["'sparse'", "dense, sla"]),
        ("sla-14b model.sla.topk=3", ["sla_topk is 3"]),
        (
            "sla-14b model.dit.dim=64",
            ["model.dit.dim=64 with model.weights", "the sizes are those of the file"],
        ),
        ("fm-tiny model.student=x", ["student is given without weights"]),
        ("sla-14b", ["data.path is not given", "shard_000000.tar", "data.path=FOLDER"]),
        ("sla-14b data.path=nowhere", ["nowhere is not a folder"]),
    ],
)
def test_messages(capsys, argv, words):
    err = fails(capsys, *argv.split())
    assert all(word in err for word in words), err
    assert len(err.splitlines()) <= 3


@pytest.mark.parametrize("word", ["optimizer.b1=2", "loss.target=box", "loss.time.deviation=0"])
def test_what_a_class_refuses(capsys, word, tmp_path):
    write_shard(tmp_path / "shard_000000.tar", [])
    err = fails(capsys, "sla-14b", word, f"data.path={tmp_path}")
    assert "allowed" in err or "must" in err or "needed" in err


@pytest.mark.parametrize(
    "argv",
    [["--help"], ["rcm-14b", "--help"], ["rcm-14b", "run.stepz=3"], ["rcm-14b", "data.path=none"]],
)
def test_answers_come_before_jax_is_imported(argv):
    code = (
        f"import sys; from tdjax.train import __main__ as c\nc.main({argv!r})\nassert not {{'jax',"
        " 'av'} & set(sys.modules)"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert (
        time.perf_counter() - start < 5
    )  # under 0.5 s on an idle machine; the bound here only catches a jax import


def test_help_lists_presets_and_keys(capsys):
    assert command.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in PRESETS)
    assert command.main(["rcm-14b", "loss.max_steps=3", "-h"]) == 0
    out = capsys.readouterr().out
    found = {line.split("#")[0].strip() for line in out.splitlines()}
    assert {"loss.consistency.time.mean=1.5", "loss.max_steps=3", "run.steps=4000"} <= found
    assert "# one step is one update of one network" in out
    assert "model.dit" not in out  # the weights have sizes
    assert command.main([]) == 2


def test_the_source_says_what_the_classes_are():
    for cls in configs.SOURCES:
        real = {
            f.name: f
            for f in dataclasses.fields(getattr(importlib.import_module(configs.SOURCES[cls]), cls))
        }
        read = configs.fields(cls)
        assert set(real) - set(configs.ELSEWHERE.get(cls, ())) == set(read), cls
        for name, field in read.items():
            default = real[name].default
            if isinstance(field.default, configs.Tree):
                assert build(field.default) == default, (cls, name)
            elif not isinstance(field.default, str) or isinstance(default, str):
                assert field.default == default, (cls, name)
            assert field.classes or any(kind in configs.PARSERS for kind in field.types), (
                cls,
                name,
            )


# Presets
# -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_a_dry_run_prints_settings_that_give_themselves(capsys, name):
    assert command.main([name, "--dry-run"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert built(name, *printed) == built(name, f"run.folder=output/{name}")
    assert all(
        line in printed for line in (f"run.folder=output/{name}", "data.path=", "loss.accumulate=1")
    )


def test_presets_have_the_published_numbers():
    """NVlabs/rcm and thu-ml/TurboDiffusion, as the constants beside the losses give them."""
    sla, small, large = built("sla-14b"), built("rcm-1.3b"), built("rcm-14b")
    assert (
        sla["optimizer"] == optimizer.SLA
        and sla["loss"] == SLATrainingConfig()
        and sla["model"].sla.block_q == 64
    )
    assert (small["optimizer"], small["critic"], small["loss"]) == (
        optimizer.STUDENT_1_3B,
        optimizer.CRITIC_1_3B,
        rcm.RCM_1_3B,
    )
    assert (large["optimizer"], large["critic"], large["loss"]) == (
        optimizer.STUDENT_14B,
        optimizer.CRITIC_14B,
        rcm.RCM_14B,
    )
    assert set(METHODS) == {preset.method for preset in PRESETS.values()}


# Whole runs
# --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def quick_compiling():
    """These programs run a few times; compiling them well takes far longer than that."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Shards, a negative embedding, and weights of a tiny network in our layout and with a sparse
    projection."""
    out, rng = tmp_path_factory.mktemp("train"), np.random.default_rng(0)
    samples = [
        (rng.normal(size=(3, 4, 4, 4)), rng.normal(size=(7, 6)), f"prompt {i}") for i in range(5)
    ]
    for number in range(2):
        write_shard(
            out / "shards" / f"shard_{number:06}.tar",
            samples[3 * number : 3 * number + 3],
            3 * number,
        )
    (out / "negative.pt").write_bytes(
        torch_bytes(rng.normal(size=(7, 6)).astype(ml_dtypes.bfloat16))
    )
    bf16 = dataclasses.replace(TINY, policy=Policy())
    orbax.save(out / "dense", random_model.random_leaves("dit", bf16, 1), "dit", bf16)
    sparse = dataclasses.replace(bf16, attention="sla")
    orbax.save(out / "sparse", random_model.random_leaves("dit", sparse, 2), "dit", sparse)
    return out


def words(folder, *more):
    own = ["data.frames=2", "data.batch=4", "run.log_every=2", "model.compute=float32"]
    return [
        f"data.path={folder / 'shards'}",
        f"data.negative={folder / 'negative.pt'}",
        *own,
        *more,
    ]


def flow(folder, *more):
    """Flow matching whose program is the same in every test. Adam's eps is large, or it would
    magnify the rounding of small gradients."""
    fixed = [
        "optimizer.eps=1e-3",
        "optimizer.decay=constant",
        "optimizer.steps=none",
        "optimizer.warmup=0",
        "loss.dropout=0.5",
        "loss.ema.decay=0.9",
    ]
    return ["fm-tiny", f"model.weights={folder / 'dense'}", *words(folder, *fixed, *more)]


def prepared(preset, *settings):
    return Prepared(preset, PRESETS[preset].method, built(preset, *settings), {}, Stages(False))


def test_a_run_and_its_continuation(folder, tmp_path, capsys):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert command.main([*flow(folder, f"run.folder={whole}", "run.steps=4"), "-v"]) == 0
    out = capsys.readouterr()
    assert out.out == f"{whole / 'dit'}\n"
    assert (
        "compile flow" in out.err
        and "step 4/4  flow/loss" in out.err
        and f"saved {whole / 'step_000004'}" in out.err
    )
    assert [row["step"] for row in metrics.read(whole)] == [2, 4]
    assert all(row["flow/loss"] > 0 and row["flow/bad_samples"] == 0 for row in metrics.read(whole))

    assert command.main(flow(folder, f"run.folder={cut}", "run.steps=2", "run.keep=0")) == 0
    assert "exists" in fails(capsys.readouterr() and capsys, *flow(folder, f"run.folder={cut}"))
    assert command.main([*flow(folder, f"run.folder={cut}", "run.steps=4"), "--resume"]) == 0
    err = capsys.readouterr().err
    assert "going on from" in err and "was" not in err.replace("was left", "")
    read = lambda run: orbax.restore(run / "dit")
    assert read(whole)[0] == dataclasses.replace(TINY, sla=read(cut)[0].sla) == read(cut)[0]
    for a, b in zip(jax.tree.leaves(read(whole)[1]), jax.tree.leaves(read(cut)[1]), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    manifest = checkpoints.inspect(cut / "step_000004")
    assert (
        manifest["preset"] == "fm-tiny"
        and manifest["settings"]["loss.dropout"] == "0.5"
        and manifest["data"]["offset"] >= 0
    )
    assert checkpoints.steps(cut) == [2, 4]


def test_random_weights(folder):
    sizes = [
        f"model.dit.{name}={getattr(TINY, name)}"
        for name in ("dim", "heads", "ffn_dim", "layers", "freq_dim", "text_dim", "text_len")
    ]
    networks = Networks(built("fm-tiny", *sizes)["model"], "flow")
    assert networks.config == dataclasses.replace(
        networks.config, dim=32, layers=2, coordinates=True, policy=FLOAT32, out_channels=8
    )
    leaves = orbax.named_leaves(networks.load_student(None, 3))
    assert orbax.table(leaves) == orbax.table(orbax.named_leaves(networks.abstract()))
    assert (
        len(
            {
                np.asarray(leaf).tobytes()
                for name, leaf in leaves.items()
                if name.endswith("attn.q.kernel")
            }
        )
        == 2
    )


def test_four_devices_give_the_numbers_of_one(folder, tmp_path):
    """The same program as above, then laid over fsdp and tensor axes: weights, moments, average and
    batch are divided."""
    states, losses = [], []
    for name in ("auto", "fsdp=2,tp=2"):
        own = [
            f"run.folder={tmp_path / name[:4]}",
            "run.steps=2",
            f"run.mesh={name}",
            "run.log_every=1",
        ]
        run = prepared(*flow(folder, *own))
        states.append(checkpoints.arrays(run.train(resume=False).state))
        losses.append([row["flow/loss"] for row in metrics.read(tmp_path / name[:4])])
    one, four = states
    assert_close(losses[1], losses[0], "float32", "losses")
    kernels = [name for name in four if name.endswith("blocks.self_attn.q.kernel")]
    assert len(kernels) == 4  # model, average, two moments
    for name in kernels:
        assert {s.data.shape for s in four[name].addressable_shards} == {(2, 16, 16)}, name
    for name in one:
        if ".nu." not in name and ".mu." not in name:
            assert_close(four[name], one[name], "float32", name)


def test_changed_settings_are_told(folder, tmp_path, capsys):
    run = prepared(*flow(folder, f"run.folder={tmp_path}"))
    state = jax.tree.map(
        lambda x: jax.random.key(0) if checkpoints.is_key(x) else jnp.zeros(x.shape, x.dtype),
        run.shapes,
    )
    place = run.stream.saved(run.stream.batch(Position(offset=3))[1])
    checkpoints.save(
        tmp_path, 5, state, {"settings": {"a.b": "1", "run.steps": "3"}, "data": place}
    )
    run.settings = {"a.b": "2", "run.steps": "9"}
    _, _, position = run.start(resume=True)
    assert run.stream.saved(position) == place
    assert "a.b was 1, is 2" in (err := capsys.readouterr().err) and "run.steps" not in err


def test_a_sparse_student_begins_as_its_dense_teacher(folder):
    run = prepared("sla-1.3b", *words(folder, f"model.weights={folder / 'dense'}"))
    cfg = run.networks.config
    assert (cfg.attention, cfg.sla.block_q, cfg.policy) == ("sla", 64, FLOAT32)
    student, teacher = (
        orbax.named_leaves(run.networks.load_student(None, 0)),
        orbax.named_leaves(run.networks.load_teacher(None)),
    )
    projection = {name for name in student if ".core.proj." in name}
    assert len(projection) == 2 and student.keys() - projection == teacher.keys()
    assert all(not np.any(student[name]) for name in projection)
    assert all(
        student[name].dtype == np.float32 and np.array_equal(student[name], teacher[name])
        for name in teacher
    )


def test_a_student_of_its_own(folder):
    """An SLA fine-tuning that goes on from sparse weights, whose projection is kept."""
    networks = Networks(
        built(
            "sla-1.3b", f"model.weights={folder / 'dense'}", f"model.student={folder / 'sparse'}"
        )["model"],
        "sla",
    )
    student = orbax.named_leaves(networks.load_student(None, 0))
    stored = orbax.named_leaves(orbax.restore(folder / "sparse")[1])
    for name in stored:
        assert np.array_equal(student[name], np.asarray(stored[name], np.float32)), name
    assert np.any(student["blocks.self_attn.core.proj.kernel"])


def test_networks_lie_over_the_mesh(folder):
    run = prepared(
        "sla-1.3b", *words(folder, f"model.weights={folder / 'dense'}", "run.mesh=fsdp=2,tp=2")
    )
    for module in (run.networks.load_student(run.mesh, 0), run.networks.load_teacher(run.mesh)):
        for name, leaf in orbax.named_leaves(module).items():
            assert len(leaf.sharding.device_set) == 4, name
        assert {s.data.shape for s in module.blocks.up.kernel[...].addressable_shards} == {
            (2, 16, 24)
        }


@pytest.mark.parametrize(
    "loss",
    [
        "loss.frequency=2 loss.warmup=1",
        "loss.dmd_weight=0 loss.warmup=0",
        "loss.consistency=none loss.warmup=0",
    ],
)
def test_distillation_is_traced_before_weights_are_read(folder, loss):
    run = prepared("rcm-1.3b", *words(folder, f"model.weights={folder / 'dense'}", *loss.split()))
    critic = "dmd_weight=0" not in loss
    assert list(run.method.steps) == ["student", "critic"][: 1 + critic]
    frequency, warmup = run.config["loss"].frequency, run.config["loss"].warmup
    for i in range(12):
        assert (run.method.schedule.phase(i) == "student") == rcm.is_student_turn(
            run.config["loss"], i
        ), (frequency, warmup)
    assert (run.shapes.critic is not None) == critic
    assert run.networks.teacher.module is run.networks.student.module is None


@pytest.mark.parametrize(
    ("preset", "changes", "code", "expected"),
    [
        (
            "rcm-1.3b",
            ["data.negative="],
            2,
            ["data.negative is not given", "umT5_wan_negative_emb.pt"],
        ),
        ("rcm-1.3b", ["data.negative=nothing.pt"], 2, ["nothing.pt does not exist"]),
        ("sla-1.3b", ["data.frames=4"], 3, ["000000.latent.pt has 3 latent frames", "data.frames"]),
        ("sla-1.3b", ["loss.accumulate=3"], 2, ["batch of 4 cannot be divided into 3"]),
        ("sla-1.3b", ["run.mesh=fsdp=3"], 2, ["data.batch is 4", "multiple of 3"]),
        ("sla-1.3b", ["run.mesh=tp=4"], 2, ["divides 2 attention heads by 4"]),
        ("sla-1.3b", ["optimizer.train=nothing"], 2, ["no weight matches 'nothing'"]),
        ("sla-1.3b", ["model.weights="], 2, ["model.weights is not given"]),
        ("sla-1.3b", ["model.weights=sla-9b"], 2, ["unknown model 'sla-9b'"]),
        ("sla-1.3b", ["model.weights=SPARSE"], 3, ["the teacher has sparse attention"]),
    ],
)
def test_what_does_not_fit_is_refused_before_weights_are_read(
    folder, tmp_path, capsys, monkeypatch, preset, changes, code, expected
):
    monkeypatch.setattr(Networks, "load_teacher", lambda *_: pytest.fail("weights were read"))
    given = [f"model.weights={folder / 'dense'}", f"run.folder={tmp_path / 'run'}", *changes]
    err = fails(
        capsys,
        preset,
        *words(folder, *[word.replace("SPARSE", str(folder / "sparse")) for word in given]),
        code=code,
    )
    assert all(word in err for word in expected), err


def test_an_interrupt_has_its_code(folder, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    outcome = Outcome(state=None, step=3, checkpoint=run / "step_000003", interrupted=True)
    monkeypatch.setattr(Prepared, "train", lambda self, resume: outcome)
    monkeypatch.setattr(Prepared, "export", lambda *_: pytest.fail("nothing is exported"))
    err = fails(capsys, *flow(folder, f"run.folder={run}"), code=130)
    assert f"stopped at step 3 of 11000; --resume goes on from {run / 'step_000003'}" in err
    monkeypatch.setattr(Prepared, "train", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert "checkpoints are whole" in fails(capsys, *flow(folder, f"run.folder={run}"), code=130)


def test_out_of_memory_has_its_code(folder, tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(Prepared, "start", lambda *_: (None, None, Position()))
    monkeypatch.setattr(loop, "train", full)
    err = fails(capsys, *flow(folder, f"run.folder={tmp_path / 'run'}"), code=4)
    assert "out of device memory in a training step" in err and "smaller data.batch" in err
