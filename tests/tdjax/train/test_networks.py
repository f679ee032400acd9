"""Student and teacher: from files, from random numbers, over a mesh."""

import dataclasses

import numpy as np
import pytest
import random_model
from run_cases import TINY, built, training_run, words

from tdjax.checkpoints import orbax
from tdjax.errors import UsageError
from tdjax.precision import FLOAT32
from tdjax.train.networks import Networks
from tdjax.train.shards import DataError, write_shard
from tdjax.train.stream import Position


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_sparse_student_begins_as_its_dense_teacher(folder):
    run = training_run("sla-1.3b", *words(folder, f"model.weights={folder / 'dense'}"))
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


@pytest.fixture(scope="module")
def of_clip(tmp_path_factory):
    """A network with an image branch, shards of what it reads, and others without CLIP features."""
    out, rng = tmp_path_factory.mktemp("clip"), np.random.default_rng(0)
    cfg = dataclasses.replace(TINY, in_channels=12, image_dim=8)
    orbax.save(out / "dense", random_model.random_leaves("dit", cfg, 1), "dit", cfg)
    noise = lambda: rng.normal(size=(2, 4, 4, 4))
    row = lambda: (noise(), rng.normal(size=(7, 6)), "a prompt", noise())
    rows = [(*row(), rng.normal(size=(257, 8))) for _ in range(2)]
    write_shard(out / "shards" / "shard_000000.tar", rows)
    write_shard(out / "without" / "shard_000000.tar", [row()])
    return out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "more"),
    [
        ("fm-tiny", ["loss.dropout=0.5"]),
        ("fm-tiny", ["loss.dropout=0.5", "model.lora.rank=2"]),
        ("sla-1.3b", []),
        ("rcm-1.3b", []),
        ("rcm-1.3b", ["loss.consistency=DCM", "loss.dmd_weight=0", "loss.warmup=0"]),
    ],
)
def test_every_method_gives_the_image_branch_its_features(folder, of_clip, preset, more):
    """Every step of a run is traced: a call of the network without them is refused there."""
    given = [f"model.weights={of_clip / 'dense'}", f"data.path={of_clip / 'shards'}", *more]
    run = training_run(preset, *words(folder, *given))
    assert run.networks.config.image_dim == 8
    batch, _ = run.stream.batch(Position())
    assert batch.image.shape == (4, 2, 4, 4, 8) and batch.features.shape == (4, 257, 8)
    if run.networks.selection is not None:
        assert "blocks.cross_attn.k_img" in run.networks.selection.layers


def test_shards_without_clip_features(folder, of_clip):
    given = [f"model.weights={of_clip / 'dense'}", f"data.path={of_clip / 'without'}"]
    with pytest.raises(DataError, match="has no CLIP features beside it"):
        training_run("sla-1.3b", *words(folder, *given))


@pytest.mark.slow
def test_networks_lie_over_the_mesh(folder):
    run = training_run(
        "sla-1.3b", *words(folder, f"model.weights={folder / 'dense'}", "run.mesh=fsdp=2,tp=2")
    )
    for module in (run.networks.load_student(run.mesh, 0), run.networks.load_teacher(run.mesh)):
        for name, leaf in orbax.named_leaves(module).items():
            assert len(leaf.sharding.device_set) == 4, name
        assert {s.data.shape for s in module.blocks.up.kernel[...].addressable_shards} == {
            (2, 16, 24)
        }


@pytest.mark.slow
def test_one_of_two_experts_with_the_image_that_it_reads(i2v_model, tmp_path):
    """Every step of its run is traced, with mask and image latents from the shards."""
    rng = np.random.default_rng(0)
    noise = lambda: rng.normal(size=(2, 4, 4, 8))
    write_shard(
        tmp_path / "shard_000000.tar", [(noise(), rng.normal(size=(32, 64)), "a prompt", noise())]
    )
    given = ["data.frames=2", "data.batch=4", "loss.accumulate=1", "model.compute=float32"]
    given += [f"model.weights={i2v_model}", f"data.path={tmp_path}"]
    for expert, times in (("high", (0.9, 1.0)), ("low", (0.0, 0.9))):
        run = training_run(f"sla-a14b-i2v-{expert}", *given)
        assert run.networks.student.path.name == run.networks.teacher.path.name == f"dit_{expert}"
        loss = run.config["loss"]
        assert (loss.time_from, loss.time_to) == times
        batch, _ = run.stream.batch(Position())
        assert batch.image.shape == (4, 2, 4, 4, 12) and run.networks.config.in_channels == 20
    with pytest.raises(UsageError, match="has two transformers") as error:
        training_run("sla-14b", *given)
    assert "model.expert=high or low" in error.value.fix
    write_shard(tmp_path / "shard_000000.tar", [(noise(), np.ones((32, 64)), "")], overwrite=True)
    with pytest.raises(DataError, match="no latents of its first frame"):
        training_run("sla-a14b-i2v-low", *given)
