"""Presets have the published numbers."""

import dataclasses

from run_cases import built

from tdjax.config import SLAConfig
from tdjax.train.configs import SCM, LogNormal, OptimizerConfig, RCMConfig, SLATrainingConfig
from tdjax.train.presets import METHODS, PRESETS


def test_presets_have_the_published_numbers():
    """NVlabs/rcm rcm/configs/experiments and thu-ml/TurboDiffusion
    turbodiffusion/rcm/configs/experiments/sla."""
    sla = built("sla-14b")
    assert sla["loss"] == SLATrainingConfig()
    assert sla["model"].sla == SLAConfig(topk=0.1, block_q=64, block_k=64)
    small = built("rcm-1.3b")
    assert small["loss"] == RCMConfig(consistency=SCM(kappa=None), frequency=5, warmup=1000)
    large = built("rcm-14b")
    consistency = SCM(kappa=None, time=LogNormal(mean=1.5, deviation=1.6))
    assert large["loss"] == RCMConfig(consistency=consistency, frequency=10, warmup=0)
    published = {"b2": 0.999, "eps": 1e-8, "weight_decay": 0.01, "warmup": 100}
    for config, rate, b1 in (
        (sla["optimizer"], 1e-5, 0.9),
        (small["optimizer"], 2e-6, 0.0),
        (small["critic"], 4e-7, 0.0),
        (large["optimizer"], 1e-6, 0.0),
        (large["critic"], 1e-7, 0.0),
    ):
        assert config == OptimizerConfig(learning_rate=rate, b1=b1, **published)
        assert (config.clip, config.decay) == (None, "constant")
    assert set(METHODS) == {preset.method for preset in PRESETS.values()}


def test_the_official_code_at_two_dates():
    now, before, later = (built(f"rcm-1.3b{date}") for date in ("", "-2025", "-2026"))
    assert before["loss"] == dataclasses.replace(now["loss"], guidance=6.0)
    form = dataclasses.replace(now["loss"].consistency, warmup_form="code2026")
    assert later["loss"] == dataclasses.replace(now["loss"], consistency=form)
    assert (now["loss"].guidance, now["loss"].consistency.warmup_form) == (5.0, "paper")
