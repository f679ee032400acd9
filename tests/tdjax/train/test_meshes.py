"""Every method over eight fake devices gives the numbers of one, and distillation whose parts wait
on the host the bits of one without."""

import eight_devices
import hosts_cases
import jax
import numpy as np
import pytest
from eight_devices import run_of
from train_cases import same_bits

from tdjax.models.wan_dit import HOST_MEMORY
from tdjax.train import checkpoints, methods, metrics
from tdjax.train.turns import Turns

# Sums of other devices come in another order: float32, over some hundred numbers.
RELATIVE = 1e-6
# What a run says of its machine, and not of its numbers.
TIMES = ("second", "memory", "peak", "tflops", "gib")
DISTILLED = "run.steps=5", "run.save_every=3"


def numbers(out):
    rows = metrics.read(out)
    return [{k: v for k, v in row.items() if not any(t in k for t in TIMES)} for row in rows]


@pytest.fixture(scope="module")
def distilled(folder, tmp_path_factory):
    """(run folder, outcome) of rCM on one device, with a checkpoint in the critic's turns."""
    where = tmp_path_factory.mktemp("one") / "rcm"
    return where, run_of("rcm", folder, where, *DISTILLED).train(resume=False)


@pytest.mark.slow
def test_eight_devices_give_the_numbers_of_one(folder, distilled, tmp_path):
    """Student and critic of rCM over copies, parameters and tokens, with parts on the host; sparse
    attention with heads divided as well, in two parts."""
    eight, one = tmp_path / "eight", {"rcm": distilled[0], "sla": tmp_path / "sla"}
    hosts_cases.output(eight_devices.__file__, tmp_path / "cache", folder, eight, devices=8)
    run_of("sla", folder, one["sla"]).train(resume=False)
    for name, steps in {"rcm": 4, "sla": 2}.items():
        whole, divided = numbers(one[name])[:steps], numbers(eight / name)
        assert len(whole) == len(divided) == steps
        for a, b in zip(whole, divided, strict=True):
            assert a.keys() == b.keys() and any(key.endswith("loss") for key in a)
            for key in a:
                assert np.isclose(a[key], b[key], RELATIVE, 0), (name, key, a[key], b[key])


@pytest.mark.slow
def test_a_run_with_parts_on_the_host_has_the_bits_of_one_without(
    folder, distilled, tmp_path, monkeypatch
):
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
    run = run_of("rcm", folder, tmp_path, *DISTILLED, "loss.offload=true")
    both = distilled, (tmp_path, run.train(resume=False))
    assert [phase for phase, _ in taken] == ["student", "student", "critic", "critic", "student"]
    assert [missing for _, missing in taken] == [set(methods.UNUSED[phase]) for phase, _ in taken]
    early = []
    for where, outcome in both:
        assert HOST_MEMORY not in kinds_of(outcome.state)
        shapes = jax.eval_shape(lambda x: x, outcome.state)
        early.append(checkpoints.restore(checkpoints.folder(where, 3), shapes))
    rows = [numbers(where) for where, _ in both]
    assert rows[0] == rows[1] and len(rows[0]) == 5
    same_bits(*(outcome.state for _, outcome in both))
    same_bits(*early)


def kinds_of(tree):
    return {leaf.sharding.memory_kind for leaf in jax.tree.leaves(tree)}
