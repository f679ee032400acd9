"""What a run needs, said before anything is loaded."""

import numpy as np
from run_cases import built

from tdjax.train import plan


def test_what_waits_on_the_host_is_counted():
    lines = {}
    for offload in ("false", "true"):
        given = f"loss.offload={offload}", "run.mesh=fsdp=2", "data.batch=8"
        lines[offload] = plan.lines("rcm", built("rcm-1.3b", *given))
    amount = lambda which, what: next(
        float(line.split()[0]) for line in lines[which] if what in line
    )
    assert not any("page-locked" in line for line in lines["false"])
    spared = amount("true", "of these on the host")
    assert spared < 0
    assert np.isclose(amount("false", "together") + spared, amount("true", "together"), atol=0.011)
    # the critic's moment, one of five arrays of the state
    assert np.isclose(spared, -amount("true", "weights, average") / 5, atol=0.02)


def test_hours_are_said_by_a_measured_step():
    """Those of sla-1.3b, 6.22 s for four clips, and of a network that nobody has timed."""
    config = built("sla-1.3b", "run.mesh=fsdp=4", "run.steps=1000", "data.batch=8")
    (line,) = [line for line in plan.lines("sla", config) if line.startswith("hours")]
    hours = 1000 * 8 * 6.22 / 4 / 3600
    assert line.startswith(f"hours: {hours:.1f} on one H200, {hours / 4:.1f} on 4, of 1000 steps")
    tiny = built("fm-tiny")
    assert any(line.startswith("hours: not known") for line in plan.lines("flow", tiny))
