"""Parts of a run that wait on the host: what is there, and what is refused. That numbers stay the
same is in test_meshes.py."""

import jax
import numpy as np
import pytest
from run_cases import built, training_run, words

from tdjax.errors import UsageError
from tdjax.train import methods
from tdjax.train import run as runs
from tdjax.train.turns import Turns

TURNS = ["loss.warmup=1", "loss.frequency=3", "loss.guidance=1", "run.steps=5"]
SHORT = ["loss.consistency=none", "loss.warmup=0"]  # a step without a tangent is soon traced


def settings(folder, out, *more):
    fixed = [f"model.weights={folder / 'dense'}", f"run.folder={out}", "run.log_every=1"]
    return words(folder, *TURNS, *fixed, *more)


@pytest.mark.slow
def test_what_leaves_is_gone_from_the_device(folder, tmp_path):
    """Over two devices; what comes back is what has left, and lies where it did."""
    more = "run.mesh=fsdp=2", "loss.offload=true", *SHORT
    run = training_run("rcm-1.3b", *settings(folder, tmp_path, *more))
    state, teacher, _ = run.start(resume=False)
    turns, parts = Turns(methods.UNUSED), (state.opt, state.ema, teacher.model)
    before, lies = jax.device_get(parts), [x.sharding for x in jax.tree.leaves(parts)]
    state, teacher = turns.begin("critic", state, teacher)
    assert all(x.is_deleted() for x in jax.tree.leaves(parts))
    state, teacher = turns.begin("critic", state, teacher)  # another turn moves nothing
    assert teacher.model is None and state.critic_opt is not None
    state, teacher = turns.whole(state, teacher)
    parts = state.opt, state.ema, teacher.model
    assert jax.tree.all(jax.tree.map(np.array_equal, before, parts))
    assert [x.sharding for x in jax.tree.leaves(parts)] == lies


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
