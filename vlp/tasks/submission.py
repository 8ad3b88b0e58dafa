"""Predictions as a file for an evaluation server."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from vlp.distributed import rank
from vlp.errors import UserError
from vlp.files import local_path, write_atomically


def need_ids(ids: Sequence[Any], field: str) -> None:
    """Raise UserError unless every line has an id that no other line has."""
    if None in ids or len(set(ids)) < len(ids):
        raise UserError(f"a submission needs {field} in every line, each once; make them with vlp data annotations")


def check_stored_tasks(tasks: Mapping[str, Any]) -> None:
    """Check that tasks of an experiment name no file to write, since opening a run must not write where its JSON says.

    Raises:
        UserError: For the first one that does.
    """
    for key, task in tasks.items():
        if vars(task).get("submission") is not None:
            raise UserError(
                f"evaluate.{key}.submission is a path in the experiment, and paths to write are given on the command line; "
                f"leave it out, and evaluate with vlp eval RUN {key} submission=FILE"
            )


def check_submission(path: str) -> None:
    """Check that a file can be written, before the evaluation, which may take hours. Nothing is left behind.

    Raises:
        UserError: if it cannot.
    """
    folder, made = local_path(path).parent, []
    try:
        for parent in reversed([folder, *folder.parents]):
            if not parent.exists():
                parent.mkdir()
                made.append(parent)
        if not os.access(folder, os.W_OK):
            raise UserError(f"cannot write into {folder}; choose another submission=FILE")
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror or e}; choose another submission=FILE") from None
    finally:
        for parent in reversed(made):
            parent.rmdir()


def write_submission(path: str, text: str, bad: Sequence[dict]) -> None:
    """Write the file in the main process. Every process must call it.

    Args:
        bad: Records of the samples without a prediction, in any process.

    Raises:
        UserError: in every process, if there is such a sample; or if the file cannot be written.
    """
    if bad:
        raise UserError(
            f"{len(bad)} samples have no prediction, e.g. {bad[0]['reason']}; a server accepts only complete submissions"
        )
    if rank() > 0:
        return
    try:
        local_path(path).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(local_path(path), text.encode())
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror or e}; choose another submission=FILE") from None
