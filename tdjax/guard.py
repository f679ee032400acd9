"""INT8 and FP8 arithmetic runs on a GPU only where its kernels agree with their references there: checked before weights are read."""

from __future__ import annotations

import jax

from pallas_kernels import selftest
from tdjax.config import DiTConfig
from tdjax.errors import KernelError
from tdjax.stages import Stages

# What a kind of attention or of linear layer runs on a GPU: names of checks of `pallas_kernels.selftest`.
CHECKS = {
    "sagesla": ("with int8 scores", "its block map", "int8 keys"),
    "int8": ("block128 linear", "block128 quantisation"),
    "int8_channel": ("channel linear", "channel quantisation", "norm and residual", "gelu to int8"),
    "fp8": ("fp8 linear", "fp8 quantisation"),
}


def check_kernels(cfg: DiTConfig, stages: Stages) -> None:
    """Run the checks of the config's 8-bit kernels on the default device; raises KernelError if one fails."""
    wanted = {name for kind in (cfg.attention, cfg.linear) for name in CHECKS.get(kind, ())}
    if not wanted or cfg.impl == "reference" or jax.default_backend() != "gpu":
        return
    with stages("check kernels"):
        failed = [check for check in selftest.run("triton", wanted) if not check.passed]
    if failed:
        raise KernelError(
            f"8-bit kernels fail their self-test on {jax.devices()[0].device_kind}: "
            + ", ".join(f"{check.name} ({check.failure or f'error {check.error:.1e}, allowed {check.bound:.1e}'})" for check in failed),
            "the video would be black or noise; python -m tdjax.env --selftest prints every kernel",
            "use --attention_type sla (or original) and --quant none, or --attention_impl reference",
        )
