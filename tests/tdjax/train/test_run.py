"""Whole runs of a tiny network, and what is refused before weights are read."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from run_cases import TINY, fails, flow, training_run, words
from tolerances import assert_close

from convert.export import export
from convert.leaves import open_leaves
from tdjax.checkpoints import orbax
from tdjax.checkpoints.published import checkpoint
from tdjax.errors import UsageError
from tdjax.train import __main__ as command
from tdjax.train import checkpoints, flow_matching, loop, metrics, plan
from tdjax.train import run as run_module
from tdjax.train.configs import RunConfig
from tdjax.train.loop import Outcome
from tdjax.train.networks import Networks
from tdjax.train.run import TrainingRun
from tdjax.train.shards import DataError, write_shard
from tdjax.train.stream import Position


@pytest.mark.slow
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


@pytest.mark.slow
def test_four_devices_give_the_numbers_of_one(folder, tmp_path, monkeypatch):
    """The same program as above, then laid over fsdp and tensor axes: weights, moments, average and
    batch are divided. Steps are traced when they are checked, and not again."""
    states, losses, traced = [], [], []
    loss = flow_matching.flow_matching_loss
    count = lambda *args, **kwargs: traced.append(1) or loss(*args, **kwargs)
    monkeypatch.setattr(flow_matching, "flow_matching_loss", count)
    for name in ("auto", "fsdp=2,tp=2"):
        own = [
            f"run.folder={tmp_path / name[:4]}",
            "run.steps=2",
            f"run.mesh={name}",
            "run.log_every=1",
        ]
        run = training_run(*flow(folder, *own))
        checked = len(traced)
        states.append(checkpoints.arrays(run.train(resume=False).state))
        assert len(traced) == checked > 0
        traced.clear()
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "more"),
    [
        ("sla-1.3b", []),
        ("rcm-1.3b", ["loss.dmd_weight=0", "loss.warmup=0"]),  # soon traced
        ("lora-1.3b", []),
    ],
)
def test_published_weights_begin_a_run_on_a_mesh(preset, more, folder, tmp_path, monkeypatch):
    """Read piece by piece on one device, as on GPUs, before they are divided."""
    file = tmp_path / "dense.safetensors"
    export(open_leaves(folder / "dense"), file)
    monkeypatch.setattr(checkpoint, "HOST", ())
    monkeypatch.setattr(checkpoint, "ON_DEVICE", 0)
    own = ["run.mesh=fsdp=2", f"model.weights={file}", f"run.folder={tmp_path / 'run'}"]
    run = training_run(preset, *words(folder, *own, *more))
    state, *_ = run.start(resume=False)
    mesh = {leaf.sharding.mesh.size for leaf in jax.tree.leaves(state.model)}
    assert mesh == {2}


@pytest.mark.slow
def test_changed_settings_are_told(folder, tmp_path, capsys):
    run = training_run(*flow(folder, f"run.folder={tmp_path}"))
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


@pytest.mark.slow
@pytest.mark.parametrize(
    "loss",
    [
        "loss.frequency=2 loss.warmup=1",
        "loss.dmd_weight=0 loss.warmup=0",
        "loss.consistency=none loss.warmup=0",
    ],
)
def test_distillation_is_traced_before_weights_are_read(folder, loss):
    run = training_run(
        "rcm-1.3b", *words(folder, f"model.weights={folder / 'dense'}", *loss.split())
    )
    critic = "dmd_weight=0" not in loss
    assert list(run.method.steps) == ["student", "critic"][: 1 + critic]
    phases = {run.method.schedule.phase(i) for i in range(12)}
    assert phases == set(run.method.steps)
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
        (
            "rcm-1.3b",
            ["loss.consistency.tangent=discrete"],
            2,
            ["loss.consistency.tangent is 'discrete'", "rounds its timestep", "tangent=exact"],
        ),
        ("rcm-1.3b", ["loss.rollout=1.5"], 2, ["RCMConfig.rollout is 1.5; 3 times or more"]),
        ("sla-1.3b", ["data.frames=4"], 3, ["000000.latent.pt has 3 latent frames", "data.frames"]),
        ("sla-1.3b", ["loss.accumulate=3"], 2, ["batch of 4 cannot be divided into 3"]),
        ("sla-1.3b", ["run.mesh=fsdp=3"], 2, ["data.batch is 4", "multiple of 3"]),
        ("sla-1.3b", ["run.mesh=tp=4"], 2, ["divides 2 attention heads by 4"]),
        ("sla-1.3b", ["run.mesh=cfg=2,fsdp=2"], 2, ["has the axis cfg=2", "guided steps"]),
        ("sla-1.3b", ["optimizer.train=nothing"], 2, ["no weight matches 'nothing'"]),
        ("sla-1.3b", ["model.weights="], 2, ["model.weights is not given"]),
        ("sla-1.3b", ["model.weights=sla-9b"], 2, ["unknown model 'sla-9b'"]),
        (
            "sla-1.3b",
            ["run.keep_gib=1e-6"],
            2,
            ["run.keep_gib is 1e-06", "one stays while the next"],
        ),
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


@pytest.mark.slow
def test_an_interrupt_has_its_code(folder, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    outcome = Outcome(state=None, step=3, checkpoint=run / "step_000003", interrupted=True)
    monkeypatch.setattr(TrainingRun, "train", lambda self, resume: outcome)
    monkeypatch.setattr(TrainingRun, "export", lambda *_: pytest.fail("nothing is exported"))
    err = fails(capsys, *flow(folder, f"run.folder={run}"), code=130)
    assert f"stopped at step 3 of 11000; --resume goes on from {run / 'step_000003'}" in err
    monkeypatch.setattr(TrainingRun, "train", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert "checkpoints are whole" in fails(capsys, *flow(folder, f"run.folder={run}"), code=130)


def test_out_of_memory_has_its_code(folder, tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(TrainingRun, "start", lambda *_: (None, None, Position()))
    monkeypatch.setattr(loop, "train", full)
    err = fails(capsys, *flow(folder, f"run.folder={tmp_path / 'run'}"), code=4)
    assert "out of device memory in a training step" in err
    assert err.index("loss.accumulate=N") < err.index("run.mesh") < err.index("smaller data.batch")


@pytest.mark.slow
def test_prompts_alone_for_distribution_matching(folder, tmp_path):
    """Every step is traced with latents of zeros, of which only the shape counts; other methods
    refuse such shards."""
    text = np.random.default_rng(0).normal(size=(7, 6))
    write_shard(tmp_path / "shard_000000.tar", [(None, text, "a prompt")])
    given = [f"model.weights={folder / 'dense'}", *words(folder, f"data.path={tmp_path}")]
    alone = ["loss.consistency=none", "loss.warmup=0"]
    run = training_run("rcm-1.3b", *given, *alone, "data.size=48x32")
    batch, _ = run.stream.batch(Position())
    assert batch.latents.shape == (4, 2, 4, 6, 4) and not batch.latents.any()
    for preset, more in (("rcm-1.3b", ["data.size=48x32"]), ("rcm-1.3b", alone), ("sla-1.3b", [])):
        with pytest.raises(DataError, match="prompts without latents"):
            training_run(preset, *given, *more)


def test_a_run_does_not_begin_where_the_disk_has_no_room(folder, tmp_path, monkeypatch):
    """Four checkpoints and the weights twice; on a continuation, those that are not there yet."""
    words = flow(folder, f"run.folder={tmp_path}", "run.steps=9000", "run.save_every=1000")
    run = training_run(*words)
    size = plan.whole_bytes(run.shapes)
    network = sum(x.nbytes for x in jax.tree.leaves(orbax.restore(folder / "dense")[1])) * 2
    free = 4 * size + 2 * network
    usage = lambda _: types.SimpleNamespace(free=free)
    monkeypatch.setattr(run_module.shutil, "disk_usage", usage)
    monkeypatch.setattr(TrainingRun, "start", lambda *_: (_ for _ in ()).throw(DataError("begun")))
    with pytest.raises(DataError, match="begun"):
        run.train(resume=False)
    free -= 1
    with pytest.raises(UsageError, match=r"GiB free\nthe run's checkpoints.*\n.*run.keep=1"):
        run.train(resume=False)
    monkeypatch.setattr(checkpoints, "steps", lambda _: [1000])
    with pytest.raises(DataError, match="begun"):
        run.train(resume=True)


def test_checkpoints_are_bounded_by_their_size():
    run = RunConfig(keep=5, keep_gib=4.5)
    assert plan.bounded(run, 2**30).keep == 3  # and one that is being written
    assert plan.bounded(run, 2**29).keep == 5
    assert plan.bounded(dataclasses.replace(run, keep=0), 2**29).keep == 8
    assert plan.bounded(RunConfig(keep=0), 2**40).keep == 0
    with pytest.raises(UsageError, match=r"run.keep_gib is 4.5\na checkpoint is 3 GiB.*\n.* 6.03"):
        plan.bounded(run, 3 * 2**30)
