"""Complete checkpoints in one background thread while training goes on. Only the main process has a saver that is used."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from vlp.training import checkpoint


class Saver:
    """Writer of the checkpoints of a run, one at a time.

    Args:
        folder: Folder of the checkpoints.
        keep: Number of newest checkpoints to keep in addition to the best one.
    """

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder, keep
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="saver")
        self.completed: Future | None = None

    def save(self, step: int, files: checkpoint.Files, state: dict) -> None:
        """Write a checkpoint's tensors, which may change afterwards, and start to complete it. Call `wait` before.

        Raises:
            UserError: If the tensors cannot be written.
        """
        temporary = checkpoint.write(self.folder, step, files, state)
        self.completed = self.pool.submit(self._complete, temporary, step)

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
