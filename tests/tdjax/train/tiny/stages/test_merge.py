"""Merging adds up, and healing takes the times of the sampler."""

import jax
import numpy as np
import pytest
import tiny_cases
from tolerances import assert_close

from tdjax.checkpoints import orbax
from tdjax.train import times
from tdjax.train.tiny.evaluation import sampling
from tdjax.train.tiny.stages import merge, sla


@pytest.mark.slow
def test_merging_adds_what_sparse_attention_changed():
    student, before = tiny_cases.dit(seed=1), tiny_cases.dit(seed=2)
    after = sla.sparse(tiny_cases.dit(seed=3), tiny_cases.SLA, "float32")
    leaves = orbax.named_leaves(after)
    leaves["blocks.self_attn.core.proj.bias"] = leaves["blocks.self_attn.core.proj.bias"] + 0.5
    after = orbax.assemble(orbax.abstract("dit", tiny_cases.SLA), leaves)
    out = orbax.named_leaves(merge.merged(student, before, after, tiny_cases.SLA, "float32"))
    name = "blocks.up.kernel"
    a, b, c = (orbax.named_leaves(model)[name] for model in (student, before, after))
    assert_close(out[name], a + c - b, "float32")
    assert np.all(np.asarray(out["blocks.self_attn.core.proj.bias"]) == 0.5)


def test_healing_takes_the_times_of_the_sampler():
    found = np.asarray(times.draw(merge.STUDENT_TIMES, jax.random.key(0), (400,)))
    grid = sampling.student(4)
    wanted = np.log(np.tan([np.arctan(grid.sigma_max), *grid.mid_t]))
    assert np.allclose(np.unique(found), np.sort(wanted), atol=1e-5)
