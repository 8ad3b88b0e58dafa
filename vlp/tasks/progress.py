"""Progress of whatever takes longer than two seconds: a bar on a terminal, and for evaluations a line elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import TypeVar

Item = TypeVar("Item")
FIRST_BAR = 2.0  # seconds after which a bar appears
EVERY_LINE = 10.0  # seconds between two lines
NAME: ContextVar[str] = ContextVar("name of the evaluation", default="encoding")


@contextmanager
def progress_bar(description: str, transient: bool = False) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar on stderr, if that is a terminal.

    Args:
        description: Text before the bar.
        transient: Whether the bar is removed at the end.

    Yields:
        Function that updates the bar, called with (done, total).
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=transient) as progress:
        task = progress.add_task(description)
        yield lambda done, total: progress.update(task, completed=done, total=total)


@contextmanager
def evaluation(name: str) -> Iterator[None]:
    """Name the evaluation that `tracked` shows."""
    before = NAME.set(name)
    try:
        yield
    finally:
        NAME.reset(before)


def tracked(batches: Iterable[Item], total: int) -> Iterator[Item]:
    """Yield the batches of this process, and show in the main process how many of them are done.

    A terminal gets a bar after `FIRST_BAR` seconds, which is removed at the end. Another stderr, such as a scheduler's log
    file, gets a line every `EVERY_LINE` seconds.
    """
    from vlp.distributed import rank

    if rank() > 0:
        yield from batches
        return
    began = last_line = time.monotonic()
    show: Callable[[int, int], None] | None = None
    with ExitStack() as stack:
        for done, batch in enumerate(batches):
            now = time.monotonic()
            if sys.stderr.isatty():
                if show is None and now - began > FIRST_BAR:
                    show = stack.enter_context(progress_bar(NAME.get(), transient=True))
                if show is not None:
                    show(done, total)
            elif done and now - last_line > EVERY_LINE:
                last_line = now
                left = (now - began) / done * (total - done)
                print(
                    f"{NAME.get()}: batch {done:,}/{total:,}  about {left / 60:.1f} min left",
                    file=sys.stderr,
                    flush=True,
                )
            yield batch
