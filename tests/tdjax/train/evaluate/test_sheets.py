"""A sheet shows the frames it names, in their places."""

import numpy as np
import pytest
from PIL import Image

from tdjax.train.evaluate import sheets
from tdjax.train.evaluate.sheets import GAP, LABEL_HEIGHT


def test_contact_sheet(tmp_path):
    clips = {
        name: (
            np.zeros((33, 8, 6, 3), np.uint8)
            + np.arange(33, dtype=np.uint8)[:, None, None, None] * k
        )
        for k, name in ((1, "a"), (7, "b"))
    }
    path = sheets.contact_sheet(tmp_path / "sheet.png", clips, columns=9, scale=2)
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
        sheets.contact_sheet(tmp_path / "sheet.png", {"a": np.zeros((2, 8, 8, 3), np.float32)})
