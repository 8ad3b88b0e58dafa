"""Pre-training in stages: runs of which each starts from the weights of the one before. ``vlp train CONFIG [key=value ...]``.

FOLDER/1-images/ 2-text/ ...   the stages, each an ordinary run folder
"""

from __future__ import annotations

import os
from dataclasses import dataclass, fields, replace
from pathlib import Path

from vlp.config import Experiment, load_json
from vlp.errors import UserError
from vlp.specs.overrides import override
from vlp.specs.user_code import NO_CODE, UserCode
from vlp.sweeps.run_queue import RunQueue, begun, check_same, finished
from vlp.training.validation import validate


@dataclass(frozen=True)
class Stages:
    """What to train, one after the other.

    Args:
        stages: name -> experiment, in order; the name is that of its folder. A stage starts from the newest whole checkpoint
            of the one before, whatever its own ``model.weights`` says; the first from what it says.
        output: folder that the folder of the stages is made in.
    """

    name: str
    stages: dict[str, Experiment]
    output: str = "runs"

    @property
    def folder(self) -> Path:
        return Path(self.output) / self.name

    def runs(self) -> list[Experiment]:
        """The stages as they are run.

        Raises:
            UserError: if there is none, or the model of a later one cannot start from a run.
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
        """As `vlp.specs.overrides.override`: ``name`` and ``output`` are of the whole, ``stages.NAME.KEY`` of one stage (or
        ``stages.1.KEY`` of the first), every other key of all.

        Raises:
            UserError: as `vlp.specs.overrides.override` does.
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


def train_stages(stages: Stages, command: str, say=print, code: UserCode = NO_CODE) -> None:
    """Trains what is not trained yet, each stage in a process of its own; asked to stop, it says how to go on.

    Where a launcher has connected several processes these are the engine, which is set up once: then the stage that is next is
    trained in them, and the command is to be given again for the one after.

    Args:
        command: what to type to go on.
        code: The user's own code that the experiments are made of.

    Raises:
        UserError: if a stage is not valid, a folder holds another one, or a run fails.
    """
    runs = stages.runs()
    for run in runs:
        validate(run)
        check_same(run)
        for source in run.data.train:  # of the last one, too, before the first is trained
            source.open()
    missing = [run for run in runs if not finished(run)]
    if os.environ.get("RANK", "0") != "0":
        say = lambda text: None  # noqa: E731 - the main process says it
    if not missing:
        say(f"{stages.folder}: all {len(runs)} stages are done")
    elif int(os.environ.get("WORLD_SIZE", 1)) > 1:
        _train_connected(missing, command, say, code)
    else:
        with RunQueue(code) as series:
            for run in missing:
                say(f"{run.folder}")
                if not series.train(run):
                    say(f"stopped in stage {run.name}; continue with: {command}")
                    return
        say(f"done: {stages.folder}")


def _train_connected(missing: list[Experiment], command: str, say, code: UserCode) -> None:
    from vlp.train import train

    run, *later = missing
    say(f"{run.folder} (a launcher's processes train one stage; give the same command again for the next)")
    if begun(run):
        saved = load_json(run.folder / "experiment.json", code.types)
        train(replace(saved, name=run.name, output=run.output), resume=True, code=code)
    else:
        train(run, code=code)
    if finished(run):
        say(f"{run.name} is done; continue with {later[0].name}: {command}" if later else f"done: {run.folder.parent}")
