"""A run folder -> the model that it trained, ready to be evaluated or used; the config file and first weights are not needed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import PartialState

from vlp.config import load_json
from vlp.data.text import load_tokenizer
from vlp.errors import UserError
from vlp.files import file_hash
from vlp.specs.names import NO_TYPES
from vlp.specs.types import check_types
from vlp.tasks.base import EvalModel
from vlp.weights import checkpoints


def choose(folder: Path, which: str | None) -> Path:
    """The checkpoint that ``which`` names: a step, "best", "last", or None = the best if one is marked, else the last."""
    best = checkpoints.best_path(folder)
    if which == "best" and best is None:
        raise UserError(f"{folder} has no best checkpoint; save.best was not set")
    if which == "best" or (which is None and best is not None):
        chosen = best
    elif which in (None, "last"):
        chosen = checkpoints.newest_whole(folder)
        if chosen is None:
            raise UserError(f"{folder} has no checkpoint yet; train on with vlp train --resume {folder.parent}")
        return chosen
    elif which.isdigit():
        chosen = folder / f"step-{int(which):08d}"
    else:
        raise UserError(f"--checkpoint takes a step, 'best' or 'last', not {which!r}")
    if not chosen.is_dir():
        steps = ", ".join(str(int(p.name[5:])) for p in checkpoints.all_steps(folder))
        raise UserError(f"{folder} has no checkpoint {chosen.name}; there are steps {steps or 'none'}")
    if wrong := checkpoints.damage(chosen):
        raise UserError(f"{chosen} is damaged: {wrong}; choose another with --checkpoint")
    return chosen


def open_run(folder: Path, which: str | None = None, own_types: Mapping[str, type] = NO_TYPES) -> tuple[EvalModel, int]:
    """(model with its tokenizer and data settings, step). The averaged weights are taken where the run kept an average.

    Args:
        own_types: Classes outside vlp that the run's experiment.json may name: see `vlp.specs.user_code`.

    Raises:
        UserError: if the folder is no run, or the checkpoint is missing, damaged or of another model.
    """
    if not (folder / "experiment.json").is_file():
        raise UserError(f"{folder} is not a run: it has no experiment.json")
    experiment = load_json(folder / "experiment.json", own_types)
    check_types(experiment)
    path = choose(folder / "checkpoints", which)
    averaged = (path / "average.safetensors").exists()
    weights = path / ("average.safetensors" if averaged else "model.safetensors")
    model = experiment.model.build(load_weights=False)
    checkpoints.load_model(model, checkpoints.read(path, weights.stem), path)
    process = PartialState(cpu=not torch.cuda.is_available())
    subject = EvalModel(
        model.to(process.device).eval(),
        load_tokenizer(str(folder / "tokenizer")) if model.text is not None else None,
        experiment.data,
        process.device,
        experiment.seed,
        file_hash(weights),
        process.process_index,
        folder.resolve().name,
    )
    return subject, int(checkpoints.read_state(path)["step"])
