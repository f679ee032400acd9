"""A table says what its rows hold, dashes where they hold nothing; a sheet shows the frames it
names, in their places."""

import numpy as np
import pytest
from PIL import Image

from tdjax.train.tiny.evaluation import report
from tdjax.train.tiny.evaluation.report import COLUMNS, GAP, LABEL_HEIGHT, Row

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
        report.table(ROWS)
        == "|  | NFE | steps | all attributes | speed error, px/frame | FD-pca | PSNR to parent, dB"
        " |\n| --- | ---: | ---: | ---: | ---: | ---: | ---: |\n| ground truth | 0 | 0 | 100.0%"
        " | 0.000 | 0.0123 | - |\n| student 4 | 4 | 4 | 93.8% | 0.250 | - | 28.1 |\n"
    )


def test_every_column_can_be_written():
    row = Row(name="x", evaluations=1, steps=1, values={column.key: 0.5 for column in COLUMNS})
    header, _, body = report.table([row]).splitlines()
    assert header.count("|") == body.count("|") == 4 + len(COLUMNS) and "-" not in body


def test_other_values_are_not_shown():
    rows = [Row(name="x", evaluations=1, steps=1, values={"present": 1.0, "psnr": 30.0})]
    assert report.table(rows).splitlines()[0] == "|  | NFE | steps | PSNR to parent, dB |"


def test_contact_sheet(tmp_path):
    clips = {
        name: (
            np.zeros((33, 8, 6, 3), np.uint8)
            + np.arange(33, dtype=np.uint8)[:, None, None, None] * k
        )
        for k, name in ((1, "a"), (7, "b"))
    }
    path = report.contact_sheet(tmp_path / "sheet.png", clips, columns=9, scale=2)
    sheet = np.asarray(Image.open(path))
    assert sheet.shape == (2 * (LABEL_HEIGHT + 16 + GAP) + GAP, 9 * (12 + GAP) + GAP, 3)
    for row, k in enumerate((1, 7)):
        top = GAP + LABEL_HEIGHT + row * (LABEL_HEIGHT + 16 + GAP)
        for column in range(9):
            left = GAP + column * (12 + GAP)
            assert (sheet[top : top + 16, left : left + 12] == 4 * column * k).all()
            assert (sheet[top : top + 16, left + 12 : left + 12 + GAP] == 250).all()
        assert (sheet[top - LABEL_HEIGHT : top] < 128).any()  # a name stands above


def test_what_is_no_clip_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"clip 'a' is float32 \(2, 8, 8, 3\)"):
        report.contact_sheet(tmp_path / "sheet.png", {"a": np.zeros((2, 8, 8, 3), np.float32)})
