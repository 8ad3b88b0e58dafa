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
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch.distributed as dist

from vlp.distributed import rank, world_size
from vlp.training.interrupts import STOPPED

POLLS = 20  # per timeout, at least
LONGEST_POLL = 2.0  # seconds, in which 1024 processes take a third of a core of the first machine
# Seconds after which a process that does not answer is lost if the run was asked to stop. Launchers kill after 30.
STOP_TIMEOUT = 10.0
ENDED = -1  # in place of the count of polls
LOST = "process {} ({}) does not answer: it was stopped or killed, or its machine is gone"
BEHIND = "process {} ({}) has not loaded its batch, and the others wait for it"
ADVICE = "the last checkpoint is untouched, so resume the run"


@dataclass
class Seen:
    """What is known of a process.

    Args:
        host: Its machine.
        beats: Its last count of `StallWatch.beat`.
        alive: Its last count of polls.
        changed: Count of polls of this process at which ``alive`` changed.
        asked: Whether it was asked to stop.
    """

    host: str = "?"
    beats: int = 0
    alive: int = 0
    changed: int = 0
    asked: bool = False


class StallWatch:
    """Thread that publishes the progress of this process, and watches that of the others.

    A process counts as lost if its thread has not published for ``timeout`` seconds. It counts as stalled if for so long
    no process made progress, and this one is behind another. So a phase that is long for all processes, such as an
    evaluation, is no stall.

    Time is counted in polls of this process: a machine that was suspended with all its processes finds, when it continues,
    that the others have not published, but has not polled meanwhile.

    Args:
        timeout: In seconds. None, or a single process, disables the watch.
    """

    def __init__(self, timeout: float | None):
        self.timeout, self.beats, self.closed = timeout, 0, threading.Event()
        self.is_asked: Callable[[], bool] = lambda: False
        if timeout is not None:
            self.poll = min(timeout / POLLS, LONGEST_POLL)  # seconds

    @contextmanager
    def watching(self, is_asked: Callable[[], bool]) -> Iterator[None]:
        """Context in which the processes are watched.

        On exit the watch ends. From then on other processes may end before this one, unless an error ends it: others then
        wait in vain.

        Args:
            is_asked: Returns whether this process was asked to stop. The run then ends sooner if a process is lost.
        """
        if self.timeout is None or world_size() == 1:
            yield
            return
        self.is_asked, self.rank, self.world = is_asked, rank(), world_size()
        # a connection of its own, as that of the main thread may be blocked; process 0 usually serves the store
        self.store = dist.distributed_c10d._get_default_store().clone()
        self._publish(0)
        dist.barrier()  # from here on every process has published
        thread = threading.Thread(target=self._watch, name="stall-watch", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self.closed.set()
            thread.join()
        with suppress(RuntimeError):  # the process of the store has ended
            self._publish(ENDED)

    def beat(self) -> None:
        """Note progress: this process is about to load a batch, or has loaded it."""
        self.beats += 1

    def _publish(self, alive: int) -> None:
        self.store.set(f"stall/{self.rank}", f"{alive} {self.beats} {int(self.is_asked())} {socket.gethostname()}")

    def _exchange(self, alive: int) -> list[bytes]:
        self._publish(alive)
        return self.store.multi_get([f"stall/{number}" for number in range(self.world)])

    def _watch(self) -> None:
        seen = [Seen() for _ in range(self.world)]
        polls = answered = progressed = 0
        # in a thread of its own, because the calls have no time limit where the process of the store is stopped
        pool = ThreadPoolExecutor(1)
        published: Future = pool.submit(self._exchange, polls)
        while not self.closed.wait(self.poll):
            polls += 1
            if published.done():
                if published.exception() is not None:  # the process of the store has ended
                    if not self.closed.wait(self.poll):
                        self._end(LOST.format(0, seen[0].host), 1, any(each.asked for each in seen))
                    return
                answered = polls
                if self._update(seen, published.result(), polls):
                    progressed = polls
                if any(each.alive == ENDED for each in seen):
                    return
                published = pool.submit(self._exchange, polls)
            asked = self.is_asked() or any(each.asked for each in seen)
            most = self.timeout / self.poll
            most_silent = min(most, STOP_TIMEOUT / self.poll) if asked else most
            silent = [number for number, each in enumerate(seen) if answered - each.changed > most_silent]
            lost = [0] if polls - answered > most_silent else silent
            behind = [number for number, each in enumerate(seen) if each.beats < max(other.beats for other in seen)]
            stalled = behind if polls - progressed > most else []
            for ranks, message in ((lost, LOST), (stalled, BEHIND)):
                if ranks:
                    first = next(number for number in range(self.world) if number not in lost)
                    self._end(message.format(ranks[0], seen[ranks[0]].host), first, asked)

    def _update(self, seen: list[Seen], published: list[bytes], polls: int) -> bool:
        """Note what the processes have published; return whether one of them made progress."""
        progress = False
        for each, text in zip(seen, published):
            alive, beats, asked, each.host = text.decode().split(" ", 3)
            if int(alive) != each.alive:
                each.alive, each.changed = int(alive), polls
            progress |= int(beats) != each.beats
            each.beats, each.asked = int(beats), asked == "1"
        return progress

    def _end(self, message: str, first: int, asked: bool) -> None:
        """End this process in place of its main thread, which is blocked. Only process ``first`` says why."""
        if self.rank == first:
            what = "stopped without a save" if asked else f"no progress for {self.timeout:g} s"
            print(f"vlp: {what}: {message}; {ADVICE}", file=sys.stderr, flush=True)
        # a launcher ends all processes as soon as one has ended, and the store ends with its process
        time.sleep(3 * self.poll)
        os._exit(STOPPED if asked else 1)
