"""Ctrl-C and SIGTERM, which end a run in good order."""

from __future__ import annotations

import signal
import threading

from tdjax.progress import Stages


class Interrupt:
    """While entered, the first Ctrl-C or SIGTERM only sets `asked`; the second raises
    KeyboardInterrupt.

    Signals reach the main thread alone; in another one nothing is changed, and an ignored signal (a
    job in the background of a shell) stays ignored.
    """

    def __init__(self, stages: Stages):
        self.stages = stages
        self.asked = False
        self._before: dict = {}

    def _ask(self, *_) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        self.stages.note("stopping after this step, with a checkpoint; once more stops at once")

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            heard = [
                n
                for n in (signal.SIGINT, signal.SIGTERM)
                if signal.getsignal(n) is not signal.SIG_IGN
            ]
            self._before = {number: signal.signal(number, self._ask) for number in heard}
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)
