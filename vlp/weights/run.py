"""Start a new run from the weights of an earlier one."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from vlp.errors import UserError
from vlp.specs.json import read
from vlp.weights import checkpoints


def is_run(path: str | None) -> bool:
    """Whether ``path`` is the folder of a run of vlp."""
    return path is not None and (Path(path).expanduser() / "experiment.json").is_file()


def run_spec(folder: str, tower: Literal["image", "text"] | None = None) -> Any:
    """The spec of a run's image or text tower, or of its whole model, with all its sizes.

    Raises:
        UserError: if the run has no such tower.
    """
    spec = read(Path(folder).expanduser() / "experiment.json").model
    if tower is not None:
        spec = getattr(spec, tower, None)
    if spec is None:
        raise UserError(f"the run {folder} has no {tower} tower to start from; name a run that has one")
    return spec


def read_run(folder: str, tower: Literal["image", "text"]) -> dict[str, Tensor]:
    """The tensors of a run's tower, without its heads: see `run_state`.

    Raises:
        UserError: if the run has no such tower, or no checkpoint.
    """
    run_spec(folder, tower)
    prefix = f"{tower}.model."
    return {key.removeprefix(prefix): value for key, value in run_state(folder).items() if key.startswith(prefix)}


def run_state(folder: str) -> dict[str, Tensor]:
    """All tensors of a run's model: of the newest whole checkpoint, averaged if it kept an average.

    Raises:
        UserError: if the run has no checkpoint.
    """

    whole = checkpoints.newest_whole(Path(folder).expanduser() / "checkpoints")
    if whole is None:
        raise UserError(
            f"the run {folder} has no checkpoint to start from; train it first: vlp train --resume {folder}"
        )
    averaged = (whole / "average.safetensors").is_file()
    return checkpoints.read(whole, "average" if averaged else "model")
