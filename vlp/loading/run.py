"""Load the model of a run folder. The config file and the weights that the run started from are not needed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from vlp.config import load_json
from vlp.data.text import load_tokenizer
from vlp.errors import UserError
from vlp.loading.base import NO_OPTIONS, LoadedModel, LoadOptions, on_device
from vlp.specs.names import NO_TYPES
from vlp.specs.types import check_types
from vlp.weights import checkpoints


def select_checkpoint(folder: Path, name: str | None) -> Path:
    """Return the path of one of a run's checkpoints.

    Args:
        folder: The run's ``checkpoints``.
        name: A step, "best" or "last". None takes the best one if one is marked, else the last.

    Raises:
        UserError: if there is no such checkpoint, or it is damaged.
    """
    best = checkpoints.best_path(folder)
    if name == "best" and best is None:
        raise UserError(f"{folder} has no best checkpoint; save.best was not set")
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
    if not (folder / "experiment.json").is_file():
        raise UserError(f"{folder} is not a run: it has no experiment.json")
    options.refuse("a run uses that which it was trained with", "tokenizer", "image_size", "head_width", "add_sep")
    experiment = load_json(folder / "experiment.json", own_types)
    check_types(experiment)
    path = select_checkpoint(folder / "checkpoints", checkpoint)
    averaged = (path / "average.safetensors").exists()
    weights = path / ("average.safetensors" if averaged else "model.safetensors")
    model = experiment.build_model(load_weights=False)
    checkpoints.load_model(model, checkpoints.read(path, weights.stem), path)
    eval_model = on_device(
        model,
        load_tokenizer(str(folder / "tokenizer")) if model.text is not None else None,
        options.applied_to(experiment.data),
        seed=experiment.seed,
        checkpoint=checkpoints.recorded_hashes(path)[weights.name],
        name=folder.resolve().name,
    )
    return LoadedModel(eval_model, folder, int(checkpoints.read_state(path)["step"]))
