"""The right to train in a run folder, which one process has at a time."""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import warnings
from pathlib import Path

from vlp.errors import UserError
from vlp.files import open_regular

HELD = (errno.EACCES, errno.EAGAIN)  # another process holds the lock
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # the file system has no locks


def is_training(folder: Path) -> bool:
    """Return whether a process trains in a run folder. False where the file system has no locks."""
    try:
        with open_regular(folder / "train.lock") as file:  # also left behind by a process that was killed
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as e:
        return e.errno in HELD and os.path.exists(folder / "train.lock")
    return False


class RunLock:
    """Context that may hold the lock of a run folder. Two trainings in one folder would overwrite each other's files.

    The lock is a record lock of the file ``train.lock``, which the system releases when the process ends, however it ends.
    Forked data workers do not inherit it. The file says who holds it, and is removed with the lock.
    """

    def __init__(self, folder: Path):
        self.path = folder / "train.lock"
        self.descriptor: int | None = None

    def acquire(self) -> None:
        """Take the lock, and create the folder if it does not exist.

        Raises:
            UserError: If another process trains in the folder, or the folder cannot be written.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            while not self._acquire():
                pass
        except OSError as e:
            raise UserError(
                f"cannot write {self.path.parent}: {e.strerror}; set output=FOLDER to one that can be written"
            ) from None

    def _acquire(self) -> bool:
        """Take the lock; return whether its file still is the one at the path, which the last holder may have removed."""
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            holder = os.read(descriptor, 200).decode(errors="replace")
            os.close(descriptor)
            if e.errno in HELD:
                raise UserError(
                    f"{self.path.parent} is being trained by {holder or 'another process'}; stop it first, or set another "
                    f"name=..."
                ) from None
            if e.errno not in UNSUPPORTED:
                raise
            self.path.unlink(missing_ok=True)
            warnings.warn(
                f"{self.path.parent} is on a file system without locks; train it once at a time", stacklevel=4
            )
            return True
        try:
            is_current = os.path.samestat(os.fstat(descriptor), os.stat(self.path))
        except FileNotFoundError:
            is_current = False
        if not is_current:
            os.close(descriptor)
            return False
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {platform.node()}".encode())
        self.descriptor = descriptor
        return True

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *_) -> None:
        if self.descriptor is not None:
            self.path.unlink(missing_ok=True)
            os.close(self.descriptor)
            self.descriptor = None
