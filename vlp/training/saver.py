"""Complete checkpoints in one background thread while training goes on. Only the main process has a saver that is used."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from vlp.training import checkpoint


class Saver:
    """Writer of the checkpoints of a run, one at a time.

    Args:
        folder: Folder of the checkpoints.
        keep: Number of newest checkpoints to keep in addition to the best one.
        copy: Function that copies the run after each checkpoint. The next checkpoint is completed after it. None copies
            nothing.
    """

    def __init__(self, folder: Path, keep: int, copy: Callable[[], None] | None = None):
        self.folder, self.keep, self.copy = folder, keep, copy
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="saver")
        self.completed: Future | None = None

    def save(self, step: int, files: checkpoint.Files, state: dict) -> None:
        """Write a checkpoint's tensors, which may change afterwards, and start to complete it. Call `wait` before.

        Raises:
            UserError: If the tensors cannot be written.
        """
        temporary = checkpoint.write(self.folder, step, files, state)
        self.completed = self.pool.submit(self._complete, temporary, step)
        self.start_copy()

    def start_copy(self) -> Future | None:
        """Start to copy the run after what the background does now."""
        return self.pool.submit(self._copy_if_complete) if self.copy else None

    def _copy_if_complete(self) -> None:
        if self.completed is None or self.completed.exception() is None:
            self.copy()

    def finish(self) -> None:
        """Wait until the last checkpoint is complete, and copy the run a last time.

        Raises:
            UserError: As `check`.
        """
        self.wait()
        if copied := self.start_copy():
            copied.result()

    def _complete(self, temporary: Path, step: int) -> None:
        checkpoint.complete(temporary, self.folder, step)
        checkpoint.prune(self.folder, self.keep, step)

    def check(self) -> None:
        """Raise the error of the checkpoint in the background, if it has failed by now.

        Raises:
            UserError: If the disk is full or cannot be written.
        """
        if self.completed is not None and self.completed.done():
            self.completed.result()

    def wait(self) -> None:
        """Wait until the last checkpoint is complete.

        Raises:
            UserError: As `check`.
        """
        if self.completed is not None:
            self.completed.result()

    def close(self) -> None:
        """Wait for the background thread, without its errors: call `wait` for these."""
        self.pool.shutdown()
