"""A table says what its rows hold, dashes where they hold nothing."""

from tdjax.train.evaluate.sheets import Row, table
from tdjax.train.tiny.evaluation.report import COLUMNS

ROWS = (
    Row(
        name="ground truth",
        evaluations=0,
        steps=0,
        values={"all": 1.0, "fd_pca": 0.01234, "speed_error": 0.0004},
    ),
    Row(
        name="student 4",
        evaluations=4,
        steps=4,
        values={"all": 0.9375, "psnr": 28.06, "fd_pca": float("nan"), "speed_error": 0.25},
    ),
)


def test_table():
    assert (
        table(ROWS, COLUMNS)
        == "|  | NFE | steps | all attributes | speed error, px/frame | FD-pca | PSNR to parent, dB"
        " |\n| --- | ---: | ---: | ---: | ---: | ---: | ---: |\n| ground truth | 0 | 0 | 100.0%"
        " | 0.000 | 0.0123 | - |\n| student 4 | 4 | 4 | 93.8% | 0.250 | - | 28.1 |\n"
    )


def test_every_column_can_be_written():
    row = Row(name="x", evaluations=1, steps=1, values={column.key: 0.5 for column in COLUMNS})
    header, _, body = table([row], COLUMNS).splitlines()
    assert header.count("|") == body.count("|") == 4 + len(COLUMNS) and "-" not in body


def test_other_values_are_not_shown():
    rows = [Row(name="x", evaluations=1, steps=1, values={"present": 1.0, "psnr": 30.0})]
    assert table(rows, COLUMNS).splitlines()[0] == "|  | NFE | steps | PSNR to parent, dB |"
