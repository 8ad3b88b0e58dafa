"""Train runs one after the other, each in its own process, since a process can set up an engine only once.

The queue can be stopped and started again: it skips finished runs and resumes a run that has started.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import FrameType

from vlp.config import Experiment, changed_keys, load_json
from vlp.errors import UserError
from vlp.files import read_log, write_atomically
from vlp.specs.json import dump
from vlp.specs.origin import COMMAND, command_line
from vlp.specs.user_code import NO_CODE, UserCode, own_types
from vlp.training.interrupts import StopRequest
from vlp.training.logging import is_evaluated
from vlp.weights import checkpoints


def has_started(experiment: Experiment) -> bool:
    return (experiment.folder / "experiment.json").exists()


def check_same(experiment: Experiment) -> None:
    """Check that the run's folder, if it exists, contains the same experiment.

    Raises:
        UserError: If it contains another one.
    """
    if not has_started(experiment):
        return
    saved = load_json(experiment.folder / "experiment.json", own_types(experiment))
    if changed := changed_keys(saved, experiment.resolved()):
        raise UserError(
            f"{experiment.folder} was started with other values of {', '.join(changed[:5])}; give another name=..., or "
            f"remove the folder"
        )


def is_finished(experiment: Experiment) -> bool:
    """Return whether the run's last step is saved, and evaluated if the experiment has tasks."""
    starts = read_log(experiment.folder / "starts.jsonl")
    total = starts[-1].get("total_steps", experiment.train.steps) if starts else None
    saved = checkpoints.all_steps(experiment.folder / "checkpoints")
    if total is None or not saved or checkpoints.step_of(saved[0]) != total:
        return False
    return not experiment.evaluate or is_evaluated(experiment.folder, total)


class RunQueue(StopRequest):
    """Context that trains one run at a time and forwards Ctrl-C and SIGTERM to it. The run then saves and exits.

    Args:
        code: The user's own code that the experiments are made of.
    """

    def __init__(self, code: UserCode = NO_CODE):
        super().__init__()
        self.code = code
        self.process: subprocess.Popen | None = None

    def handle(self, number: int, frame: FrameType | None) -> None:
        super().handle(number, frame)
        if self.process is not None:
            self.process.send_signal(number)

    def train(self, experiment: Experiment) -> bool:
        """Start or resume the run; return whether it finished, False if it was asked to stop.

        Raises:
            SystemExit: With code 2, if the experiment is refused. Its process has printed the reason.
            UserError: If the run fails in another way.
        """
        if self.asked:
            return False
        folder = experiment.folder
        resumed = has_started(experiment)
        arguments = ["--resume", str(folder)] if resumed else [str(_write_experiment(experiment))]
        if experiment.data.stream is not None:
            arguments += experiment.data.stream.commands_to_name
        environment = os.environ | {COMMAND: shlex.join(command_line())}
        command = [sys.executable, "-m", "vlp.train", *arguments, *self.code.options]
        self.process = subprocess.Popen(command, env=environment)
        if self.asked:  # while the process was being created
            self.process.send_signal(self.signal)
        exit_code = self.process.wait()
        self.process = None
        if not has_started(experiment):  # it was refused, so leave nothing behind
            _experiment_file(experiment).unlink(missing_ok=True)
            with suppress(OSError):  # the folder of other runs stays
                folder.parent.rmdir()
        if exit_code == 2 and not self.asked:
            sys.exit(exit_code)
        if exit_code and not self.asked:
            raise UserError(f"{folder} ended with exit code {exit_code}; run the command again to continue")
        return is_finished(experiment)


def _experiment_file(experiment: Experiment) -> Path:
    return experiment.folder.parent / f"{experiment.folder.name}.json"


def _write_experiment(experiment: Experiment) -> Path:
    """Write the experiment next to its run folder, as the config of the process that starts it."""
    path = _experiment_file(experiment)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, dump(experiment).encode())
    except OSError as e:
        raise UserError(
            f"cannot write {path.parent}: {e.strerror or e}; set output=FOLDER to one that can be written"
        ) from None
    return path
