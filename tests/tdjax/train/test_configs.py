"""What the classes refuse, the published numbers among their defaults."""

import numpy as np
import pytest

from tdjax.train import configs, consistency
from tdjax.train.configs import (
    DCM,
    SCM,
    FlowMatchingConfig,
    LogNormal,
    RCMConfig,
    SLATrainingConfig,
)


@pytest.mark.parametrize(
    "message, make",
    [
        ("accumulate is 0", lambda: RCMConfig(accumulate=0)),
        ("accumulate is 0", lambda: SLATrainingConfig(accumulate=0)),
        ("dropout is 1; it is a probability", lambda: FlowMatchingConfig(dropout=1)),
        (
            "target is 'student'; allowed: teacher, data",
            lambda: SLATrainingConfig(target="student"),
        ),
        ("guidance is 0.5", lambda: RCMConfig(guidance=0.5)),
        ("dmd_weight -1 must not be negative", lambda: RCMConfig(dmd_weight=-1)),
        ("max_steps 0 and frequency 5", lambda: RCMConfig(max_steps=0)),
        ("frequency 1 gives the critic no turn", lambda: RCMConfig(frequency=1)),
        ("without a consistency term, warmup must be 0", lambda: RCMConfig(consistency=None)),
        ("kappa 0 must be positive", lambda: SCM(kappa=0)),
        ("rollout is 1.5,1.4; 3 times or more", lambda: RCMConfig(rollout=(1.5, 1.4))),
        ("rollout is 1.0,1.4,1.5; .*falling", lambda: RCMConfig(rollout=(1.0, 1.4, 1.5))),
        ("tangent is 'fd'; allowed: exact, semidiscrete, discrete", lambda: SCM(tangent="fd")),
        ("warmup_form is 'code'; allowed: paper, code2026", lambda: SCM(warmup_form="code")),
        ("interval is 0; allowed", lambda: SCM(interval=0)),
        ("skip 48 must be at least 1 and less than steps 48", lambda: DCM(skip=48)),
    ],
)
def test_refused_settings(message, make):
    with pytest.raises(ValueError, match=message):
        make()


def test_published_settings():
    """The defaults of rCM are those of the 1.3B run, whose numbers grow with a sample's size."""
    config = RCMConfig()
    assert (config.frequency, config.warmup) == (5, 1000)
    assert config.consistency.time == LogNormal(mean=0.7, deviation=1.6)
    size = 16 * 20 * 60 * 104
    np.testing.assert_allclose(SCM().kappa * size**0.5, 100, rtol=0.02)
    np.testing.assert_allclose(SCM().floor * size**0.5, 0.1, rtol=0.02)
    assert SLATrainingConfig().time == LogNormal(mean=1.5, deviation=1.6)


def test_what_can_be_set_is_what_the_code_has():
    assert tuple(consistency.TANGENT) == configs.TANGENTS
