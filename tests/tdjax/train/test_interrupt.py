"""Ctrl-C and SIGTERM: the first ends the step and saves, the second is at once."""

import contextlib
import os
import signal
import sys

import pytest
from train_cases import numbers, resumed, run, same_bits

from tdjax.progress import Stages
from tdjax.train import checkpoints
from tdjax.train.interrupt import Interrupt
from tdjax.train.stream import Stream


class Signals:
    """A stream that sends this process signals while the step's batch is read."""

    def __init__(self, at, count=1, kind=signal.SIGINT):
        self.stream, self.at, self.count, self.kind = Stream(numbers(), batch=3), at, count, kind
        self.saved, self.size = self.stream.saved, self.stream.size
        self.read = 0

    def batch(self, position):
        self.read += 1
        if self.read == self.at:
            for _ in range(self.count):
                os.kill(os.getpid(), self.kind)
        return self.stream.batch(position)


@pytest.fixture
def listening():
    """SIGINT as in a terminal, also where these tests run in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_the_step_and_saves(tmp_path, capsys, kind, listening):
    before = signal.getsignal(kind)
    done = run(
        tmp_path, stream=Signals(at=20, kind=kind), steps=10**6, log_every=10**6, save_every=10**6
    )
    assert done.interrupted and 0 < done.step <= 20
    assert signal.getsignal(kind) is before
    assert checkpoints.steps(tmp_path) == [done.step]
    assert "stopping after this step" in capsys.readouterr().err
    same_bits(resumed(tmp_path, steps=25).state, run(tmp_path / "whole", steps=25).state)


@pytest.mark.slow
def test_an_interrupt_saves_where_nobody_reads_what_is_told(tmp_path, monkeypatch, listening):
    reader, writer = os.pipe()
    os.close(reader)  # as `2>&1 | tee log` at Ctrl-C, which ends tee as well
    with open(writer, "w", buffering=1) as gone:
        monkeypatch.setattr(sys, "stderr", gone)
        done = run(tmp_path, stream=Signals(at=3), show=True, steps=10**6, log_every=1)
        monkeypatch.undo()
        with contextlib.suppress(BrokenPipeError):
            gone.close()
    assert done.interrupted and checkpoints.steps(tmp_path)[-1] == done.step


def test_a_second_interrupt_is_at_once(listening):
    interrupt = Interrupt(Stages(False))
    with pytest.raises(KeyboardInterrupt), interrupt:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.asked
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_ignored_signal_stays_ignored(listening):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Interrupt(Stages(False)) as interrupt:
        os.kill(os.getpid(), signal.SIGINT)
    assert not interrupt.asked
