"""Worker processes that end with their parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading


def end_with_parent(handled: tuple[signal.Signals, ...] = (signal.SIGINT,)) -> None:
    """Make this worker process leave signals to its parent, and end when the parent has died.

    Ctrl-C reaches every process of a terminal, and only the parent should act on it. A parent that is killed cannot stop
    its workers, which would wait for it without end and keep its pipes open.

    Args:
        handled: Signals that only the parent handles.
    """
    for name in handled:
        signal.signal(name, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
