"""Parts of a run that wait on the host: what a step is given, and numbers that stay the same."""

import jax
import numpy as np
import pytest
from run_cases import built, training_run, words
from train_cases import same_bits

from tdjax.errors import UsageError
from tdjax.models.wan_dit import HOST_MEMORY
from tdjax.train import checkpoints, methods, metrics
from tdjax.train import run as runs
from tdjax.train.turns import Turns

TURNS = ["loss.warmup=1", "loss.frequency=3", "loss.guidance=1", "run.steps=5"]
SHORT = ["loss.consistency=none", "loss.warmup=0"]  # a step without a tangent is soon traced
TIMES = ("second", "memory", "peak", "tflops")


def settings(folder, out, *more):
    fixed = [f"model.weights={folder / 'dense'}", f"run.folder={out}", "run.log_every=1"]
    return words(folder, *TURNS, *fixed, *more)


def numbers(out):
    rows = metrics.read(out)
    return [{k: v for k, v in row.items() if not any(t in k for t in TIMES)} for row in rows]


@pytest.mark.slow
def test_a_run_with_parts_on_the_host_has_the_bits_of_one_without(folder, tmp_path, monkeypatch):
    """Student, its warm-up, critic, and a checkpoint in the middle of the critic's turns."""
    taken = []
    inside = Turns.begin

    def begin(self, phase, state, teacher):
        state, teacher = inside(self, phase, state, teacher)
        kinds = {name: kinds_of(part) for name, part in self._waiting.items()}
        assert set().union(*kinds.values()) <= {HOST_MEMORY}
        parts = {"critic_opt", "ema", "opt"}
        missing = {name for name in parts if getattr(state, name) is None}
        missing |= {"teacher"} if teacher.model is None else set()
        assert missing == kinds.keys()
        taken.append((phase, missing))
        return state, teacher

    monkeypatch.setattr(Turns, "begin", begin)
    out = {}
    for offload in ("false", "true"):
        taken.clear()
        where = tmp_path / offload
        more = ("run.mesh=fsdp=2", f"loss.offload={offload}", "run.save_every=3")
        outcome = training_run("rcm-1.3b", *settings(folder, where, *more)).train(resume=False)
        assert {kind != HOST_MEMORY for kind in kinds_of(outcome.state)} == {True}
        out[offload] = outcome.state, numbers(where)
        shapes = jax.eval_shape(lambda x: x, outcome.state)
        middle = checkpoints.restore(checkpoints.folder(where, 3), shapes)
        out[offload] += (middle,)
    assert [phase for phase, _ in taken] == ["student", "student", "critic", "critic", "student"]
    assert [missing for _, missing in taken] == [set(methods.UNUSED[phase]) for phase, _ in taken]
    (one, rows, early), (other, same, also) = out.values()
    assert rows == same and len(rows) == 5
    same_bits(one, other)
    same_bits(early, also)


def kinds_of(tree):
    return {leaf.sharding.memory_kind for leaf in jax.tree.leaves(tree)}


@pytest.mark.slow
def test_what_leaves_is_gone_from_the_device(folder, tmp_path):
    run = training_run("rcm-1.3b", *settings(folder, tmp_path, "loss.offload=true", *SHORT))
    state, teacher, _ = run.start(resume=False)
    before, turns = np.asarray(jax.tree.leaves(state.opt)[1]), Turns(methods.UNUSED)
    moments, weights = jax.tree.leaves(state.opt), jax.tree.leaves(teacher.model)
    state, teacher = turns.begin("critic", state, teacher)
    assert all(x.is_deleted() for x in (*moments, *weights))
    state, teacher = turns.begin("critic", state, teacher)  # another turn moves nothing
    assert teacher.model is None and state.critic_opt is not None
    state, teacher = turns.whole(state, teacher)
    assert np.array_equal(before, jax.tree.leaves(state.opt)[1]) and teacher.model is not None


@pytest.mark.slow
def test_the_base_of_adapters_stays(folder, tmp_path):
    """The critic of adapters lies over the teacher's weights."""
    more = ["loss.offload=true", "model.lora.rank=2", *SHORT]
    run = training_run("rcm-1.3b", *settings(folder, tmp_path, *more))
    assert run._unused() == {"student": ("critic_opt",), "critic": ("ema", "opt")}


@pytest.mark.parametrize("setting", ["loss.offload=true", "model.remat=offload"])
def test_a_device_without_the_hosts_memory_is_refused(folder, tmp_path, setting, monkeypatch):
    class Device:
        def addressable_memories(self):
            return [type("Memory", (), {"kind": "device"})]

    monkeypatch.setattr(runs.jax, "local_devices", lambda: [Device()])
    with pytest.raises(UsageError, match="reaches device, and no pinned_host"):
        training_run("rcm-1.3b", *settings(folder, tmp_path, setting))


def test_one_network_alone_has_no_turns():
    with pytest.raises(UsageError, match="there are no turns"):
        built("rcm-1.3b", "loss.offload=true", "loss.dmd_weight=0")
