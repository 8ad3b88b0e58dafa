"""Find, verify and read the checkpoints of a run. `vlp.training.checkpoint` describes the format."""

from __future__ import annotations

import json
import os
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from vlp.errors import UserError
from vlp.files import file_hash, read_regular

if TYPE_CHECKING:  # finding checkpoints, as `vlp runs` does, needs no torch
    from torch import Tensor, nn

Tensors = dict[str, "Tensor"]
MAX_JSON = 1 << 20  # bytes of a JSON file of a checkpoint, which has about a hundred per file


def step_path(folder: Path, step: int) -> Path:
    """Return the path of the checkpoint of a step, whether or not it exists."""
    return folder / f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    """Return the step of a checkpoint from its name."""
    return int(checkpoint.name.removeprefix("step-"))


def all_steps(folder: Path) -> list[Path]:
    """Return the checkpoint folders, newest first."""
    return sorted((p for p in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", p.name)), reverse=True)


def best(folder: Path) -> dict | None:
    """Return {"step", "metric", "value"} of the best checkpoint, or None if none is marked."""
    try:
        found = json.loads(read_regular(folder / "best.json", MAX_JSON))
        types = {"step": int, "metric": str, "value": (int, float)}
        return found if all(isinstance(found[key], kind) for key, kind in types.items()) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def best_path(folder: Path) -> Path | None:
    """Return the folder of the best checkpoint, or None if none is marked."""
    found = best(folder)
    return step_path(folder, found["step"]) if found else None


def damage(checkpoint: Path) -> str | None:
    """Return a description of the damage to a checkpoint, or None if it is intact."""
    try:
        hashes = recorded_hashes(checkpoint)
        for name in sorted({"state.json", *(path.name for path in checkpoint.glob("*.safetensors"))} - hashes.keys()):
            return f"{name} is not in manifest.json"
        for name, expected in hashes.items():
            if not (checkpoint / name).is_file():
                return f"{name} is missing" if not os.path.lexists(checkpoint / name) else f"{name} is not a file"
            if file_hash(checkpoint / name) != expected:
                return f"{name} was altered (its SHA-256 is not the one in manifest.json)"
    except FileNotFoundError as e:
        return f"{Path(e.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return "manifest.json is not readable"
    return None


def recorded_hashes(checkpoint: Path) -> dict[str, str]:
    """Return the SHA-256 of each file of a checkpoint as its manifest has it: those of the files once `damage` is None."""
    return json.loads(read_regular(checkpoint / "manifest.json", MAX_JSON))["sha256"]


def newest_whole(folder: Path) -> Path | None:
    """Return the newest undamaged checkpoint, with a warning for each damaged one that is newer.

    Returns:
        Its folder, or None if there is no checkpoint.

    Raises:
        UserError: if there are checkpoints and all are damaged.
    """
    skipped = []
    for path in all_steps(folder):
        problem = damage(path)
        if problem is None:
            for damaged in skipped:
                warnings.warn(f"damaged checkpoint in {folder}: {damaged}; taking {path.name} instead", stacklevel=2)
            return path
        skipped.append(f"{path.name}: {problem}")
    if skipped:
        raise UserError(f"every checkpoint in {folder} is damaged ({'; '.join(skipped)}); remove them to start again")
    return None


def read(checkpoint: Path, name: str) -> Tensors:
    """Return the tensors of one file of a checkpoint.

    Raises:
        UserError: if the checkpoint has no such file, since it is of an experiment with another state.
    """
    if not (checkpoint / f"{name}.safetensors").is_file():
        raise UserError(
            f"{checkpoint} has no {name}.safetensors, so it is of another experiment; restore the right one"
        )
    from safetensors.torch import load_file

    return load_file(checkpoint / f"{name}.safetensors")


def read_state(checkpoint: Path) -> dict:
    """Return the counters of a checkpoint."""
    return json.loads(read_regular(checkpoint / "state.json", MAX_JSON))


def load_model(model: nn.Module, tensors: Tensors, source: Path) -> None:
    """Load all tensors of a model.

    Args:
        model: The model.
        tensors: Its tensors by name.
        source: Where they come from, for messages.

    Raises:
        UserError: if the tensors are those of another model.
    """
    own = model.state_dict()
    missing, unexpected = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    other = [k for k in sorted(own.keys() & tensors.keys()) if own[k].shape != tensors[k].shape]
    for problem, keys in (("lacks", missing), ("has unknown", unexpected), ("has another shape of", other)):
        if keys:
            raise UserError(
                f"{source} is of another model: it {problem} {len(keys)} tensors, e.g. {keys[0]}; "
                f"use the experiment.json of its run folder"
            )
    model.load_state_dict(tensors)
