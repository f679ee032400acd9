"""The table: true clips are all right, rows keep their results, parents go before children."""

import json

import pytest
import tiny_cases

from tdjax.train.tiny import settings, work
from tdjax.train.tiny.evaluation import variants
from tdjax.train.tiny.stages import evaluate

pytestmark = pytest.mark.slow

CFG = settings.EvaluateStage(
    clips=4, seeds=2, batch=4, real=4, prompts=2, compute="float32", rows="truth,student_1"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tiny_cases.finished_run(tmp_path_factory.mktemp("run"), evaluate=CFG)


@pytest.mark.slow
def test_true_clips_are_all_right_and_results_are_kept(run, monkeypatch, capsys):
    evaluate.run_stage(run)
    truth, student = (
        json.loads((run.folder / "results" / f"{key}.json").read_text())
        for key in ("truth", "student_1")
    )
    assert [values["all"] for values in truth["seeds"]] == [1.0, 1.0] and truth["values"][
        "all"
    ] == 1.0
    assert (
        student["values"]["all"] < 0.5
        and student["values"]["fd_pca"] > 2 * truth["values"]["fd_pca"]
    )
    assert 0 <= student["values"]["diversity"] < 1 and student["values"]["megabytes"] > 0.1
    table = (run.folder / "table.md").read_text()
    assert "| ground truth | 0 | 0 | 8 | 100.0% |" in table and len(table.splitlines()) == 4
    monkeypatch.setattr(evaluate, "evaluate", None)  # nothing is computed again
    evaluate.run_stage(run)
    evaluate.write(
        run,
        next(row for row in variants.variants(CFG) if row.key == "truth"),
        {"values": {"gpu_ms": 1.5}},
    )
    again = json.loads((run.folder / "results" / "truth.json").read_text())
    assert again["values"] == truth["values"] | {"gpu_ms": 1.5} and again["seeds"] == truth["seeds"]


def test_children_follow_their_parents():
    every = {row.key: row for row in variants.variants(CFG)}
    order = [row.key for row in evaluate.families(every)]
    assert sorted(order) == sorted(every) and order[order.index("teacher_unipc_50") + 1] == "sla_50"
    some = evaluate.families(
        {key: every[key] for key in ("merged_int8_4", "student_4", "merged_raw_4")}
    )
    assert [row.key for row in some] == ["merged_int8_4", "student_4", "merged_raw_4"]


def test_rows_need_their_weights(tmp_path):
    for name in ("vae", "text", "teacher", "student", "sla", "merged"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text("{}")
    run = work.Run(folder=tmp_path, settings={})
    every = evaluate.possible(run, settings.EvaluateStage())
    assert "merged_4" in every and "scm_4" not in every and "merged_raw_4" not in every
    assert list(evaluate.possible(run, CFG)) == ["truth", "student_1"]
