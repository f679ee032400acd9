"""Stages: what ran is added up, and the clock is told beside it."""

import re
import threading
import time

import jax.numpy as jnp
import numpy as np
import pytest

from tdjax.errors import Cancelled
from tdjax.progress import Bar, LibraryStages, Listener, Stages


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


def test_lines_are_for_log_files(capsys):
    stages = Stages(show=True)
    with stages("open"):
        stages.note("a note")
    with pytest.raises(ZeroDivisionError), stages("load dit"):
        raise ZeroDivisionError
    assert re.sub(r"[\d.]+ s", "0 s", capsys.readouterr().err) == (
        "tdjax: a note\n  open: 0 s\n  load dit: failed\n"
    )


def test_what_a_call_says_belongs_to_it():
    stages, first, second = LibraryStages(False), Listener(), Listener()
    for listener in (first, second):
        with stages.listening(listener, 1, 4), stages("text"):
            stages.note("cold")
    stages.note("outside")
    assert first.notes == second.notes == ["cold"] and stages.rows == []


def test_a_call_can_be_ended():
    event, seen = threading.Event(), []
    stages = Stages(show=False)
    with stages.listening(Listener(seen.append, lambda *step: seen.append(step), event), 1, 2):
        with stages("text"):
            pass
        stages.step(1, 2)
        event.set()
        with pytest.raises(Cancelled, match="before vae decode"), stages("vae decode"):
            seen.append("never")
    no = stages.listening(Listener(lambda name: False), 1, 2)
    with pytest.raises(Cancelled), no, stages("text"):
        pass
    assert seen == ["text", (1, 2)]


def test_the_bar_counts_videos_and_goes_away(capsys):
    bar = Bar(show=True)
    bar.expect(2, 3)
    for _ in range(2):  # two calls of a command
        with bar.listening(Listener(), 1, 3):
            bar.next_video()
            for step in range(3):
                with bar(f"denoise: step {step + 1} of 3"):
                    pass
                bar.step(step + 1, 3)
            with bar("vae decode"):
                assert bar.bar.n == 4 * bar.video - 1 and bar.bar.total == 8
    bar.bar.refresh()
    bar.note("a note")
    shown = capsys.readouterr().err
    assert "video 2 of 2: vae decode  88%" in shown and "left" in shown and "a note\n" in shown
    bar.close()
    assert bar.bar is None


def test_the_bar_names_videos_that_are_made_together(capsys):
    bar = Bar(show=True)
    with bar.listening(Listener(), 3, 2):
        for first, count in ((0, 2), (2, 1)):
            bar.next_video(count)
            assert (bar.listener.first, bar.listener.count) == (first, count)
            for step in (1, 2):
                bar.step(step, 2)
            with bar("vae decode"):
                assert bar.bar.n == 3 * first + 2 * count and bar.bar.total == 9
            bar.bar.refresh()
    shown = capsys.readouterr().err
    assert "videos 1-2 of 3: vae decode" in shown and "video 3 of 3: vae decode" in shown


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_bar_of_one_call_goes_with_it(error):
    bar = Bar(show=True)
    with pytest.raises(error), bar.listening(Listener(), 1, 3):
        assert bar.bar.total == 4
        raise error
    assert bar.bar is None


@pytest.mark.parametrize("answer", [False, np.False_, np.array(False), jnp.array(False)], ids=repr)
def test_a_listener_ends_the_call_by_any_false(answer):
    says = lambda *_: answer
    told = Listener(says, says, None, says)
    for tell in (lambda: told.stage("x"), lambda: told.step(1, 2), lambda: told.preview(1, None)):
        with pytest.raises(Cancelled):
            tell()


@pytest.mark.parametrize(
    "answer", [None, 0, "", [], np.zeros(1, bool), np.float32(0), True], ids=repr
)
def test_a_listener_lets_the_call_go_on(answer):
    says = lambda *_: answer
    told = Listener(says, says, threading.Event(), says)
    told.stage("x"), told.step(1, 2), told.preview(1, None)
