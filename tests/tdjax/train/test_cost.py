"""FLOPs of a step, against what XLA counts in the program of a network."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from dit_cases import TINY

from tdjax.config import SLAConfig
from tdjax.models.abstract import as_shapes
from tdjax.models.wan_dit import DiT
from tdjax.train import cost
from tdjax.train.configs import DCM, RCMConfig, SLATrainingConfig


@pytest.mark.slow
def test_a_forward_pass():
    """XLA also counts sums, exponentials and embeddings, a few parts in a hundred here."""
    sizes = {"dim": 128, "ffn_dim": 640, "heads": 2, "patch": (1, 1, 2)}
    cfg = dataclasses.replace(TINY, layers=1, remat=False, **sizes)
    shapes = [(1, 4, 16, 32, 3), (1,), (1, 4, 5)]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    run = jax.jit(lambda model, *arrays: model(*arrays)).lower(as_shapes(DiT, cfg), *arrays)
    counted = run.cost_analysis()["flops"]
    ours = cost.forward_flops(cfg, (4, 16, 32), 4)
    assert 0.85 * counted < ours < counted
    twice = cost.forward_flops(dataclasses.replace(cfg, layers=2), (4, 16, 32), 4)
    assert twice == 2 * ours


def test_the_published_sizes():
    """1.3B at 480p, 32,760 tokens: 82 TFLOP of products with weights, 198 of scores and values, 3
    of the text's; a tenth of the scores where attention is sparse."""
    full = cost.forward_flops(dataclasses.replace(TINY, **SIZES), (21, 60, 104), 512)
    assert full == pytest.approx(2.83e14, rel=0.02)
    sparse = dataclasses.replace(TINY, attention="sla", sla=SLAConfig(topk=0.1), **SIZES)
    counted = cost.forward_flops(sparse, (21, 60, 104), 512)
    assert counted == pytest.approx(1.06e14, rel=0.02)


SIZES = {"dim": 1536, "ffn_dim": 8960, "layers": 30, "heads": 12, "patch": (1, 2, 2)}


def test_steps_are_made_of_passes():
    assert cost.step_flops("flow", None, 10.0, 100.0, True) == {"flow": 30.0}
    assert cost.step_flops("flow", None, 10.0, 100.0, False) == {"flow": 20.0}
    assert cost.step_flops("sla", SLATrainingConfig(), 10.0, 100.0, True) == {"sla": 130.0}
    rcm = cost.step_flops("rcm", RCMConfig(), 10.0, 10.0, True)
    # guided teacher, value and derivative, gradient; 1.5 simulated, gradient, teacher, critic
    first = 20 + 20 + 30
    assert rcm == {
        "student": first + 15 + 30 + 20 + 10,
        "critic": 15 + 10 + 30,
        "student, warm-up": first,
    }
    alone = RCMConfig(dmd_weight=0, consistency=DCM(skip=2), guidance=1, warmup=0)
    assert cost.step_flops("rcm", alone, 10.0, 10.0, True) == {"student": 20 + 10 + 30}


def test_a_cpu_has_no_peak_that_is_known():
    assert cost.peak_tflops() is None
