"""The one training loop: ``accelerate launch -m vlp.train CONFIG [key=value ...]`` or ``vlp train ...``."""

from __future__ import annotations

import math
import runpy
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from vlp.config import Experiment
from vlp.data.order import keyed_rng
from vlp.data.stream import Loaded
from vlp.distributed import all_reduce_sum, gather_objects
from vlp.errors import UserError
from vlp.forward import Forward, StepContext
from vlp.losses.geometry import alignment, modality_gap, uniformity
from vlp.losses.inputs import NonFiniteLoss
from vlp.optim.schedule import set_lr
from vlp.specs.user_code import NO_CODE, UserCode
from vlp.training import grad_cache
from vlp.training.grad_cache import CachedForward
from vlp.training.interrupts import Stopped, TrainingInterrupt
from vlp.training.logging import peak_memory_mib
from vlp.training.run import Run
from vlp.training.setup import set_up
from vlp.training.split_backward import DetachedForward
from vlp.types import Batch


class Pretrainer(nn.Module):
    """Model and objectives as the one module that DDP or DeepSpeed wraps and that a step calls once a micro-batch."""

    def __init__(self, model: nn.Module, objectives: dict, bundle: type[Forward] = Forward):
        super().__init__()
        self.model, self.objectives, self.bundle = model, objectives, bundle

    def forward(
        self, batch: Batch, momentum: nn.Module | None, context: StepContext
    ) -> tuple[dict[str, Tensor], Tensor, Forward]:
        """The losses by name, sum(weight * loss), and the bundle that they were computed from."""
        f = self.bundle(self.model, batch, Forward(momentum, batch, context=context) if momentum else None, context)
        return *f.losses(self.objectives), f


@dataclass
class StepConsensus:
    """What all processes know of a micro-batch before its backward pass, from one all-reduce.

    Args:
        losses: means over the processes, ``loss`` the total; not finite if that of any process is not.
        stop: any process was asked to.
        bad: samples that the loaders of all had to leave out.
    """

    losses: dict[str, float]
    stop: bool
    bad: list[dict]


class Trainer:
    """A run under way. State changes in `advance` only, after the optimizer's step."""

    def __init__(self, run: Run):
        self.run, self.accelerator, self.experiment = run, run.accelerator, run.experiment
        accelerator = run.accelerator
        self.zero = run.is_zero
        bundle = DetachedForward if self.experiment.train.backward == "per_loss" else Forward
        self.pretrainer, self.optimizer = accelerator.prepare(
            Pretrainer(run.model, self.experiment.objectives, bundle), run.optimizer
        )
        run.restore_optimizer(self.optimizer.optimizer)
        if self.zero and self.experiment.train.grad_cache:
            raise UserError(
                "train.grad_cache goes past DeepSpeed's backward; use another launch config, or set it to false"
            )
        self.waited = 0.0

    def fit(self, interrupted: TrainingInterrupt) -> bool:
        """Trains to the last step, or to an interruption; True if it got to the end."""
        state, run = self.run.state, self.run
        if run.resumed_from and run.is_evaluation_due and not run.is_evaluated:  # killed between saving and evaluating
            self.evaluate(run.resumed_from, interrupted)
        with closing(run.micro_batches()) as micro_batches:
            while state.step < run.total_steps:
                run.writer.log_step(self.step(micro_batches, interrupted))
                last = state.step == run.total_steps
                if last or interrupted.agreed or run.is_evaluation_due or state.step % self.experiment.save.every == 0:
                    saved = self.save()
                if interrupted.agreed and not last:
                    return False
                if run.is_evaluation_due:
                    self.evaluate(saved, interrupted)
        return True

    def evaluate(self, saved: Path, interrupted: TrainingInterrupt) -> None:
        """Raises Stopped if a single process is asked to stop meanwhile."""
        interrupted.at_once = self.accelerator.num_processes == 1
        try:
            if interrupted.at_once and interrupted.asked:
                raise Stopped
            self.run.evaluate(saved)
        finally:
            interrupted.at_once = False

    def save(self) -> Path:
        return self.run.save(self.optimizer.optimizer)

    def step(self, micro_batches: Iterator, interrupted: TrainingInterrupt) -> dict:
        """One optimizer step; returns its record for the log."""
        experiment, state = self.experiment, self.run.state
        began = time.monotonic()
        self.waited = 0.0
        lr = set_lr(self.run.optimizer, experiment.schedule, experiment.optim.lr, state.step, self.run.total_steps)
        losses: dict[str, float] = {}
        finite, keys, f, remembered = True, [], None, []
        given = (self._next(micro_batches) for _ in range(experiment.train.accumulation))
        if experiment.train.grad_cache:
            given = list(given)
            cached = self._bundles([batch for _, batch in given])
        for micro, (loaded, batch) in enumerate(given):
            keys += batch.keys
            # dropout and the like depend on (seed, step, process) alone: there is no random state to save or to lose
            torch.manual_seed(
                int(keyed_rng(experiment.seed, 4, state.step, micro, self.accelerator.process_index).integers(2**62))
            )
            with self.accelerator.accumulate(self.pretrainer):
                own, total, f, complaint = self._losses(cached[micro] if experiment.train.grad_cache else batch)
                agreed = self.agree({**own, "loss": total}, loaded.bad, interrupted)
                interrupted.agreed |= agreed.stop
                self.run.writer.quarantine(agreed.bad)
                finite = finite and all(map(math.isfinite, agreed.losses.values()))
                if finite:
                    self.accelerator.backward(total)
                    remembered.append(self._to_enqueue(f))
            for name, value in agreed.losses.items():
                losses[name] = losses.get(name, 0.0) + value / experiment.train.accumulation
        if experiment.train.grad_cache and finite:
            self._replay(cached)
        norm = self._gradient_norm() if finite else math.nan
        if not (finite and math.isfinite(norm)):
            self._nonfinite(losses, keys, norm if finite else None, complaint)
        else:
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.advance(remembered, skipped=not (finite and math.isfinite(norm)))
        return self._record(losses, lr, norm, f, began)

    def _next(self, micro_batches: Iterator) -> tuple[Loaded, Batch]:
        """A micro-batch as it was loaded, and on the device."""
        asked = time.monotonic()
        loaded = next(micro_batches)
        self.waited += time.monotonic() - asked
        self.run.writer.log_samples(loaded.batch.keys)
        self.run.state.truncated_captions += loaded.truncated_captions
        return loaded, self.prepare(loaded.batch)

    def _bundles(self, batches: list[Batch]) -> list[CachedForward]:
        state = self.run.state
        momentum = state.momentum.network if state.momentum else None
        return grad_cache.bundles(self.run.model, batches, momentum, self.context())

    def _replay(self, cached: list[CachedForward]) -> None:
        """The second forward of the towers, and what DDP would have done: the losses went past its wrapper."""
        with self.accelerator.autocast():
            for f in cached:
                f.replay()
        grad_cache.average_gradients(list(self.run.model.parameters()))

    def prepare(self, batch: Batch) -> Batch:
        first, experiment = int(batch.dataset_row[0]), self.run.experiment
        batch = self._normalise(batch.to(self.accelerator.device))
        if experiment.train.mixup is None:
            return batch
        # by the step, and by the samples, which differ between processes and micro-batches
        key = (experiment.seed, self.run.state.step, first)
        return experiment.train.mixup(batch, experiment.model.classes, key)

    def _normalise(self, batch: Batch) -> Batch:
        views = tuple(map(self._normalise, batch.views))
        image = batch.image if batch.image is None else self.run.model.preprocess.normalise(batch.image)
        return replace(batch, image=image, views=views)

    def _losses(self, given: Batch | CachedForward) -> tuple[dict[str, Tensor], Tensor, Forward | None, str]:
        """Losses, total, bundle, and what a loss complained of; a loss that refuses its input is not finite."""
        try:
            if isinstance(given, CachedForward):
                with self.accelerator.autocast():
                    losses, total = given.losses(self.experiment.objectives)
                return losses, total, given, ""
            state = self.run.state
            momentum = state.momentum.network if state.momentum else None
            losses, total, f = self.pretrainer(given, momentum, self.context())
            return losses, total, f, ""
        except NonFiniteLoss as e:
            nan = torch.tensor(math.nan, device=self.accelerator.device)
            return dict.fromkeys(self.experiment.objectives, nan), nan, None, str(e)

    def context(self) -> StepContext:
        state = self.run.state
        queues = {self.experiment.objectives[name]: queue for name, queue in state.queues.items()}
        return StepContext(queues, self.run.vocabulary, state.position / self.run.epoch_samples, state.step)

    @torch.no_grad()
    def _to_enqueue(self, f: Forward) -> dict[str, dict[str, Tensor]]:
        """What each memory gets of a micro-batch, from all processes. Kept until the step is done: one that is skipped
        leaves no trace, and micro-batches do not see each other's rows."""
        with self.accelerator.autocast():
            return {name: self.experiment.objectives[name].enqueue(f) for name in self.run.state.queues}

    def agree(self, losses: dict[str, Tensor], bad: list[dict], interrupted: TrainingInterrupt) -> StepConsensus:
        """Every process takes the same decision: engines differ in what a NaN on one process does."""
        mine = [float(loss.detach()) for loss in losses.values()]
        *sums, stop, num_bad = all_reduce_sum([*mine, interrupted.asked, len(bad)], self.accelerator.device)
        everyones = [b for part in gather_objects(bad) for b in part] if num_bad else []
        means = {name: total / self.accelerator.num_processes for name, total in zip(losses, sums)}
        return StepConsensus(means, stop > 0, everyones)

    def _gradient_norm(self) -> float:
        """Norm before clipping, over all parameters; clips where that is asked for. DeepSpeed has clipped by now."""
        limit = self.experiment.train.clip_norm or math.inf
        norm = self.accelerator.clip_grad_norm_(self.pretrainer.parameters(), limit)
        return float(norm) if norm is not None else math.nan

    def _nonfinite(self, losses: dict[str, float], keys: list[str], norm: float | None, complaint: str) -> None:
        """Names the samples; raises unless the step may be skipped. Nothing was stepped, so nothing is spoilt."""
        everyones = [key for part in gather_objects(list(keys)) for key in part]
        what = complaint.removesuffix(" is not finite") or (
            f"gradient norm {norm}" if norm is not None else f"loss {losses.get('loss')}"
        )
        self.run.writer.log_nonfinite(what, everyones)
        if self.experiment.train.nonfinite == "stop" or (self.zero and norm is not None):
            raise UserError(
                f"step {self.run.state.step + 1}: {what} is not finite; its {len(everyones)} samples are in "
                f"{self.experiment.folder}/nonfinite.jsonl. The last checkpoint is untouched; lower optim.lr or remove the "
                f"samples and resume, or set train.nonfinite=skip"
            )

    def advance(self, remembered: list[dict[str, dict[str, Tensor]]], skipped: bool) -> None:
        state = self.run.state
        state.step += 1
        state.position += self.experiment.data.batch_size
        state.skipped += skipped
        # under ZeRO this is of no effect, the next step brings its own copy back; `scale` is bounded all the same
        self.run.model.clamp_scalars()
        if skipped:
            return
        for average in filter(None, (state.average, state.momentum)):
            average.update(self.run.model)
        for micro in remembered:
            for name, rows in micro.items():
                state.queues[name].push(**rows)

    def _record(self, losses: dict, lr: float, norm: float, f: Forward | None, began: float) -> dict:
        state, experiment = self.run.state, self.experiment
        seconds = time.monotonic() - began
        record = {"step": state.step, "loss": losses.pop("loss")}
        record |= {f"loss/{name}": value for name, value in losses.items()}
        record |= {"lr": lr, **self.run.model.scalars()}
        record |= {
            "gradient_norm": norm,
            "epoch": state.position / self.run.epoch_samples,
            "seconds": seconds,
            "samples_per_second": experiment.data.batch_size / seconds,
            "data_wait": self.waited / seconds,
            "memory_mib": peak_memory_mib(self.accelerator.device),
        }
        every = experiment.log.geometry_every
        if f is not None and every and state.step % every == 0 and len(f.batch) > 1:
            record |= geometry(f)
        return record


@torch.no_grad()
def geometry(f: Forward) -> dict[str, float]:
    """Where the embeddings of a step lie: uniformity of each kind, alignment and gap of the first two, if they are of one space:
    a model without contrast has first tokens of different widths."""
    embeds = {name: embed.detach() for name, embed in f.cached_embeddings().items()}
    record = {f"geometry/uniformity_{name}": float(uniformity(embed)) for name, embed in embeds.items()}
    x, y, *_ = [*embeds.values(), None, None]
    if y is not None and x.shape == y.shape:
        record |= {"geometry/alignment": float(alignment(x, y)), "geometry/modality_gap": float(modality_gap(x, y))}
    return record


def train(experiment: Experiment, resume: bool = False, code: UserCode = NO_CODE) -> int:
    """Run the experiment, or continue it; return the exit code.

    Args:
        code: The user's own code that the experiment is made of, to be kept with the run.
    """
    with TrainingInterrupt() as interrupted:
        run = set_up(experiment, resume, code)
        try:
            _fit(run, interrupted, code)
        except BaseException:
            run.close(together=False)
            raise
        run.close(together=True)
    return 0


def _fit(run: Run, interrupted: TrainingInterrupt, code: UserCode) -> None:
    folder = run.experiment.folder
    if run.is_finished:
        run.writer.log(f"{folder} is already at its last step, {run.total_steps}")
        return
    try:
        done = Trainer(run).fit(interrupted)
    except Stopped:
        done = False
    if done:
        run.writer.log(f"done: {folder}")
    else:
        command = shlex.join(["vlp", "train", "--resume", str(folder), *code.options])
        run.writer.log(f"stopped at step {run.state.step} and saved; continue with: {command}")


if __name__ == "__main__":
    # the command line is above this module: run it as a program instead of importing it
    sys.argv.insert(1, "train")
    runpy.run_module("vlp.cli", run_name="__main__", alter_sys=True)
