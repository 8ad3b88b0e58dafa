"""Log of a run: one JSON line per step, the console, and optionally TensorBoard and Weights & Biases."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import resource
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vlp.config import Experiment, Logging
from vlp.errors import UserError
from vlp.files import read_log
from vlp.specs.json import dump

# The time left is estimated from many steps, because the time of one step varies several times on a busy machine.
SPEED_STEPS = 100
SPEED_SECONDS = 300.0


def truncate_log(path: Path, step: int) -> None:
    """Remove the lines after ``step``, and a last line that was only partly written, so that every step has one line."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(kept))
    os.replace(temporary, path)


def is_evaluated(folder: Path, step: int) -> bool:
    """Return whether the eval.jsonl of a run folder has the evaluation of a step."""
    return any(line.get("step") == step for line in read_log(folder / "eval.jsonl"))


def peak_memory_mib(device: torch.device) -> float:
    """Return the peak memory of this process in MiB: allocated on a GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def require(settings: Logging) -> None:
    """Check that the packages to log with are installed.

    Raises:
        UserError: If one is not.
    """
    for package, enabled in (("tensorboard", settings.tensorboard), ("wandb", settings.wandb is not None)):
        if enabled and importlib.util.find_spec(package) is None:
            raise UserError(f"log.{package} needs a package that is not installed; pip install 'vlp[{package}]'")


def _tensorboard(settings: Logging, folder: Path):
    if not settings.tensorboard:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / "tensorboard"))


def _wandb(experiment: Experiment):
    if experiment.log.wandb is None:
        return None
    import wandb

    return wandb.init(
        project=experiment.log.wandb,
        name=experiment.name,
        id=experiment.name,
        resume="allow",
        config=json.loads(dump(experiment)),
    )


class RunLog:
    """Log of the main process. The other processes do not log."""

    def __init__(self, experiment: Experiment, step: int, total_steps: int):
        self.lines = open(experiment.folder / "log.jsonl", "a", buffering=1)  # noqa: SIM115 - closed in close()
        self.tensorboard = _tensorboard(experiment.log, experiment.folder)
        self.wandb = _wandb(experiment)
        self.console = Console(stderr=True)
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[last]}", markup=False),
        )
        self.progress = Progress(
            *columns,
            console=self.console,
            refresh_per_second=2,
            speed_estimate_period=SPEED_SECONDS,
            disable=not self.console.is_terminal,
        )
        self.task = self.progress.add_task(experiment.name, completed=step, total=total_steps, last="")
        self.progress.start()
        self.total_steps, self.last_print, self.measures = total_steps, time.monotonic(), experiment.measures
        self.seconds: deque[float] = deque(maxlen=SPEED_STEPS)  # of the last steps

    def print(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the progress bar on entry, and start it again on exit."""
        self.progress.stop()
        try:
            yield
        finally:
            self.progress.start()

    def step(self, record: dict) -> None:
        """Log the numbers of one step, which ``record`` contains by name together with ``step``."""
        # JSON has no NaN, so the loss of a skipped step is null
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self.lines.write(json.dumps(finite) + "\n")
        numbers = {k: v for k, v in record.items() if k not in ("step", "time") and isinstance(v, (int, float))}
        if self.tensorboard:
            for name, value in numbers.items():
                self.tensorboard.add_scalar(name, value, record["step"])
        if self.wandb:
            self.wandb.log(numbers, step=record["step"])
        last = f"loss {record['loss']:.4f}  lr {record['lr']:.2e}  {record['samples_per_second']:.0f} samples/s"
        last += "".join(f"  {name} {record[name]:.2f}" for name in self.measures if name in record)
        self.progress.update(self.task, completed=record["step"], last=last)
        self.seconds.append(record["seconds"])
        # a console without a progress bar, such as a scheduler's log file, gets a line every ten seconds
        if not self.console.is_terminal and (
            time.monotonic() - self.last_print > 10 or record["step"] == self.total_steps
        ):
            self.last_print = time.monotonic()
            left = (self.total_steps - record["step"]) * fmean(self.seconds)
            self.print(
                f"step {record['step']}/{self.total_steps}  {last}  wait {record['data_wait']:.0%}  about {left / 60:.1f} min left"
            )

    def close(self) -> None:
        self.progress.stop()
        self.lines.close()
        if self.tensorboard:
            self.tensorboard.close()
        if self.wandb:
            self.wandb.finish()
        sys.stderr.flush()
