"""A training run in one process: what happens between its steps, such as checkpoints and evaluations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from accelerate import Accelerator

from vlp.config import Experiment
from vlp.data.stream import Loaded, TrainingData
from vlp.data.text import Tokenizer
from vlp.distributed import broadcast_from_main, refuse_together
from vlp.errors import UserError
from vlp.models.base import Model
from vlp.tasks.base import EvalModel, Result
from vlp.tasks.contamination import contaminated_images
from vlp.training import checkpoint
from vlp.training.engines import Engine
from vlp.training.logging import is_evaluated
from vlp.training.run_writer import RunWriter
from vlp.training.saver import Saver
from vlp.training.state import TrainState
from vlp.training.store import RunCopy
from vlp.types import Vocabulary
from vlp.weights import checkpoints


@dataclass
class Run:
    """The parts of a run, as `vlp.training.setup.set_up` builds them.

    Args:
        experiment: The resolved experiment.
        engine: The engine.
        model: The model without the engine's wrapper.
        tokenizer: None without a text tower.
        dataset: Training samples.
        optimizer: The optimizer without the engine's wrapper.
        state: Counters, averages and queues.
        writer: Files of the run folder.
        total_steps: Optimizer steps of the whole run.
        resumed_from: Checkpoint that the run continues from. None for a run from step 0.
    """

    experiment: Experiment
    engine: Engine
    model: Model
    tokenizer: Tokenizer | None
    dataset: TrainingData
    optimizer: torch.optim.Optimizer
    state: TrainState
    writer: RunWriter
    total_steps: int
    resumed_from: Path | None

    @property
    def folder(self) -> Path:
        return self.experiment.folder

    @property
    def epoch_samples(self) -> int:
        return len(self.dataset)

    @property
    def accelerator(self) -> Accelerator:
        return self.engine.accelerator

    @cached_property
    def vocabulary(self) -> Vocabulary | None:
        return self.tokenizer.vocabulary().to(self.accelerator.device) if self.tokenizer else None

    @property
    def is_evaluation_due(self) -> bool:
        """Whether the tasks are evaluated after the current step."""
        step, every = self.state.step, self.experiment.evaluate_every
        return bool(self.experiment.evaluate) and (step == self.total_steps or (every and step and step % every == 0))

    @property
    def is_evaluated(self) -> bool:
        return is_evaluated(self.folder, self.state.step)

    @property
    def is_finished(self) -> bool:
        return self.state.step >= self.total_steps and (self.is_evaluated or not self.is_evaluation_due)

    def micro_batches(self) -> Iterator[Loaded]:
        """Load the micro-batches of this process, from the current position in the stream to the end of the run."""
        data, accelerator = self.experiment.data, self.accelerator
        return self.dataset.loader(
            start=self.state.position,
            stop=self.total_steps * data.batch_size,
            size=self.experiment.micro_batch_size,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            workers=data.workers,
            pin_memory=accelerator.device.type == "cuda",
            prefetch_shards=data.prefetch_shards,
        )

    @cached_property
    def saver(self) -> Saver:
        copy = self.copy.update if self.copy else None
        return Saver(self.folder / "checkpoints", self.experiment.save.keep, copy)

    @cached_property
    def copy(self) -> RunCopy | None:
        """Copy of the run in a store, which the main process writes."""
        url = self.experiment.save.copy_to
        return RunCopy(self.folder, url, self.writer.log) if url and self.accelerator.is_main_process else None

    def save(self, optimizer) -> Path:
        """Write a checkpoint, to be completed in the background; return the folder that it will have.

        Every process must call it, because sharded tensors are gathered from all of them.

        Args:
            optimizer: The optimizer that the engine steps.

        Raises:
            UserError: If this checkpoint or the one before cannot be written.
        """
        self.wait_for_save()
        self.state.check_replicas()
        optimizer_tensors = self.engine.optimizer_tensors(self.model, optimizer)
        files = {"model": self.model.state_dict(), "optimizer": optimizer_tensors, **self.state.files()}
        if not self.accelerator.is_main_process:
            checkpoint.gather(files)
        else:
            self.saver.save(self.state.step, files, self.state.counters())
        self.accelerator.wait_for_everyone()
        return checkpoints.step_path(self.folder / "checkpoints", self.state.step)

    def wait_for_save(self) -> None:
        """Wait on every process until the last checkpoint is complete.

        Raises:
            UserError: On every process, if it cannot be completed.
        """
        with refuse_together():
            self.saver.wait()

    def finish_saves(self) -> None:
        """Wait on every process until the last checkpoint is complete and the run is copied.

        Raises:
            UserError: As `wait_for_save`.
        """
        with refuse_together():
            self.saver.finish()

    def restore_optimizer(self, optimizer) -> None:
        """Load the optimizer state of the checkpoint, after the engine has wrapped the optimizer and copied its weights."""
        if self.resumed_from is not None:
            tensors = checkpoints.read(self.resumed_from, "optimizer")
            self.engine.load_optimizer(self.model, optimizer, tensors)

    def evaluate(self, saved: Path) -> None:
        """Run every task on the weights of a checkpoint, averaged if the run has an average, and mark the best checkpoint.

        Args:
            saved: The last checkpoint, which may still be in the background.

        Raises:
            UserError: If ``save.best`` names a metric that its task does not measure, or the checkpoint cannot be completed.
        """
        self.wait_for_save()
        averaged = self.state.average is not None
        model = EvalModel(
            self.state.average.network if averaged else self.model,
            self.tokenizer,
            self.experiment.data,
            self.accelerator.device,
            self.experiment.seed,
            checkpoints.recorded_hashes(saved)["average.safetensors" if averaged else "model.safetensors"],
            self.experiment.name,
        )
        # running means differ between processes; the checkpoint has those of the main process
        broadcast_from_main(model.model.buffers())
        with self.engine.unsharded(model.model), self.writer.paused():
            results = {name: task(model) for name, task in self.experiment.evaluate.items()}
        if self.accelerator.is_main_process:
            results = {name: replace(result, trained_on=self.contamination[name]) for name, result in results.items()}
            # in this order: a run that is killed between the two evaluates again when it is resumed
            self._mark_best(results)
            self.writer.log_evaluation(results, model)
        self.accelerator.wait_for_everyone()

    @cached_property
    def contamination(self) -> dict[str, int | None]:
        """Number of each task's images that the run is trained on, None if it is unknown."""
        data = self.experiment.data
        return {name: contaminated_images(task, data, allow=True) for name, task in self.experiment.evaluate.items()}

    def _mark_best(self, results: dict[str, Result]) -> None:
        best = self.experiment.save.best
        if best is None:
            return
        task, _, metric = best.partition("/")
        if metric not in results[task].metrics:
            raise UserError(f"save.best: {task} has no metric {metric!r}; it has {', '.join(results[task].metrics)}")
        value = results[task].metrics[metric].value
        before = checkpoints.best(self.folder / "checkpoints")
        sign = -1 if metric in results[task].lower_is_better else 1
        # a resumed run may select by another metric than before
        if before is None or before["metric"] != best or sign * value > sign * before["value"]:
            checkpoint.mark_best(self.folder / "checkpoints", self.state.step, best, value)

    def close(self, together: bool) -> None:
        """Close the files of the run.

        Args:
            together: Whether every process calls this. Then they wait for each other, because a process that exits makes
                others that still communicate with it abort. After an error the other processes may be elsewhere, and the
                launcher ends them.
        """
        self.saver.close()
        self.writer.close()
        if together:
            self.accelerator.wait_for_everyone()
            self.accelerator.end_training()
