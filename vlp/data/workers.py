"""Worker processes: how many, and that they end with their parent."""

from __future__ import annotations

import multiprocessing
import multiprocessing.queues
import os
import shutil
import signal
import threading
import time
from ctypes import c_bool

CANNOT_SEND = 74  # exit code of a worker

POLL = 0.5  # seconds between looks at whether a worker is needed
GRACE = 3.0  # seconds for a worker to end by itself, with its files and commands
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


def end_when(closed: c_bool) -> None:
    """Make this worker process end a few seconds after ``closed``, in shared memory, is true, even if it waits for data."""

    def wait() -> None:
        # not an Event: setting one waits for its waiters, also for those that have died
        while not closed.value:
            time.sleep(POLL)
        time.sleep(GRACE)
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def most_workers(wanted: int, tasks: int) -> int:
    """Return how many workers to start: no more than there are tasks, or than the machine can use."""
    return max(1, min(wanted, tasks, MAX_WORKERS_PER_CPU * (os.cpu_count() or 1)))


def end_if_a_batch_cannot_be_sent() -> None:
    """Make this worker end if it cannot hand over a batch, for which its parent would wait without end."""
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(lambda error, batch: os._exit(CANNOT_SEND))


def why_a_worker_ended(error: RuntimeError) -> str | None:
    """Return what is wrong and what to do, if ``error`` is that of a DataLoader whose worker has ended; else None."""
    message = str(error)
    if not message.startswith("DataLoader worker"):
        return None
    # torch tells an exit code or a signal, or neither, depending on who notices first
    if "exit code" in message and f"exit code {CANNOT_SEND}" not in message:
        return None
    disk = shutil.disk_usage("/dev/shm") if os.path.isdir("/dev/shm") else None
    room = f" (/dev/shm has {disk.free >> 20:,} of {disk.total >> 20:,} MiB free)" if disk else ""
    return (
        f"a data worker was killed, or could not hand over a batch, as happens when the memory or the shared memory is full"
        f"{room}; enlarge it, e.g. docker run --shm-size=8g, or lower data.workers or data.batch_size"
    )
