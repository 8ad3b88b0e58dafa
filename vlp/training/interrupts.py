"""Ctrl-C and SIGTERM as a request to stop, which is answered at a point where nothing is lost."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
STOPPED = 130  # exit code of a training that was asked to stop and could not save


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

    Python runs a handler between two operations of the main thread. A collective that waits for another process is one
    operation, so a thread notes the signals too, as soon as they arrive.

    Attributes:
        agreed: Whether any process was asked to stop. Processes are asked at different moments, so only this value, which
            changes for all of them in the same step, may end the loop.
        at_once: Whether to raise `Stopped` from the handler. Set during an evaluation, whose checkpoint is already saved,
            and only in a run of one process: several would wait for each other.
    """

    def __init__(self):
        super().__init__()
        self.agreed = self.at_once = self.was_handled = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        is_first = not self.was_handled
        self.signal, self.was_handled = number, True
        if is_first and self.at_once:
            raise Stopped

    def __enter__(self):
        self.arrivals, writer = socket.socketpair()
        writer.setblocking(False)  # as Python demands
        self.writer, self.writer_before = writer, signal.set_wakeup_fd(writer.fileno())
        threading.Thread(target=self._note, name="signals", daemon=True).start()
        return super().__enter__()

    def __exit__(self, *_) -> None:
        super().__exit__()
        signal.set_wakeup_fd(self.writer_before)
        self.writer.send(b"\0")  # ends the thread; to close the socket would not, as forked data workers have it open
        self.writer.close()

    def _note(self) -> None:
        """Note each signal whose number arrives, and end the process at the second one."""
        first = None  # time of the first signal in seconds
        while number := self.arrivals.recv(1)[0]:
            if number not in SIGNALS:  # of other handlers, such as the one for a data worker that has ended
                continue
            if first is None:
                self.signal, first = number, time.monotonic()
            elif time.monotonic() - first > 1:
                print("vlp: asked twice to stop, so stopped without a save", file=sys.stderr, flush=True)
                os._exit(STOPPED)
        self.arrivals.close()
