import jax.numpy as jnp
import pytest

from pallas_kernels import mosaic, selftest
from pallas_kernels.int8_matmul import triton
from pallas_kernels.inventory import OPS
from tdjax import env


@pytest.mark.slow
def test_every_case_has_a_bound():
    assert [name for name, *_ in selftest.cases()] == list(selftest.BOUNDS)
    assert min(selftest.BOUNDS.values()) >= 0


def test_every_op_has_a_case():
    assert {op for _, ops, _ in selftest.cases() for op in ops} == set(OPS)


@pytest.mark.slow
def test_two_real_cases(monkeypatch):
    wanted = {"sparse-linear attention", "channel quantisation"}
    made, outputs = [], selftest.outputs
    monkeypatch.setattr(
        selftest, "outputs", lambda impl, names: made.append(names) or outputs(impl, names)
    )
    together = selftest.together("interpret", wanted)
    assert (
        made == [wanted]
        and {check.name for check in together} == wanted
        and all(check.passed for check in together)
    )
    assert list(selftest.run("interpret", wanted)) == together and together[0].error > 0


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["stream", "gate"])
def test_a_product_is_checked_with_what_it_is_added_to(monkeypatch, lost):
    """A step runs both forms of the kernel."""
    kernel = triton.row_kernel

    def without(x, w, x_scale, w_scale, given, y, **options):
        given = {name: ref for name, ref in given.items() if name != lost}
        kernel(x, w, x_scale, w_scale, given, y, **options)

    (check,) = selftest.run("interpret", {"channel linear"})
    assert check.passed, check
    monkeypatch.setattr(triton, "row_kernel", without)
    (check,) = selftest.run("interpret", {"channel linear"})
    assert not check.failure and not check.passed, check


def test_kernels_for_hopper_are_checked_there(monkeypatch):
    """Only where they are compiled, and only if they are asked for."""
    made, right = [], {"channel linear": (1.0, 1.0), "channel linear (Mosaic)": (1.0, 1.0)}

    def outputs(impl, names):
        made.append(set(names))
        return {name: right[name] for name in names}

    monkeypatch.setattr(selftest, "outputs", outputs)
    selftest.together("triton", right)
    monkeypatch.setattr(mosaic, "at_hand", lambda: True)
    selftest.together("interpret", right)
    selftest.together("triton", {"channel linear"})
    selftest.together("triton", right)
    assert made == [{"channel linear"}] * 3 + [set(right)]


def counted(monkeypatch, rows: dict, bounds: dict) -> list:
    """Cases in place of the real ones; -> the names of each program that is made."""
    made, outputs = [], selftest.outputs
    cases = [(name, (), function) for name, function in rows.items()]
    monkeypatch.setattr(selftest, "cases", lambda: iter(cases))
    monkeypatch.setattr(selftest, "BOUNDS", bounds)
    monkeypatch.setattr(
        selftest, "outputs", lambda impl, names: made.append(set(names)) or outputs(impl, names)
    )
    return made


def test_a_wrong_kernel_and_one_that_raises_fail(monkeypatch, capsys):
    def broken(impl):
        if impl == "reference":
            return jnp.ones(3)
        raise ValueError("no such instruction\nmore")

    rows = {
        "right": lambda impl: jnp.ones(3),
        "wrong": lambda impl: jnp.ones(3) * (1.0 if impl == "reference" else 1.1),
        "nan": lambda impl: jnp.full(3, 1.0 if impl == "reference" else jnp.nan),
        "broken": broken,
    }
    bounds = {"right": 0.0, "wrong": 1e-2, "nan": 1e-2, "broken": 1e-2}
    made = counted(monkeypatch, rows, bounds)
    checks = list(selftest.run("interpret"))
    assert [c.passed for c in checks] == [True, False, False, False]
    assert checks[1].error == pytest.approx(0.1, rel=1e-3)
    assert env.main(["--selftest"]) == 1
    out = capsys.readouterr().out
    assert out.count("FAIL") == 3 and "ValueError: no such instruction" in out and "more" not in out
    for bad, programs in (
        ({"right", "wrong"}, [2]),
        ({"right", "broken"}, [2, 1, 1]),
    ):  # one by one, so that what fails has a name
        made.clear()
        assert [c.name for c in selftest.together("interpret", bad) if not c.passed] == sorted(
            bad - {"right"}
        )
        assert list(map(len, made)) == programs
    made.clear()
    assert all(c.passed for c in selftest.together("interpret", {"right"})) and made == [{"right"}]
    monkeypatch.setattr(selftest, "BOUNDS", {"right": 0.0})
    assert env.main(["--selftest"]) == 0
