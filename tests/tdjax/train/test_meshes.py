"""Every method over eight fake devices gives the numbers of one."""

import os
import re
import subprocess
import sys

import eight_devices
import numpy as np
import pytest
from compiling import QUICK
from conftest import SCRIPTS

from tdjax.train import metrics

# Sums of other devices come in another order: float32, over some hundred numbers.
RELATIVE = 1e-6
# What a run says of its machine, and not of its numbers.
TIMES = re.compile("second|tflops|peak|memory|gib")


@pytest.mark.slow
def test_eight_devices_give_the_numbers_of_one(folder, tmp_path):
    """Student and critic of rCM over copies, parameters and tokens; sparse attention with heads
    divided as well, in two parts."""
    env = (
        os.environ
        | SCRIPTS
        | {
            "XLA_FLAGS": " ".join(["--xla_force_host_platform_device_count=8", *QUICK]),
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
            "JAX_PLATFORMS": "cpu",
        }
    )
    command = [sys.executable, eight_devices.__file__, str(folder), str(tmp_path)]
    subprocess.run(command, env=env, check=True, timeout=3600)
    for name, mesh in eight_devices.MESHES.items():
        one, eight = (metrics.read(tmp_path / f"{name}-{each}") for each in ("auto", mesh))
        assert len(one) == len(eight) == 2
        for a, b in zip(one, eight, strict=True):
            assert a.keys() == b.keys() and any(key.endswith("loss") for key in a)
            for key in {key for key in a if not TIMES.search(key)}:
                assert np.isclose(a[key], b[key], RELATIVE, 0), (name, key, a[key], b[key])
