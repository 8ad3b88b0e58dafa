"""End a run when one of its processes is lost or stalls, with a message that names it.

The other processes wait for it inside a collective, where they handle no signal. gloo and NCCL give up after half an hour,
with a traceback in every process that names none.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, TimeoutError
from contextlib import suppress
from dataclasses import dataclass

import torch.distributed as dist

from vlp.distributed import rank, world_size

POLLS = 20  # per timeout
ENDED = -1  # in place of the count of polls
LOST = "process {} ({}) does not answer: it was stopped or killed, or its machine is gone"
BEHIND = "process {} ({}) has not loaded its batch, and the others wait for it"


@dataclass
class Seen:
    """What is known of a process.

    Args:
        host: Its machine.
        beats: Its last count of `StallWatch.beat`.
        alive: Its last count of polls.
        changed: Time of this process, in seconds, at which ``alive`` changed.
    """

    host: str
    beats: int = 0
    alive: int = 0
    changed: float = 0.0


class StallWatch:
    """Context in which a thread publishes the progress of this process, and watches that of the others.

    A process counts as lost if its thread has not published for ``timeout`` seconds. It counts as stalled if for so long
    no process made progress, and this one is behind another. So a phase that is long for all processes, such as an
    evaluation, is no stall.

    Args:
        timeout: In seconds. None, or a single process, disables the watch.
    """

    def __init__(self, timeout: float | None):
        self.timeout, self.beats, self.closed = timeout, 0, threading.Event()
        self.thread: threading.Thread | None = None

    def __enter__(self) -> StallWatch:
        if self.timeout is not None and world_size() > 1:
            self.rank, self.world = rank(), world_size()
            # a connection of its own, as that of the main thread may be blocked; process 0 usually serves the store
            self.store = dist.distributed_c10d._get_default_store().clone()
            self._publish(0)
            dist.barrier()  # from here on every process has published
            self.thread = threading.Thread(target=self._watch, name="stall-watch", daemon=True)
            self.thread.start()
        return self

    def __exit__(self, error: type[BaseException] | None, *_) -> None:
        """End the watch. From here on other processes may end before this one, unless an error ends it: others then wait in vain."""
        if self.thread is not None:
            self.closed.set()
            self.thread.join()
            if error is None:
                with suppress(RuntimeError):  # the process of the store has ended
                    self._publish(ENDED)

    def beat(self) -> None:
        """Note progress: this process is about to load a batch, or has loaded it."""
        self.beats += 1

    def _publish(self, alive: int) -> None:
        self.store.set(f"stall/{self.rank}", f"{alive} {self.beats} {socket.gethostname()}")

    def _exchange(self, alive: int) -> list[bytes]:
        self._publish(alive)
        return self.store.multi_get([f"stall/{number}" for number in range(self.world)])

    def _watch(self) -> None:
        began = last_progress = time.monotonic()
        seen = [Seen("", changed=began) for _ in range(self.world)]
        alive, calls = 0, ThreadPoolExecutor(1)
        while not self.closed.wait(self.timeout / POLLS):
            alive += 1
            try:
                # in a thread of its own, because the calls have no time limit where the process of the store is stopped
                published = calls.submit(self._exchange, alive).result(self.timeout)
            except (RuntimeError, TimeoutError):  # RuntimeError: the process of the store has ended
                if not self.closed.wait(self.timeout / POLLS):
                    self._end(LOST.format(0, seen[0].host), first=1)
                return
            now, progress = time.monotonic(), False
            for each, text in zip(seen, published):
                count, beats, each.host = text.decode().split(" ", 2)
                if int(count) != each.alive:
                    each.alive, each.changed = int(count), now
                progress |= int(beats) != each.beats
                each.beats = int(beats)
            last_progress = now if progress else last_progress
            if any(each.alive == ENDED for each in seen):
                return
            lost = [number for number, each in enumerate(seen) if now - each.changed > self.timeout]
            behind = [number for number, each in enumerate(seen) if each.beats < max(other.beats for other in seen)]
            stalled = behind if now - last_progress > self.timeout else []
            for ranks, message in ((lost, LOST), (stalled, BEHIND)):
                if ranks:
                    first = next(number for number in range(self.world) if number not in lost)
                    self._end(message.format(ranks[0], seen[ranks[0]].host), first)

    def _end(self, message: str, first: int) -> None:
        """End this process in place of its main thread, which is blocked. Only process ``first`` says why."""
        if self.rank == first:
            advice = "the last checkpoint is untouched, so resume the run"
            print(f"vlp: no progress for {self.timeout:g} s: {message}; {advice}", file=sys.stderr, flush=True)
        # a launcher ends all processes as soon as one has ended, and the store ends with its process
        time.sleep(3 * self.timeout / POLLS)
        os._exit(1)
