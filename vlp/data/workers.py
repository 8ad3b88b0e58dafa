"""Worker processes: how many, and that they end with their parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading

MAX_WORKERS_PER_CPU = 8  # they also wait for the disk


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


def most_workers(wanted: int, tasks: int) -> int:
    """Return how many workers to start: no more than there are tasks, or than the machine can use."""
    return max(1, min(wanted, tasks, MAX_WORKERS_PER_CPU * (os.cpu_count() or 1)))
