"""Ctrl-C and SIGTERM as a request to stop, which is answered at a point where nothing is lost."""

from __future__ import annotations

import signal
import time
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Context in which Ctrl-C and SIGTERM are only noted. The handlers from before are restored on exit.

    Attributes:
        signal: Number of the last signal, None before the first.
    """

    def __init__(self):
        self.signal: int | None = None

    @property
    def asked(self) -> bool:
        return self.signal is not None

    def handle(self, number: int, frame: FrameType | None) -> None:
        self.signal = number

    def __enter__(self):
        self.before = {number: signal.signal(number, self.handle) for number in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


class Stopped(Exception):
    """The process was asked to stop during work that can be repeated."""


class TrainingInterrupt(StopRequest):
    """Stop request of a training process: finish the step, save, exit with code 0.

    A second signal ends the process at once, unless it comes within a second of the first: a launcher passes on the signal
    that a terminal or a scheduler has already sent to each of its processes.

    Attributes:
        agreed: Whether any process was asked to stop. Processes are asked at different moments, so only this value, which
            changes for all of them in the same step, may end the loop.
        at_once: Whether to raise `Stopped` from the handler. Set during an evaluation, whose checkpoint is already saved,
            and only in a run of one process: several would wait for each other.
    """

    def __init__(self):
        super().__init__()
        self.agreed = self.at_once = False
        self.first_time = 0.0  # seconds

    def handle(self, number: int, frame: FrameType | None) -> None:
        if not self.asked:
            self.signal, self.first_time = number, time.monotonic()
            if self.at_once:
                raise Stopped
        elif time.monotonic() - self.first_time > 1:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
