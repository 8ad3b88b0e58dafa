"""Write the files of a run folder other than checkpoints. Only the main process writes, except for the sample keys.

runs/NAME/
  experiment.json   the resolved experiment; with a checkpoint, everything that is needed to rebuild the model
  tokenizer/        a copy
  code/             copies of the config and of the modules that it imports from its folder
  data.json         fingerprints of the data, on which the order of the samples depends
  parameters.txt    the source of every weight, its learning rate and weight decay
  starts.jsonl      one line for each start or resume: command, commit of vlp, machine, processes, threads
  log.jsonl         one line per step
  eval.jsonl        one line per evaluation; eval/TASK.json contains the newest in full
  quarantine.jsonl  unusable samples, with shard, key and reason
  nonfinite.jsonl   the samples of steps whose loss or gradient was not finite
  checkpoints/      see `vlp.training.checkpoint`
  profile/          see `vlp.training.profile`
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

from vlp.config import Experiment
from vlp.data.text import Tokenizer
from vlp.distributed import refuse_together
from vlp.errors import UserError
from vlp.files import read_log, write_atomically
from vlp.specs.json import dump
from vlp.specs.origin import origin
from vlp.specs.user_code import UserCode
from vlp.tasks.base import EvalModel, Result
from vlp.training.engines import Engine
from vlp.training.logging import RunLog, truncate_log
from vlp.training.state import TrainState


class RunWriter:
    """Writer of the files of one run in one process.

    Args:
        experiment: The experiment, whose ``folder`` is written.
        engine: The engine.
        state: State of the run. A line is about its step.
        epoch_samples: Samples of an epoch.
    """

    def __init__(self, experiment: Experiment, engine: Engine, state: TrainState, epoch_samples: int):
        self.experiment, self.engine, self.accelerator, self.state = experiment, engine, engine.accelerator, state
        self.folder, self.epoch_samples = experiment.folder, epoch_samples
        self.known_bad = {
            (b.get("source"), b.get("shard"), b.get("key")) for b in read_log(self.folder / "quarantine.jsonl")
        }
        self.run_log: RunLog | None = None  # of the main process
        self.sample_file = None

    def open(
        self,
        resume: bool,
        tokenizer: Tokenizer | None,
        fingerprints: list[dict],
        parameters: str,
        total_steps: int,
        code: UserCode,
    ) -> None:
        """Write the files of a new run, or truncate the logs of a resumed run to the step of its checkpoint.

        Args:
            resume: Whether the folder is that of a run to continue.
            tokenizer: Tokenizer to copy.
            fingerprints: Contents of data.json.
            parameters: Contents of parameters.txt.
            total_steps: Optimizer steps of the whole run.
            code: The user's own code, copied to code/.

        Raises:
            UserError: If the folder cannot be written.
        """
        with refuse_together():  # which also makes all processes wait until the main process has truncated the logs
            if self.accelerator.is_main_process:
                try:
                    if not resume:
                        self._write_new(tokenizer, fingerprints, parameters)
                    remarks = self._copy_code(code)
                    # last, because a folder with an experiment.json is a run
                    write_atomically(self.folder / "experiment.json", dump(self.experiment).encode())
                    for name in ("log.jsonl", "eval.jsonl", *(p.name for p in self.folder.glob("samples.*.jsonl"))):
                        truncate_log(self.folder / name, self.state.step)
                    self._write_start(total_steps)
                except OSError as e:
                    raise UserError(
                        f"cannot write {self.folder}: {e.strerror or e}; set output=FOLDER to one that can be written"
                    ) from None
                self.run_log = RunLog(self.experiment, self.state.step, total_steps)
                for remark in remarks:
                    self.log(remark)
        if self.experiment.log.sample_keys:
            path = self.folder / f"samples.{self.accelerator.process_index}.jsonl"
            self.sample_file = open(path, "a", buffering=1)  # noqa: SIM115 - closed in close()

    def _write_new(self, tokenizer: Tokenizer | None, fingerprints: list[dict], parameters: str) -> None:
        for leftover in ("tokenizer", "code"):  # of a process that was killed at this point
            shutil.rmtree(self.folder / leftover, ignore_errors=True)
        if tokenizer:
            tokenizer.save(self.folder / "tokenizer")
        write_atomically(self.folder / "data.json", json.dumps(fingerprints, indent=1).encode())
        write_atomically(self.folder / "parameters.txt", parameters.encode())

    def _copy_code(self, code: UserCode) -> list[str]:
        """Copy the user's modules, keep the earlier text of those that have changed, and return a line about each of these."""
        changed = []
        for inside, path in code.files().items():
            target = self.folder / "code" / inside
            if target.resolve() == path:  # a run resumed with --trust-code runs the copy itself
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.exists() and target.read_bytes() != path.read_bytes():
                earlier = target.with_name(f"{target.stem}.until-step-{self.state.step}{target.suffix}")
                if not earlier.exists():  # changed twice without a step: the first text is the one that was trained
                    target.rename(earlier)
                changed.append(f"{path} has changed since the run was started; its earlier text is {earlier}")
            write_atomically(target, path.read_bytes())
        return changed

    def _write_start(self, total_steps: int) -> None:
        """Record how the run was started or continued. The report shows the command."""
        device = self.accelerator.device
        gpu = f", {torch.cuda.get_device_name(device)}" if device.type == "cuda" else ""
        start = {
            "step": self.state.step,
            "total_steps": total_steps,
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "processes": self.accelerator.num_processes,
            "threads": torch.get_num_threads(),
            "engine": self.engine.name,
            "machine": f"{platform.machine()}, {os.cpu_count()} cores{gpu}, torch {torch.__version__}",
            **origin(),
        }
        with open(self.folder / "starts.jsonl", "a") as f:
            f.write(json.dumps(start) + "\n")

    def log(self, text: str) -> None:
        """Print a line on the console."""
        if self.run_log:
            self.run_log.print(text)

    def paused(self) -> AbstractContextManager[None]:
        """Return a context without the progress bar of the training, in which an evaluation may show its own."""
        return self.run_log.paused() if self.run_log else nullcontext()

    def log_step(self, record: dict) -> None:
        """Log the numbers of one step, which ``record`` contains by name together with ``step``."""
        if self.run_log:
            self.run_log.step(record)

    def log_samples(self, keys: Sequence[str]) -> None:
        """Write the sample keys of a micro-batch of the current step, if ``log.sample_keys`` is set."""
        if self.sample_file:
            self.sample_file.write(json.dumps({"step": self.state.step + 1, "keys": list(keys)}) + "\n")

    def quarantine(self, bad: list[dict]) -> None:
        """Record unusable samples that are not in quarantine.jsonl yet.

        Raises:
            UserError: If more than ``data.max_bad_fraction`` of all samples are unusable.
        """
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
                f"{self.experiment.data.max_bad_fraction:g} of {self.epoch_samples}; see {path}, repair the data or raise the limit"
            )

    def log_nonfinite(self, cause: str, keys: list[str]) -> None:
        """Record the samples of a step whose loss or gradient is not finite.

        Args:
            cause: Why the step cannot be taken, e.g. "gradient norm inf is not finite".
            keys: Keys of the samples of all processes.
        """
        if self.accelerator.is_main_process:
            with open(self.folder / "nonfinite.jsonl", "a") as f:
                line = {"step": self.state.step + 1, "cause": cause.removesuffix(" is not finite"), "samples": keys}
                f.write(json.dumps(line) + "\n")
            self.log(f"step {self.state.step + 1}: {cause}; its samples are in nonfinite.jsonl")

    def log_evaluation(self, results: dict[str, Result], model: EvalModel) -> None:
        """Write each task's result to eval/TASK.json, and the metrics of all tasks as one line of eval.jsonl."""
        line = {"step": self.state.step}
        for name, result in results.items():
            result.write(self.folder / "eval" / f"{name}.json", model, self.state.step)
            line |= {f"{name}/{metric}": interval.value for metric, interval in result.metrics.items()}
            line |= {f"{name}/blind_{metric}": interval.value for metric, interval in result.blind.items()}
            blind = {metric: f" (blind {interval})" for metric, interval in result.blind.items()}
            metrics = "  ".join(f"{metric} {i}{blind.get(metric, '')}" for metric, i in result.metrics.items())
            seen = f"  ({result.trained_on:,} of its images are training images)" if result.trained_on else ""
            self.log(f"step {self.state.step}: {name}  {metrics}{seen}")
        with open(self.folder / "eval.jsonl", "a") as f:
            f.write(json.dumps(line) + "\n")

    def close(self) -> None:
        for file in filter(None, (self.run_log, self.sample_file)):
            file.close()
