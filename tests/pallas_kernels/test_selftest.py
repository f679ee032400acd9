import jax.numpy as jnp
import pytest

from pallas_kernels import selftest
from tdjax import env


def test_names_are_unique_and_every_case_has_a_bound():
    names = [name for name, _, bound in selftest.cases() if bound >= 0]
    assert len(names) == len(set(names)) >= 14


def test_one_real_case():
    (name, function, bound) = next(iter(selftest.cases()))
    check = selftest.Check(name, selftest.distance(function("interpret"), function("reference")), bound)
    assert check.passed and check.error > 0


def test_a_wrong_kernel_and_one_that_raises_fail(monkeypatch, capsys):
    def broken(impl):
        if impl == "reference":
            return jnp.ones(3)
        raise ValueError("no such instruction\nmore")

    rows = [
        ("right", lambda impl: jnp.ones(3), 0.0),
        ("wrong", lambda impl: jnp.ones(3) * (1.0 if impl == "reference" else 1.1), 1e-2),
        ("nan", lambda impl: jnp.full(3, 1.0 if impl == "reference" else jnp.nan), 1e-2),
        ("broken", broken, 1e-2),
    ]
    monkeypatch.setattr(selftest, "cases", lambda: iter(rows))
    checks = list(selftest.run("interpret"))
    assert [c.passed for c in checks] == [True, False, False, False]
    assert checks[1].error == pytest.approx(0.1, rel=1e-3)
    assert env.main(["--selftest"]) == 1
    out = capsys.readouterr().out
    assert out.count("FAIL") == 3 and "ValueError: no such instruction" in out and "more" not in out
    monkeypatch.setattr(selftest, "cases", lambda: iter(rows[:1]))
    assert env.main(["--selftest"]) == 0
