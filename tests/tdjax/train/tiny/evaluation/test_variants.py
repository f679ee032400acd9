"""The rows of the table."""

from tdjax.train.tiny import settings
from tdjax.train.tiny.evaluation import variants
from tdjax.train.tiny.stages import evaluate


def test_rows_of_the_table():
    found = {row.key: row for row in variants.variants(settings.EvaluateStage())}
    assert all(row.parent in found for row in found.values() if row.parent)
    assert set(evaluate.SHOWN) < set(found)
    assert (
        found["teacher_unipc_50"].evaluations,
        found["student_2"].evaluations,
        found["truth"].evaluations,
    ) == (100, 2, 0)
