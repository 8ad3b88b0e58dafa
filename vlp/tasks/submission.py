"""Answers as a file for a server that judges them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from vlp.errors import UserError
from vlp.files import local_path, write_atomically


def need_ids(ids: Sequence[Any], field: str) -> None:
    """Raises UserError unless every line has one of its own."""
    if None in ids or len(set(ids)) < len(ids):
        raise UserError(f"a submission needs {field} in every line, each once; make them with vlp data annotations")


def check_submission(path: str) -> None:
    """Raises UserError where nothing can be written there: before the work, not after it."""
    try:
        local_path(path).parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror or e}; choose another submission=FILE") from None
    if not os.access(local_path(path).parent, os.W_OK):
        raise UserError(f"cannot write into {local_path(path).parent}; choose another submission=FILE")


def write_submission(path: str, text: str, bad: Sequence[dict], rank: int) -> None:
    """The main process writes; every process calls it.

    Args:
        bad: what could not be answered, on any process.

    Raises:
        UserError: if there is something of that kind, on every process; or if it cannot be written.
    """
    if bad:
        raise UserError(f"{len(bad)} could not be answered, e.g. {bad[0]['reason']}; a server takes none but all")
    if rank != 0:
        return
    try:
        local_path(path).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(local_path(path), text.encode())
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror or e}; choose another submission=FILE") from None
