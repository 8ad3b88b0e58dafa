"""Find, verify and read the checkpoints of a run; see `vlp.training.checkpoint` for the format."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn

from vlp.errors import UserError
from vlp.files import file_hash

Tensors = dict[str, Tensor]


def all_steps(folder: Path) -> list[Path]:
    """Checkpoint folders, the newest first."""
    return sorted((p for p in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", p.name)), reverse=True)


def best(folder: Path) -> dict | None:
    """{"step", "metric", "value"} of the best checkpoint, or None."""
    try:
        return json.loads((folder / "best.json").read_text())
    except (OSError, ValueError):
        return None


def best_path(folder: Path) -> Path | None:
    found = best(folder)
    return folder / f"step-{found['step']:08d}" if found else None


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        hashes = json.loads((checkpoint / "manifest.json").read_text())["sha256"]
        for name in sorted({"state.json", *(path.name for path in checkpoint.glob("*.safetensors"))} - hashes.keys()):
            return f"{name} is not in manifest.json"
        for name, expected in hashes.items():
            if file_hash(checkpoint / name) != expected:
                return f"{name} was altered (its SHA-256 is not the one in manifest.json)"
    except FileNotFoundError as e:
        return f"{Path(e.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "manifest.json is not readable"
    return None


def newest_whole(folder: Path) -> Path | None:
    """The newest undamaged checkpoint, with a warning for each damaged one passed over; None if there never was one.

    Raises:
        UserError: if there are checkpoints and all are damaged.
    """
    passed = []
    for path in all_steps(folder):
        wrong = damage(path)
        if wrong is None:
            for damaged in passed:
                warnings.warn(f"damaged checkpoint in {folder}: {damaged}; taking {path.name} instead", stacklevel=2)
            return path
        passed.append(f"{path.name}: {wrong}")
    if passed:
        raise UserError(f"every checkpoint in {folder} is damaged ({'; '.join(passed)}); remove them to start anew")
    return None


def read(checkpoint: Path, name: str) -> Tensors:
    """Raises UserError where the checkpoint has no such file: it is of an experiment that keeps other things."""
    if not (checkpoint / f"{name}.safetensors").is_file():
        raise UserError(f"{checkpoint} has no {name}.safetensors: it is of another experiment; put its own back")
    return load_file(checkpoint / f"{name}.safetensors")


def read_state(checkpoint: Path) -> dict:
    return json.loads((checkpoint / "state.json").read_text())


def load_model(model: nn.Module, tensors: Tensors, source: Path) -> None:
    """Raises UserError where the tensors are those of another model."""
    own = model.state_dict()
    missing, unexpected = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    other = [k for k in sorted(own.keys() & tensors.keys()) if own[k].shape != tensors[k].shape]
    for what, keys in (("lacks", missing), ("has unknown", unexpected), ("has another shape of", other)):
        if keys:
            raise UserError(
                f"{source} is of another model: it {what} {len(keys)} tensors, e.g. {keys[0]}; "
                f"use the experiment.json beside it"
            )
    model.load_state_dict(tensors)
