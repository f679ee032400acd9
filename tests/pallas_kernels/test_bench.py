"""The bench: every row it could print fits together, and its table and arguments say what they
should."""

import json

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import bench, mosaic
from pallas_kernels.cases import CASES, Case
from pallas_kernels.workload import Workload

# cuDNN's rows need cuDNN even to be traced, Mosaic's a newer jax; the larger size differs in
# numbers only
ABSENT = ("cudnn", "mosaic") if mosaic.unavailable() else ("cudnn",)
ROWS = [
    (name, impl, workload)
    for name, case in CASES.items()
    for impl in case.impls
    for workload in case.workloads
    if "480p" in workload and not any(name in impl for name in ABSENT)
]


@pytest.mark.parametrize("name, impl, workload", ROWS)
def test_a_row_gives_what_its_error_is_taken_from(name, impl, workload):
    case = CASES[name]
    given = jax.eval_shape(case.workloads[workload].make, jax.random.key(0))
    args = jax.eval_shape(lambda *a: case.prepare(impl, *a), *given) if case.prepare else given
    out = jax.eval_shape(lambda *a: case.run(impl, *a), *args)
    expected = jax.eval_shape(case.exact, *given)
    assert [x.shape for x in jax.tree.leaves(out)] == [x.shape for x in jax.tree.leaves(expected)]
    assert 0 <= case.eight_bit(impl) <= 1


SQUARE = Workload(
    make=lambda key: (jax.random.normal(key, (64, 64), jnp.bfloat16),),
    flops=2.0 * 64**3,
    bytes=4.0 * 64**2,
)


def test_it_needs_a_gpu(capsys):
    assert bench.main(["sla"]) == 2
    assert "run on NVIDIA GPUs\nthe first device here is cpu\n" in capsys.readouterr().err


def test_a_measured_row(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(bench, "refusal", lambda: None)
    product = lambda impl, x: (x @ x) * (2 if impl == "wrong" else 1)
    exact = lambda x: jnp.matmul(x.astype(jnp.float32), x.astype(jnp.float32), precision="highest")
    case = Case(
        name="square",
        impls=("right", "wrong"),
        workloads={"small": SQUARE},
        run=product,
        exact=exact,
    )
    monkeypatch.setattr(bench, "CASES", {"square": case})
    monkeypatch.setattr(bench, "SAMPLE_MS", 0.1)
    assert bench.main(["--repeats", "3", "--json", str(tmp_path / "rows.jsonl")]) == 0
    right, wrong = (json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines())
    assert right["error"] < 1e-2 < 0.9 < wrong["error"] < 1.1
    assert right["p10"] <= right["ms"] <= right["p90"] and right["rate"] == pytest.approx(
        SQUARE.flops / right["ms"] / 1e9
    )
    assert right["jax"] == jax.__version__ and right["bound"] is None  # no peaks of a CPU
    assert "square" in capsys.readouterr().out


def test_a_row_that_cannot_run_is_told_and_the_others_go_on(monkeypatch, capsys):
    monkeypatch.setattr(bench, "refusal", lambda: None)

    def run(impl, x):
        if impl == "refusing":
            raise ValueError("heads of width 7")
        return x

    case = Case(
        name="identity",
        impls=("refusing", "willing"),
        workloads={"small": SQUARE},
        run=run,
        exact=lambda x: x,
    )
    monkeypatch.setattr(bench, "CASES", {"identity": case})
    assert bench.main(["--repeats", "1"]) == 1
    out, err = capsys.readouterr()
    assert "willing" in out and "identity refusing small: heads of width 7" in err


@pytest.mark.parametrize(
    "argv, message", [(["sga"], "did you mean 'sla'"), (["--repeats", "0"], "must be at least 1")]
)
def test_bad_arguments(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        bench.parse(argv)
    assert stop.value.code == 2 and message in capsys.readouterr().err
