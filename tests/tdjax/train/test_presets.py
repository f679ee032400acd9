"""Presets have the published numbers."""

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
    assert small["loss"] == RCMConfig(frequency=5, warmup=1000)
    large = built("rcm-14b")
    consistency = SCM(time=LogNormal(mean=1.5, deviation=1.6))
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
