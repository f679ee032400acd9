"""Stages: what ran is added up, and the clock is told beside it."""

import re
import time

from tdjax.progress import Stages


def test_the_table_tells_the_sum_of_the_stages_and_the_clock(capsys):
    stages = Stages(show=False)
    for name in ("load dit", "denoise"):
        with stages(name):
            time.sleep(0.02)
    time.sleep(0.05)  # in no stage
    table = stages.table()
    seconds = {
        name: float(re.search(rf"{name} +│ ([\d.]+)", table)[1])
        for name in ("sum of the stages", "by the clock", "denoise")
    }
    assert 0.04 <= seconds["sum of the stages"] <= seconds["by the clock"] - 0.045
    assert "load dit" in table and seconds["denoise"] < seconds["sum of the stages"]
