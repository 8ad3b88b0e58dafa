"""Save checkpoints: folders of safetensors and JSON in the same form for every engine.

    step-00000500/ model.safetensors  optimizer.safetensors  average.safetensors  state.json  manifest.json

The folder is written under a temporary name, synced, and renamed, so a folder with the final name is complete. Training
waits only until the tensors are written: see `vlp.training.saver` for the rest.
manifest.json has the SHA-256 of every file, which is checked before anything is loaded. Nothing is ever unpickled.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from vlp.errors import UserError
from vlp.files import file_hash, write_atomically
from vlp.weights.checkpoints import all_steps, best_path, step_of, step_path

# torch's types by their names in safetensors files
TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@runtime_checkable
class Sharded(Protocol):
    """A tensor of which every process has a part, such as torch's DTensor."""

    shape: torch.Size
    dtype: torch.dtype

    def full_tensor(self) -> Tensor:
        """Gather the tensor. Every process must call this."""
        ...


Files = Mapping[str, Mapping[str, Tensor | Sharded]]
"""The files of a checkpoint: name of a safetensors file -> its tensors by name."""


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _in_order(tensors: Mapping[str, Tensor | Sharded]) -> list[tuple[str, Tensor | Sharded]]:
    """Return the tensors in the order of a file: the largest types first, so that every tensor is aligned."""
    return sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))


def save_file(tensors: Mapping[str, Tensor | Sharded], path: Path) -> None:
    """Write a safetensors file, one tensor after the other.

    Sharded tensors are gathered in this order, so that the memory of this process grows by the largest one only. The bytes
    are those that safetensors' own ``save_file`` writes for whole tensors in some order.
    """
    header, end = {}, 0
    for name, tensor in _in_order(tensors):
        start, end = end, end + math.prod(tensor.shape) * tensor.dtype.itemsize
        header[name] = {"dtype": TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in _in_order(tensors):
            whole = tensor.full_tensor() if isinstance(tensor, Sharded) else tensor
            file.write(whole.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            del whole  # before the next one is gathered


def gather(files: Files) -> None:
    """Take part in the `save` of the main process, which gathers the tensors that are sharded over processes."""
    for tensors in files.values():
        for _, tensor in _in_order(tensors):
            if isinstance(tensor, Sharded):
                tensor.full_tensor()


def save(folder: Path, step: int, files: Files, state: dict) -> Path:
    """Write and complete the checkpoint ``folder/step-STEP``; return its folder. See `write` and `complete`."""
    return complete(write(folder, step, files, state), folder, step)


def write(folder: Path, step: int, files: Files, state: dict) -> Path:
    """Write the tensors and counters of a checkpoint under a temporary name, without waiting for the disk.

    From then on the tensors may change. Where tensors are sharded, the other processes must call `gather`.

    Args:
        folder: Folder of the checkpoints.
        step: Optimizer steps so far.
        files: Name of a safetensors file -> its tensors.
        state: Counters for state.json.

    Returns:
        The temporary folder, which `complete` makes a checkpoint.

    Raises:
        UserError: If the folder cannot be written (disk full, no permission). An earlier checkpoint is not changed.
    """
    temporary = folder / f".{step_path(folder, step).name}.{os.getpid()}.tmp"
    with _removed_on_error(temporary, step_path(folder, step)):
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".step-*.tmp"):  # of a process that was killed during a save
            shutil.rmtree(leftover, ignore_errors=True)
        temporary.mkdir()
        for name, tensors in files.items():
            save_file(tensors, temporary / f"{name}.safetensors")
        (temporary / "state.json").write_text(json.dumps(state, indent=1))
    return temporary


def complete(temporary: Path, folder: Path, step: int) -> Path:
    """Hash and sync the files of a checkpoint, add its manifest, and give it its final name.

    Args:
        temporary: The folder that `write` returned.
        folder: Folder of the checkpoints.
        step: Step of the checkpoint.

    Returns:
        The checkpoint's folder.

    Raises:
        UserError: If the disk is full or cannot be written. An earlier checkpoint is not changed.
    """
    final = step_path(folder, step)
    with _removed_on_error(temporary, final):
        hashes = {path.name: file_hash(path) for path in sorted(temporary.iterdir())}
        (temporary / "manifest.json").write_text(json.dumps({"step": step, "sha256": hashes}, indent=1))
        for path in temporary.iterdir():
            _sync(path)
        _sync(temporary)
        if final.exists():  # damaged, since the run was resumed from an earlier one
            remove(final)
        os.replace(temporary, final)
        _sync(folder)
    return final


@contextmanager
def _removed_on_error(temporary: Path, final: Path) -> Iterator[None]:
    """Context in which an error removes the temporary folder, and one of the disk becomes a UserError."""
    try:
        yield
    except BaseException as e:
        shutil.rmtree(temporary, ignore_errors=True)
        if not isinstance(e, OSError):
            raise
        reason = e.strerror or str(e)
        full = e.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "free some space" if full else "check that the folder can be written"
        raise UserError(f"cannot save {final}: {reason}; {advice}, then resume the run") from None


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint. It is renamed first, so that a partly removed one never has a final name."""
    gone = checkpoint.with_name(f".{checkpoint.name}.{os.getpid()}.old.tmp")
    os.replace(checkpoint, gone)
    shutil.rmtree(gone, ignore_errors=True)


def prune(folder: Path, keep: int, step: int) -> None:
    """Remove all checkpoints except for the newest ``keep`` ones up to ``step`` and the best one.

    A checkpoint after ``step`` is damaged, since the run was resumed from an earlier one.
    """
    newest = [path for path in all_steps(folder) if step_of(path) <= step][:keep]
    for path in all_steps(folder):
        if path not in newest and path != best_path(folder):
            remove(path)


def mark_best(folder: Path, step: int, metric: str, value: float) -> None:
    """Record which checkpoint is the best one."""
    write_atomically(folder / "best.json", json.dumps({"step": step, "metric": metric, "value": value}).encode())
