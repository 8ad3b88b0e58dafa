"""What a run writes into its folder besides checkpoints. Only the main process writes, but for the samples' names.

runs/NAME/
  experiment.json   the resolved experiment; with a checkpoint, all that it takes to rebuild the model
  tokenizer/        a copy
  code/             copies of the config and of the modules that it imports from its folder
  data.json         what the order of the samples depends on
  parameters.txt    where every weight came from, its learning rate and weight decay
  starts.jsonl      a line for each time it was started or continued: command, machine, processes
  log.jsonl         a line a step
  eval.jsonl        a line an evaluation; eval/TASK.json holds the newest in full
  quarantine.jsonl  samples that could not be used, with shard, key and reason
  nonfinite.jsonl   the samples of steps whose loss or gradient was not finite
  checkpoints/      see `vlp.training.checkpoint`
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Sequence

import torch
from accelerate import Accelerator

from vlp import __version__
from vlp.config import Experiment
from vlp.data.reading.shards import write_atomically
from vlp.errors import UserError
from vlp.specs.json import dump
from vlp.specs.user_code import UserCode
from vlp.tasks.base import EvalModel, Result
from vlp.training.engines import engine
from vlp.training.logging import RunLog, read_log, truncate_log
from vlp.training.state import TrainState


class RunWriter:
    """The files of one run, as one process writes them. ``state`` is the run's own: its step is what a line is about."""

    def __init__(self, experiment: Experiment, accelerator: Accelerator, state: TrainState, epoch_samples: int):
        self.experiment, self.accelerator, self.state = experiment, accelerator, state
        self.folder, self.epoch_samples = experiment.folder, epoch_samples
        self.known_bad = {(b["source"], b["shard"], b["key"]) for b in read_log(self.folder / "quarantine.jsonl")}
        self.log: RunLog | None = None
        self.samples = None

    def open(
        self, resume: bool, tokenizer, fingerprints: list[dict], audit: str, total_steps: int, code: UserCode
    ) -> None:
        """Makes the folder, or cuts the logs of a resumed run back to the step that it goes on from.

        Raises:
            UserError: if the folder cannot be written.
        """
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                if not resume:
                    for leftover in ("tokenizer", "code"):  # of a start that was killed here
                        shutil.rmtree(self.folder / leftover, ignore_errors=True)
                    if tokenizer:
                        tokenizer.save(self.folder / "tokenizer")
                    write_atomically(self.folder / "data.json", json.dumps(fingerprints, indent=1).encode())
                    write_atomically(self.folder / "parameters.txt", audit.encode())
                self._copy_code(code)
                # last, since a folder that has it is a run
                write_atomically(self.folder / "experiment.json", dump(self.experiment).encode())
                for name in ("log.jsonl", "eval.jsonl", *(p.name for p in self.folder.glob("samples.*.jsonl"))):
                    truncate_log(self.folder / name, self.state.step)
                self._write_start(total_steps)
            except OSError as e:
                raise UserError(
                    f"cannot write {self.folder}: {e.strerror or e}; set output=FOLDER to one that can be written"
                ) from None
            self.log = RunLog(self.experiment, self.state.step, total_steps)
        self.accelerator.wait_for_everyone()  # the main process has cut the logs back
        if self.experiment.log.samples:
            path = self.folder / f"samples.{self.accelerator.process_index}.jsonl"
            self.samples = open(path, "a", buffering=1)  # noqa: SIM115 - closed in close()

    def _copy_code(self, code: UserCode) -> None:
        for inside, path in code.files().items():
            target = self.folder / "code" / inside
            if target.resolve() != path:  # a run resumed with --trust-code runs the copy itself
                target.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(target, path.read_bytes())

    def _write_start(self, total_steps: int) -> None:
        """How the run was started or continued, for the report and for whoever wonders later."""
        command = ["vlp", *sys.argv[1:]] if os.path.basename(sys.argv[0]) == "vlp" else ["python", *sys.argv]
        start = {
            "step": self.state.step,
            "total_steps": total_steps,
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "command": command,
            "processes": self.accelerator.num_processes,
            "engine": engine(self.accelerator),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
            "vlp": __version__,
        }
        with open(self.folder / "starts.jsonl", "a") as f:
            f.write(json.dumps(start) + "\n")

    def say(self, text: str) -> None:
        if self.log:
            self.log.say(text)

    def step(self, record: dict) -> None:
        if self.log:
            self.log.step(record)

    def batch(self, keys: Sequence[str]) -> None:
        """The samples of the step under way, where ``log.samples`` asks for them."""
        if self.samples:
            self.samples.write(json.dumps({"step": self.state.step + 1, "keys": list(keys)}) + "\n")

    def quarantine(self, bad: list[dict]) -> None:
        """Writes newly found bad samples; raises UserError when there are too many of them."""
        new = {(b["source"], b["shard"], b["key"]): b for b in bad}
        new = {k: b for k, b in new.items() if k not in self.known_bad}
        self.known_bad |= new.keys()
        path = self.folder / "quarantine.jsonl"
        if new and self.accelerator.is_main_process:
            with open(path, "a") as f:
                f.writelines(json.dumps(b) + "\n" for b in new.values())
        allowed = self.experiment.data.max_bad_fraction * self.epoch_samples
        if new and len(self.known_bad) > allowed:
            sources = {s: sum(1 for k in self.known_bad if k[0] == s) for s in sorted({k[0] for k in self.known_bad})}
            counts = ", ".join(f"{n} in {s}" for s, n in sources.items())
            raise UserError(
                f"{len(self.known_bad)} samples are bad ({counts}), more than data.max_bad_fraction="
                f"{self.experiment.data.max_bad_fraction:g} of {self.epoch_samples}; see {path}, mend the data or raise the limit"
            )

    def nonfinite(self, what: str, keys: list[str]) -> None:
        if self.accelerator.is_main_process:
            with open(self.folder / "nonfinite.jsonl", "a") as f:
                f.write(json.dumps({"step": self.state.step + 1, "what": what, "samples": keys}) + "\n")
            self.say(f"step {self.state.step + 1}: {what} is not finite; samples in nonfinite.jsonl")

    def evaluation(self, results: dict[str, Result], subject: EvalModel) -> None:
        line = {"step": self.state.step}
        for name, result in results.items():
            result.write(self.folder / "eval" / f"{name}.json", subject, self.state.step)
            line |= {f"{name}/{metric}": interval.value for metric, interval in result.metrics.items()}
            seen = f"  ({result.trained_on:,} of its pictures trained on)" if result.trained_on else ""
            self.say(
                f"step {self.state.step}: {name}  " + "  ".join(f"{m} {i}" for m, i in result.metrics.items()) + seen
            )
        with open(self.folder / "eval.jsonl", "a") as f:
            f.write(json.dumps(line) + "\n")

    def close(self) -> None:
        for file in filter(None, (self.log, self.samples)):
            file.close()
