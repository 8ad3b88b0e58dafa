"""Runs one after the other, each in a process of its own, since an engine is set up once in a process.

Asked for again they go on where they stopped: a run that is finished is left alone, one that was begun is resumed.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from contextlib import suppress

from vlp.config import Experiment, changed_keys, load_json
from vlp.data.reading.shards import write_atomically
from vlp.errors import UserError
from vlp.specs.json import dump
from vlp.specs.user_code import NO_CODE, UserCode, own_types
from vlp.training.logging import read_log
from vlp.weights import checkpoints


def begun(experiment: Experiment) -> bool:
    return (experiment.folder / "experiment.json").exists()


def check_same(experiment: Experiment) -> None:
    """Check that the run's folder, if it exists, contains the same experiment.

    Raises:
        UserError: If it contains another one.
    """
    if not begun(experiment):
        return
    saved = load_json(experiment.folder / "experiment.json", own_types(experiment))
    if changed := changed_keys(saved, experiment.resolved()):
        raise UserError(
            f"{experiment.folder} was started with other values of {', '.join(changed[:5])}; give another name=..., or "
            f"remove the folder"
        )


def finished(experiment: Experiment) -> bool:
    """Whether the run's last step is saved, and evaluated where the experiment evaluates."""
    starts = read_log(experiment.folder / "starts.jsonl")
    total = starts[-1].get("total_steps", experiment.train.steps) if starts else None
    saved = checkpoints.all_steps(experiment.folder / "checkpoints")
    if total is None or not saved or saved[0].name != f"step-{total:08d}":
        return False
    return not experiment.evaluate or any(e["step"] == total for e in read_log(experiment.folder / "eval.jsonl"))


class RunQueue:
    """Trains one run at a time; as a context it passes Ctrl-C and SIGTERM on to the run under way, which saves and ends.

    Args:
        code: The user's own code that the experiments are made of.
    """

    def __init__(self, code: UserCode = NO_CODE):
        self.code = code
        self.process: subprocess.Popen | None = None
        self.asked: int | None = None  # the signal

    def __enter__(self) -> RunQueue:
        self.before = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _handle(self, number: int, frame) -> None:
        self.asked = number
        if self.process is not None:
            self.process.send_signal(number)

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def train(self, experiment: Experiment) -> bool:
        """Begins the run, or goes on with it; True if it got to its end, False if it was asked to stop.

        Raises:
            SystemExit: with 2, if it cannot run; it has said why in its line.
            UserError: if it fails otherwise.
        """
        if self.asked:
            return False
        folder = experiment.folder
        written, arguments = folder.parent / f"{folder.name}.json", ["--resume", str(folder)]
        if not begun(experiment):
            try:
                folder.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(written, dump(experiment).encode())
            except OSError as e:
                raise UserError(
                    f"cannot write {folder.parent}: {e.strerror or e}; set output=FOLDER to one that can be written"
                ) from None
            arguments = [str(written)]
        self.process = subprocess.Popen([sys.executable, "-m", "vlp.train", *arguments, *self.code.options])
        if self.asked:  # while it was being started
            self.process.send_signal(self.asked)
        code = self.process.wait()
        self.process = None
        if not begun(experiment):  # it was refused: nothing of it stays
            written.unlink(missing_ok=True)
            with suppress(OSError):  # there may be others
                folder.parent.rmdir()
        if code == 2 and not self.asked:
            sys.exit(code)
        if code and not self.asked:
            raise UserError(f"{folder} ended with exit code {code}; run the command again to go on")
        return finished(experiment)
