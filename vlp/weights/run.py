"""Read the weights of an earlier run, to start a new one from."""

from __future__ import annotations

from typing import Any, Literal, TypeVar

from torch import Tensor

from vlp.errors import UserError
from vlp.files import local_path
from vlp.specs.json import Foreign, read_without_code
from vlp.weights import checkpoints

Spec = TypeVar("Spec")


def is_run(path: str | None) -> bool:
    """Return whether ``path`` is a run folder of vlp."""
    return path is not None and (local_path(path) / "experiment.json").is_file()


def run_spec(folder: str) -> Any:
    """Return the model spec of a run, with all its sizes.

    Raises:
        UserError: if the model is of a class outside vlp.
    """
    spec = read_without_code(local_path(folder) / "experiment.json").model
    if isinstance(spec, Foreign):
        raise UserError(f"the model of the run {folder} is of its own code ({spec.type}); name a run of a model of vlp")
    return spec


def tower_spec(folder: str, tower: Literal["image", "text"], kind: type[Spec]) -> Spec:
    """Return the spec of a run's image or text tower, with all its sizes.

    Args:
        kind: The class that the spec must have.

    Raises:
        UserError: if the run has no such tower, or one of another kind.
    """
    model = run_spec(folder)
    spec = model.image if tower == "image" else model.text
    if spec is None:
        raise UserError(f"the run {folder} has no {tower} tower to start from; name a run that has one")
    if not isinstance(spec, kind):
        name = spec.type if isinstance(spec, Foreign) else type(spec).__name__
        raise UserError(
            f"the {tower} tower of the run {folder} is a {name}, not a {kind.__name__}; start a {name} from it, or name "
            "another run"
        )
    return spec


def read_run(folder: str, part: str = "") -> dict[str, Tensor]:
    """Return the tensors of a run's model, or of one part of it.

    They are those of the newest undamaged checkpoint, and its averaged weights (EMA) where the run kept an average.

    Args:
        part: Dotted name of a module, e.g. ``image`` or ``text.model``. Names are relative to it. Empty means the whole
            model.

    Raises:
        UserError: if the run has no checkpoint, or no such part.
    """
    newest = checkpoints.newest_whole(local_path(folder) / "checkpoints")
    if newest is None:
        raise UserError(
            f"the run {folder} has no checkpoint to start from; train it first: vlp train --resume {folder}"
        )
    averaged = (newest / "average.safetensors").is_file()
    state = checkpoints.read(newest, "average" if averaged else "model")
    prefix = f"{part}." if part else ""
    found = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    if not found:
        raise UserError(f"the run {folder} has no {part} to start from; name a run that has one")
    return found
