"""Pre-training in stages: a sequence of runs, each of which starts from the weights of the previous one.

``vlp train CONFIG [key=value ...]`` trains them. Each stage is an ordinary run folder: FOLDER/1-images/, FOLDER/2-text/, ...
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path

from vlp.config import Experiment, load_json
from vlp.errors import UserError
from vlp.files import local_path
from vlp.specs.overrides import override
from vlp.specs.user_code import NO_CODE, UserCode
from vlp.sweeps.run_queue import RunQueue, check_same, has_started, is_finished
from vlp.training.validation import validate, validate_tasks


@dataclass(frozen=True)
class Stages:
    """Experiments to train one after the other.

    Args:
        name: Name of the folder that contains the stages.
        stages: Name -> experiment, in order. The name is that of the stage's folder. The first stage starts from its own
            ``model.weights``. Each later stage starts from the newest undamaged checkpoint of the previous stage, and its
            ``model.weights`` is replaced.
        output: Folder in which the folder of the stages is created.
    """

    name: str
    stages: dict[str, Experiment]
    output: str = "runs"

    @property
    def folder(self) -> Path:
        return local_path(self.output) / self.name

    def runs(self) -> list[Experiment]:
        """Return the experiments with the folders and weights that they are trained with.

        Raises:
            UserError: If there is no stage, or the model of a later one cannot start from a run.
        """
        if not self.stages:
            raise UserError(f"{self.name} has no stage; give stages={{NAME: EXPERIMENT, ...}}")
        runs: list[Experiment] = []
        for name, stage in self.stages.items():
            if runs:
                if "weights" not in {f.name for f in fields(stage.model)}:
                    kind = type(stage.model).__name__
                    raise UserError(f"stage {name}: a {kind} has no field weights, so it cannot start from a run")
                stage = replace(stage, model=replace(stage.model, weights=str(runs[-1].folder)))
            runs.append(replace(stage, name=name, output=str(self.folder)))
        return runs

    def overridden(self, assignments: list[str]) -> Stages:
        """Return the stages with each ``dotted.key=value`` applied in turn: see `vlp.specs.overrides.override`.

        ``name`` and ``output`` are fields of the stages. ``stages.NAME.KEY``, or ``stages.1.KEY`` for the first, is a field
        of one experiment. Every other key is a field of all experiments.

        Raises:
            UserError: For an unknown key or a value of a wrong type.
        """
        changed = self
        for assignment in assignments:
            key, equals, text = assignment.partition("=")
            head, *rest = key.split(".")
            if head == "stages":
                if rest and rest[0].isdigit() and 1 <= int(rest[0]) <= len(self.stages):
                    rest[0] = list(self.stages)[int(rest[0]) - 1]
                if rest and rest[0].isdigit():
                    raise UserError(f"{key}: the stages are 1 to {len(self.stages)} ({', '.join(self.stages)})")
                changed = override(changed, [".".join([head, *rest]) + equals + text])
            elif head in ("name", "output"):
                changed = override(changed, [assignment])
            else:
                changed = replace(changed, stages={n: override(e, [assignment]) for n, e in changed.stages.items()})
        return changed


def train_stages(stages: Stages, command: str, log: Callable[[str], None] = print, code: UserCode = NO_CODE) -> None:
    """Train the stages that are not finished, each in its own process.

    Processes that a launcher has connected can set up an engine only once. They train the next stage, and the user runs
    the same command again for the one after it.

    Args:
        command: Command line that continues the stages, for messages.
        log: Receives one line for each stage.
        code: The user's own code that the experiments are made of.

    Raises:
        UserError: If a stage is not valid, its folder contains another experiment, or a run fails.
    """
    runs = stages.runs()
    for run in runs:
        validate(run)
        check_same(run)
        for source in run.data.train:  # a missing source of the last stage fails before the first is trained
            source.open()
    missing = [run for run in runs if not is_finished(run)]
    for run in missing:
        validate_tasks(run)
    if os.environ.get("RANK", "0") != "0":
        log = lambda text: None  # noqa: E731 - only the main process prints
    if not missing:
        log(f"{stages.folder}: all {len(runs)} stages are finished")
    elif int(os.environ.get("WORLD_SIZE", 1)) > 1:
        _train_connected(missing, command, log, code)
    else:
        with RunQueue(code) as queue:
            for run in missing:
                log(f"{run.folder}")
                if not queue.train(run):
                    log(f"stopped in stage {run.name}; continue with: {command}")
                    return
        log(f"done: {stages.folder}")


def _train_connected(missing: list[Experiment], command: str, log: Callable[[str], None], code: UserCode) -> None:
    from vlp.train import train

    run, *later = missing
    log(f"{run.folder} (launched processes train one stage; run the same command again for the next)")
    if has_started(run):
        saved = load_json(run.folder / "experiment.json", code.types)
        train(replace(saved, name=run.name, output=run.output, save=run.save), resume=True, code=code)
    else:
        train(run, code=code)
    if is_finished(run):
        log(f"{run.name} is done; continue with {later[0].name}: {command}" if later else f"done: {run.folder.parent}")
