"""What must hold before a transformer runs: its 8-bit kernels agree with their references on this
GPU, and it has the GPU to itself."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from concurrent.futures import Future, wait

import jax

from pallas_kernels import mosaic, selftest
from tdjax.config import DiTConfig
from tdjax.errors import KernelError
from tdjax.pipeline import executables
from tdjax.pipeline.components import LOADER
from tdjax.progress import Stages

# What a kind of attention or of linear layer runs on a GPU: names of checks of
# `pallas_kernels.selftest`.
CHECKS = {
    "sagesla": ("with int8 scores", "its block map", "int8 keys"),
    "int8": ("block128 linear", "block128 quantisation"),
    "int8_channel": ("channel linear", "channel quantisation", "norm and residual", "gelu to int8"),
    "fp8": ("fp8 linear", "fp8 quantisation"),
}

KERNELS = "kernels"  # how what is remembered of them begins


def check_kernels(cfg: DiTConfig, stages: Stages) -> None:
    """Runs the checks of the config's 8-bit kernels on the default device, unless the same have
    passed before on such a card, with this driver, these versions and kernels; raises KernelError
    if one fails."""
    wanted = {name for kind in (cfg.attention, cfg.linear) for name in CHECKS.get(kind, ())}
    if not wanted or cfg.impl == "reference" or jax.default_backend() != "gpu":
        return
    # and Triton's, which run what is not for Hopper alone
    if cfg.impl == "mosaic" or (cfg.impl == "auto" and mosaic.at_hand()):
        wanted |= {name + selftest.MOSAIC for name in wanted} & set(selftest.BOUNDS)
    mark = executables.mark_of(KERNELS, wanted)
    if executables.remembered(mark):
        return
    with stages("check kernels"):
        failed = [check for check in selftest.together("triton", wanted) if not check.passed]
    if failed:
        raise KernelError(
            f"8-bit kernels fail their self-test on {jax.devices()[0].device_kind}: "
            + ", ".join(
                f"{check.name}"
                f" ({check.failure or f'error {check.error:.1e}, allowed {check.bound:.1e}'})"
                for check in failed
            ),
            "the video would be black or noise; python -m tdjax.env --selftest prints every kernel",
            "use `attention` sla (or original) and `quant` none, or `impl` reference",
        )
    executables.remember(mark)


def wait_for_threads(work: Iterable[Future | None], stages: Stages) -> None:
    """To be called before a transformer runs for the first time, with what threads compile and
    load: what went wrong there stays in it.

    cuDNN warms its attention up at that time, within the capture of a stream. Beside work of other
    threads on the device that failed ("capturing stream has unjoined work"), with jax 0.11.2; a
    hang was seen too, its cause not proved. Loads that nobody waits for any more count as well.
    """
    asked = [future for future in work if future is not None]
    with stages("compile and load the rest") if asked else contextlib.nullcontext():
        wait([*asked, LOADER.submit(int)])  # one thread, in order: all that it was given is done
