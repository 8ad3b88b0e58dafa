"""Load the model of a run folder. The config file and the weights that the run started from are not needed."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from vlp.config import load_json
from vlp.data.text import load_tokenizer
from vlp.errors import UserError
from vlp.loading.base import NO_OPTIONS, LoadedModel, LoadOptions, on_device
from vlp.specs.names import NO_TYPES
from vlp.specs.types import check_types
from vlp.weights import checkpoints

TRIES = 30  # to read a checkpoint before the training replaces it


def select_checkpoint(folder: Path, name: str | None) -> Path:
    """Return the path of one of a run's checkpoints.

    Args:
        folder: The run's ``checkpoints``.
        name: A step, "best" or "last". None takes the best one if one is marked, else the last.

    Raises:
        UserError: if there is no such checkpoint, or it is damaged.
    """
    best = checkpoints.best_path(folder)
    is_damaged = best is None and (folder / "best.json").exists()
    if name == "best" and best is None:
        reason = "its best.json is damaged" if is_damaged else "save.best was not set"
        raise UserError(f"{folder} has no best checkpoint; {reason}")
    if name is None and is_damaged:
        warnings.warn(f"{folder / 'best.json'} is damaged; taking the last checkpoint", stacklevel=2)
    if name == "best" or (name is None and best is not None):
        chosen = best
    elif name in (None, "last"):
        chosen = checkpoints.newest_whole(folder)
        if chosen is None:
            raise UserError(f"{folder} has no checkpoint yet; train on with vlp train --resume {folder.parent}")
        return chosen
    elif name.isdigit():
        chosen = checkpoints.step_path(folder, int(name))
    else:
        raise UserError(f"--checkpoint takes a step, 'best' or 'last', not {name!r}")
    if not chosen.is_dir():
        steps = ", ".join(str(checkpoints.step_of(p)) for p in checkpoints.all_steps(folder))
        raise UserError(f"{folder} has no checkpoint {chosen.name}; there are steps {steps or 'none'}")
    if problem := checkpoints.damage(chosen):
        raise UserError(f"{chosen} is damaged: {problem}; choose another with --checkpoint")
    return chosen


@dataclass
class StoredWeights:
    """Weights of one checkpoint, averaged (EMA) where the run kept an average.

    Args:
        path: Folder of the checkpoint.
        tensors: Tensors of the model by name.
        sha256: Hash of their file.
    """

    path: Path
    tensors: dict[str, Tensor]
    sha256: str


def read_weights(folder: Path, name: str | None) -> StoredWeights:
    """Read the weights of one of a run's checkpoints.

    A training that goes on removes checkpoints, maybe the selected one between two reads. Then the one that has taken its
    place is read.

    Args:
        folder: The run's ``checkpoints``.
        name: See `select_checkpoint`.

    Raises:
        UserError: as `select_checkpoint`, or if the files cannot be read.
    """
    for _ in range(TRIES):
        before = checkpoints.all_steps(folder), checkpoints.best_path(folder)
        try:
            path = select_checkpoint(folder, name)
            kind = "average" if (path / "average.safetensors").exists() else "model"
            return StoredWeights(
                path, checkpoints.read(path, kind), checkpoints.recorded_hashes(path)[f"{kind}.safetensors"]
            )
        except (OSError, SafetensorError, UserError) as e:
            if (checkpoints.all_steps(folder), checkpoints.best_path(folder)) != before:
                continue
            if isinstance(e, UserError):
                raise
            raise UserError(f"{folder} cannot be read ({e}); choose another checkpoint with --checkpoint") from None
    raise UserError(f"the checkpoints in {folder} are replaced faster than they are read; raise the run's save.keep")


def load_run(
    folder: Path,
    checkpoint: str | None = None,
    options: LoadOptions = NO_OPTIONS,
    own_types: Mapping[str, type] = NO_TYPES,
) -> LoadedModel:
    """Load the model of a run, with its averaged weights (EMA) where the run kept an average.

    Args:
        folder: The run folder.
        checkpoint: See `select_checkpoint`.
        options: Data settings that replace those of the run.
        own_types: Classes outside vlp that the run's experiment.json may name, see `vlp.specs.user_code`.

    Raises:
        UserError: if the folder is not a run, or the checkpoint is missing, damaged or of another model.
    """
    path = folder / "experiment.json"
    if not path.is_file():
        raise UserError(f"{folder} is not a run: it has no experiment.json")
    options.refuse("a run uses that which it was trained with", "tokenizer", "image_size", "head_width", "add_sep")
    experiment = load_json(path, own_types)
    try:
        check_types(experiment)
        model = experiment.build_model(load_weights=False)
    except UserError as e:
        raise UserError(f"{path}: {e}") from None
    except Exception as e:  # sizes that no model has make the libraries below raise anything
        reason = " ".join(f"{type(e).__name__}: {e}".split())[:200]
        raise UserError(f"{path} describes no model that can be built ({reason}); restore the file") from None
    weights = read_weights(folder / "checkpoints", checkpoint)
    checkpoints.load_model(model, weights.tensors, weights.path)
    eval_model = on_device(
        model,
        load_tokenizer(str(folder / "tokenizer")) if model.text is not None else None,
        options.applied_to(experiment.data),
        seed=experiment.seed,
        checkpoint=weights.sha256,
        name=folder.resolve().name,
    )
    return LoadedModel(eval_model, folder, checkpoints.step_of(weights.path))
