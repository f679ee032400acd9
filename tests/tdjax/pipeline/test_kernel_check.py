"""8-bit arithmetic is refused where its kernels fail, and only there."""

import dataclasses

import jax
import pytest

from pallas_kernels import selftest
from tdjax.config import DiTConfig
from tdjax.errors import KernelError
from tdjax.models.linear import LINEAR
from tdjax.pipeline import executables, kernel_check
from tdjax.progress import Stages

SAGE = DiTConfig(attention="sagesla")


@pytest.fixture
def ran(monkeypatch):
    """Names of the checks that ran on a GPU that is not there; `int8 keys` fails."""
    names = []

    def together(impl, wanted):
        assert impl == "triton"
        names.extend(wanted)
        return [selftest.Check(name, 0.25 if name == "int8 keys" else 0.0, 1e-2) for name in wanted]

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(selftest, "together", together)
    return names


def test_a_failed_check_stops_with_its_name_and_what_to_do(ran):
    with pytest.raises(KernelError) as error:
        kernel_check.check_kernels(SAGE, Stages(show=False))
    assert "int8 keys (error 2.5e-01, allowed 1.0e-02)" in error.value.what
    assert "`attention` sla" in error.value.fix and "tdjax.env --selftest" in error.value.why


def test_checks_that_passed_are_not_repeated(ran, monkeypatch, tmp_path):
    monkeypatch.setattr(executables, "folder", lambda: tmp_path)
    monkeypatch.setattr(executables, "_is_changed", lambda module: False)  # as by `ran`
    cfg = dataclasses.replace(SAGE, attention="sla", linear="int8")
    for _ in range(2):
        kernel_check.check_kernels(cfg, Stages(show=False))
    assert sorted(ran) == sorted(kernel_check.CHECKS["int8"])
    for _ in range(2):  # those that failed are
        with pytest.raises(KernelError):
            kernel_check.check_kernels(SAGE, Stages(show=False))
    assert ran.count("int8 keys") == 2


def test_only_what_runs_is_checked(ran, monkeypatch):
    kernel_check.check_kernels(
        dataclasses.replace(SAGE, attention="sla", linear="int8"), Stages(show=False)
    )
    assert set(ran) == set(kernel_check.CHECKS["int8"])
    ran.clear()
    for cfg in (DiTConfig(), dataclasses.replace(SAGE, impl="reference")):
        kernel_check.check_kernels(cfg, Stages(show=False))
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    kernel_check.check_kernels(SAGE, Stages(show=False))
    assert not ran


def test_kernels_for_hopper_are_checked_beside_the_others_where_they_run(ran, monkeypatch):
    cfg = DiTConfig(attention="sla", linear="int8_channel", impl="mosaic")
    kernel_check.check_kernels(cfg, Stages(show=False))
    assert set(ran) == {*kernel_check.CHECKS["int8_channel"], "channel linear (Mosaic)"}
    ran.clear()
    kernel_check.check_kernels(dataclasses.replace(cfg, impl="auto"), Stages(show=False))
    assert set(ran) == set(kernel_check.CHECKS["int8_channel"])
    ran.clear()
    monkeypatch.setattr(kernel_check.mosaic, "at_hand", lambda: True)
    kernel_check.check_kernels(dataclasses.replace(cfg, impl="auto"), Stages(show=False))
    assert "channel linear (Mosaic)" in ran
    ran.clear()
    kernel_check.check_kernels(dataclasses.replace(cfg, impl="triton"), Stages(show=False))
    assert set(ran) == set(kernel_check.CHECKS["int8_channel"])


def test_every_check_exists_and_every_8_bit_layer_has_some():
    assert {name for checks in kernel_check.CHECKS.values() for name in checks} <= set(
        selftest.BOUNDS
    )
    assert set(kernel_check.CHECKS) == {"sagesla"} | (set(LINEAR) - {"float"})
