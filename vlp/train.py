"""The one training loop: ``accelerate launch -m vlp.train CONFIG [key=value ...]`` or ``vlp train ...``."""

from __future__ import annotations

import math
import runpy
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from vlp.config import Experiment, Training
from vlp.data.order import keyed_rng
from vlp.data.stream import Loaded
from vlp.distributed import all_reduce_mean, all_reduce_sum, gather_objects
from vlp.errors import NonFiniteLoss, UserError
from vlp.forward import SINGLE_GRAPH, Forward, Graph, MicroBatches, StepContext, mark_part
from vlp.losses.geometry import alignment, modality_gap, uniformity
from vlp.losses.inputs import DeferredChecks, deferred_checks
from vlp.models.base import Model
from vlp.objectives.base import Objective
from vlp.optim.schedule import set_lr
from vlp.specs.user_code import NO_CODE, UserCode
from vlp.training.chance import ChanceWatch
from vlp.training.detached import DetachedGraph
from vlp.training.interrupts import STOPPED, Stopped, TrainingInterrupt
from vlp.training.logging import peak_memory_mib
from vlp.training.prefetch import on_device
from vlp.training.profile import profiled_steps
from vlp.training.run import Run
from vlp.training.run_lock import RunLock
from vlp.training.setup import set_up
from vlp.training.stall import StallWatch
from vlp.types import Batch


def single_graph(model: Model) -> Graph:
    return SINGLE_GRAPH


def graph_of(train: Training) -> Callable[[Model], Graph]:
    """Return the function that makes the autograd graph of a backward pass, as the settings ask for."""
    per_loss = train.backward == "per_loss"
    detached = partial(DetachedGraph, recompute=train.grad_cache, per_loss=per_loss)
    return detached if train.grad_cache or per_loss else single_graph


class Pretrainer(nn.Module):
    """Model and objectives as one module. A step calls it once per backward pass.

    Args:
        graph: Returns the autograd graph of a call, see `vlp.training.detached`.
    """

    def __init__(
        self, model: Model, objectives: Mapping[str, Objective], graph: Callable[[Model], Graph] = single_graph
    ):
        super().__init__()
        self.model, self.objectives, self.graph = model, objectives, graph

    def forward(
        self, batches: Sequence[Batch], momentum: Model | None, context: StepContext
    ) -> tuple[dict[str, Tensor], Tensor, MicroBatches]:
        """Compute the losses of micro-batches that count as one batch.

        Returns:
            The losses by name, sum(weight * loss), and the bundles that they were computed from.

        Raises:
            NonFiniteLoss: If a loss refuses its input.
        """
        graph = self.graph(self.model)
        micro_batches = MicroBatches(self.model, batches, momentum, context, graph)
        return *graph.losses(self.objectives, micro_batches), micro_batches


class Attempt(nn.Module):
    """A pretrainer whose checks wait for nobody and whose refusals are returned, as the one module that DDP or DeepSpeed wraps.

    DDP counts the passes that return. A process whose pass raises would communicate at other points than the others.
    """

    def __init__(self, pretrainer: Pretrainer):
        super().__init__()
        self.pretrainer = pretrainer

    def forward(self, *inputs) -> tuple[dict[str, Tensor], Tensor, MicroBatches | None, DeferredChecks]:
        """Return the result of the pretrainer and the checks of its losses; the total is NaN if one of them fails.

        If a loss refuses its input, return NaN losses, no bundles, and checks with the refusal.
        """
        with deferred_checks() as checks:
            try:
                losses, total, bundles = self.pretrainer(*inputs)
            except NonFiniteLoss as e:
                checks.refusal = str(e)
                nan = torch.full((), math.nan, device=next(self.parameters()).device)
                return dict.fromkeys(self.pretrainer.objectives, nan), nan, None, checks
        return losses, checks.applied_to(total), bundles, checks


@dataclass
class StepConsensus:
    """What all processes agree on before a backward pass, by one all-reduce of the host.

    Args:
        refused: A loss of any process has refused its input.
        stop: Any process was asked to stop.
        bad: Samples that the loaders of all processes skipped.
    """

    refused: bool
    stop: bool
    bad: list[dict]


class Trainer:
    """Trains a run. State changes only in `advance`, after the optimizer's step."""

    def __init__(self, run: Run):
        self.run, self.accelerator, self.experiment = run, run.accelerator, run.experiment
        attempt = Attempt(Pretrainer(run.model, run.experiment.objectives, graph_of(run.experiment.train)))
        self.attempt, self.optimizer = run.engine.prepare(attempt, run.model, run.optimizer, run.state)
        run.restore_optimizer(self.optimizer.optimizer)
        self.watch = StallWatch(run.experiment.train.stall_timeout)
        self.chance = ChanceWatch(run.experiment.objectives, run.experiment.log.chance_steps)
        self.waited = 0.0  # seconds of the step spent waiting for data
        self.reach_is_checked = False

    def fit(self, interrupted: TrainingInterrupt) -> bool:
        """Train to the last step, or to an interruption; return whether the last step was reached."""
        state, run = self.run.state, self.run
        if run.resumed_from and run.is_evaluation_due and not run.is_evaluated:  # killed between saving and evaluating
            self.evaluate(run.resumed_from, interrupted)
        wanted = self.experiment.train.profile and self.accelerator.is_main_process
        with (
            self.watch.watching(lambda: interrupted.asked),
            closing(self.micro_batches()) as micro_batches,
            profiled_steps(run.model, run.folder, wanted) as step_ended,
        ):
            while state.step < run.total_steps:
                run.saver.check()
                run.writer.log_step(self.step(micro_batches, interrupted))
                step_ended()
                last = state.step == run.total_steps
                if last or interrupted.agreed or run.is_evaluation_due or state.step % self.experiment.save.every == 0:
                    saved = self.save()
                if interrupted.agreed and not last:
                    return False
                if run.is_evaluation_due:
                    self.evaluate(saved, interrupted)
        return True

    def evaluate(self, saved: Path, interrupted: TrainingInterrupt) -> None:
        """Evaluate the checkpoint ``saved``; raise Stopped if a single process is asked to stop meanwhile."""
        interrupted.at_once = self.accelerator.num_processes == 1
        try:
            if interrupted.at_once and interrupted.asked:
                raise Stopped
            self.run.evaluate(saved)
        finally:
            interrupted.at_once = False

    def save(self) -> Path:
        return self.run.save(self.optimizer.optimizer)

    def step(self, micro_batches: Iterator[Loaded], interrupted: TrainingInterrupt) -> dict:
        """Take one optimizer step and return its record for the log."""
        experiment, state = self.experiment, self.run.state
        passes, engine = experiment.train.backward_passes, self.run.engine
        began = time.monotonic()
        self.waited = 0.0
        lr = set_lr(self.run.optimizer, experiment.schedule, experiment.optim.lr, state.step, self.run.total_steps)
        refused, losses, measured, keys, checks, f, enqueued, at_chance = False, [], [], [], [], None, [], []
        for number in range(passes):
            loaded = [self._next(micro_batches) for _ in range(experiment.train.accumulation // passes)]
            with mark_part("prepare"):
                batches = [self.prepare(each) for each in loaded]
            keys += [key for batch in batches for key in batch.keys]
            # Dropout and masks depend only on (seed, step, process), so no random state has to be saved.
            rng = keyed_rng(experiment.seed, 4, state.step, number, self.accelerator.process_index)
            torch.manual_seed(int(rng.integers(2**62)))
            with self.accelerator.accumulate(self.attempt):
                momentum = state.momentum.network if state.momentum else None
                with mark_part("forward"):
                    own, total, bundles, checked = self.attempt(batches, momentum, self.context())
                checks.append(checked)
                losses.append(torch.stack([loss.detach().double() for loss in (*own.values(), total)]))
                objectives = experiment.objectives.values()
                measured += [each.measured(objectives) for each in bundles or ()]
                bad = [sample for each in loaded for sample in each.bad]
                agreed = self.agree(bool(checked.refusal), bad, interrupted)
                interrupted.agreed |= agreed.stop
                self.run.writer.quarantine(agreed.bad)
                refused |= agreed.refused or (engine.steps_in_backward and not self._is_finite(total))
                if not refused:
                    f = bundles[-1]
                    enqueued.append(self._enqueue(f))  # may run a network, so it precedes the end of the step's passes
                    with mark_part("backward"):
                        self.accelerator.backward(total)
                    self._check_reach()
        with mark_part("gradient norm"):
            gradient_norm = None if refused else engine.clip_gradients(self.attempt, experiment.train.clip_norm)
        numbers = self._read(losses, measured, gradient_norm, f)
        finite = not refused and all(math.isfinite(numbers[name]) for name in ("loss", *experiment.objectives))
        norm = numbers["gradient_norm"] if finite else math.nan
        skipped = not math.isfinite(norm)
        if skipped:
            self._nonfinite(numbers["loss"], keys, norm if finite else None, checks)
            engine.abandon_step()
        else:
            at_chance = self.chance.update(numbers, f)  # before the queues grow
            with mark_part("optimizer"):
                self.optimizer.step()
        self.optimizer.zero_grad()
        with mark_part("averages and queues"):
            self.advance(enqueued, skipped)
        record = self._record(numbers, lr, norm, began)
        for line in at_chance:
            self.run.writer.log(f"step {state.step}: {line}")
        return record | ({"at_chance": at_chance} if at_chance else {})

    def _is_finite(self, total: Tensor) -> bool:
        """Return whether the total is finite on all processes. The host waits for the device."""
        return math.isfinite(all_reduce_mean(total.detach()).item())

    @torch.no_grad()
    def _read(
        self, losses: list[Tensor], measured: list[Tensor], norm: Tensor | None, f: Forward | None
    ) -> dict[str, float]:
        """Read the numbers of a step from the device, all at once, as the host waits for it.

        Args:
            losses: Losses and total of each backward pass on this process.
            measured: `Forward.measured` of each micro-batch on this process.
            norm: Norm of the gradient, None if there is none.
            f: Bundle of a micro-batch, whose embeddings are measured if a measurement is due.

        Returns:
            Means over passes and processes of each loss and of the total, ``loss``; the measures of the objectives, as
            ``OBJECTIVE/MEASURE``; the norm, and the measurements of embeddings. A number that is not known is NaN.
        """
        names = [*self.experiment.objectives, "loss"]
        measures = self.experiment.measures
        sums = sum(measured, losses[0].new_zeros(len(measures), 2))  # (measures, 2) sums and counts
        means = all_reduce_mean(torch.cat([torch.stack(losses).mean(0), sums.flatten()]))
        means, sums = means[: len(names)], means[len(names) :].view(-1, 2)
        means = torch.cat([means, sums[:, 0] / sums[:, 1]])
        every, step = self.experiment.log.geometry_every, self.run.state.step + 1
        embeddings = geometry(f) if f is not None and every and step % every == 0 and len(f.batch) > 1 else {}
        norm = torch.full_like(means[0], math.nan) if norm is None else norm
        numbers = torch.cat([means, torch.stack([x.to(means) for x in (norm, *embeddings.values())])]).tolist()
        return dict(zip((*names, *measures, "gradient_norm", *embeddings), numbers))

    def _check_reach(self) -> None:
        """Check after the first backward pass that a loss reaches every trained parameter. DDP waits for all gradients.

        Raises:
            UserError: If a parameter has no gradient under DDP.
        """
        if self.reach_is_checked or self.run.engine.is_sharded:
            return
        self.reach_is_checked = True
        missed = [name for name, p in self.run.model.named_parameters() if p.requires_grad and p.grad is None]
        if not missed:
            return
        more = f" and {len(missed) - 5} more" if len(missed) > 5 else ""
        problem = f"no loss reaches {', '.join(missed[:5])}{more}; set train.frozen={missed[0]}"
        if self.accelerator.num_processes > 1:
            raise UserError(problem)
        self.run.writer.log(f"{problem} to train on several processes")

    def micro_batches(self) -> Iterator[Loaded]:
        """Yield the micro-batches of this process on its device."""
        return on_device(self.run.micro_batches(), self.accelerator.device)

    def _next(self, micro_batches: Iterator[Loaded]) -> Loaded:
        asked = time.monotonic()
        self.watch.beat()
        with mark_part("loader"):
            loaded = next(micro_batches)
        self.watch.beat()
        self.waited += time.monotonic() - asked
        self.run.writer.log_samples(loaded.batch.keys)
        self.run.state.truncated_captions += loaded.truncated_captions
        return loaded

    def prepare(self, loaded: Loaded) -> Batch:
        """Normalise the images of a micro-batch, and mix them."""
        experiment, batch = self.run.experiment, self._normalise(loaded.batch)
        if experiment.train.mixup is None:
            return batch
        # Keyed by the step and by the samples, which differ between processes and micro-batches.
        key = (experiment.seed, self.run.state.step, loaded.first_row)
        return experiment.train.mixup(batch, experiment.model.classes, key)

    def _normalise(self, batch: Batch) -> Batch:
        views = tuple(map(self._normalise, batch.views))
        image = batch.image if batch.image is None else self.run.model.preprocess.normalise(batch.image)
        return replace(batch, image=image, views=views)

    def context(self) -> StepContext:
        state = self.run.state
        queues = {self.experiment.objectives[name]: queue for name, queue in state.queues.items()}
        progress, longest = state.position / self.run.epoch_samples, self.experiment.data.max_length
        return StepContext(queues, self.run.vocabulary, progress, state.step, longest)

    @torch.no_grad()
    def _enqueue(self, f: Forward) -> dict[str, dict[str, Tensor]]:
        """Return what each queue gets. It is pushed after the step: a skipped step leaves no trace, and micro-batches do not
        read each other's rows from the queue."""
        with self.accelerator.autocast(), deferred_checks():
            return {name: self.experiment.objectives[name].enqueue(f) for name in self.run.state.queues}

    def agree(self, refused: bool, bad: list[dict], interrupted: TrainingInterrupt) -> StepConsensus:
        """Reach the same decisions on every process: a backward pass communicates."""
        refusals, stop, num_bad = all_reduce_sum([refused, interrupted.asked, len(bad)])
        all_bad = [sample for part in gather_objects(bad) for sample in part] if num_bad else []
        return StepConsensus(refusals > 0, stop > 0, all_bad)

    def _nonfinite(self, loss: float, keys: list[str], norm: float | None, checks: Sequence[DeferredChecks]) -> None:
        """Record the samples of the step, and raise unless it may be skipped. The optimizer has not stepped.

        Args:
            norm: Norm of the gradient; None if the losses are not finite.
            checks: Those of each pass of this process. The first one of all processes that fails is the cause that is named.
        """
        complaints = [] if norm is not None else [complaint for each in checks if (complaint := each.complaint())]
        parts = gather_objects((list(keys), complaints))
        all_keys = [key for part, _ in parts for key in part]
        first = next((complaint for _, each in parts for complaint in each), "")
        cause = first or (f"gradient norm {norm} is not finite" if norm is not None else f"loss {loss} is not finite")
        self.run.writer.log_nonfinite(cause, all_keys)
        too_late = norm is not None and self.run.engine.steps_after_nonfinite_gradient
        if self.experiment.train.nonfinite == "stop" or too_late:
            raise UserError(
                f"step {self.run.state.step + 1}: {cause}; its {len(all_keys)} samples are in "
                f"{self.experiment.folder}/nonfinite.jsonl. The last checkpoint is untouched; lower optim.lr or remove the "
                f"samples and resume, or set train.nonfinite=skip"
            )

    def advance(self, enqueued: list[dict[str, dict[str, Tensor]]], skipped: bool) -> None:
        state = self.run.state
        state.step += 1
        state.position += self.experiment.data.batch_size
        state.skipped += skipped
        # ZeRO restores its own copy in the next step, so clamping has no effect there. `Model.scale` is bounded anyway.
        self.run.model.clamp_scalars()
        if skipped:
            return
        for average in filter(None, (state.average, state.momentum)):
            average.update(self.run.model)
        for rows_of in enqueued:
            for name, rows in rows_of.items():
                state.queues[name].push(**rows)

    def _record(self, numbers: dict[str, float], lr: float, norm: float, began: float) -> dict:
        state, experiment = self.run.state, self.experiment
        seconds = time.monotonic() - began
        record = {"step": state.step, "loss": numbers["loss"]}
        record |= {f"loss/{name}": numbers[name] for name in experiment.objectives}
        record |= {"lr": lr, **self.run.model.scalars()}
        record |= {
            "gradient_norm": norm,
            "epoch": state.position / self.run.epoch_samples,
            "seconds": seconds,
            "samples_per_second": experiment.data.batch_size / seconds,
            "data_wait": self.waited / seconds,
            "memory_mib": peak_memory_mib(self.accelerator.device),
        }
        measures = {*experiment.measures}
        measured = {name: numbers[name] for name in numbers if name in measures or name.startswith("geometry/")}
        return record | {name: value for name, value in measured.items() if math.isfinite(value)}


@torch.no_grad()
def geometry(f: Forward) -> dict[str, Tensor]:
    """Measure the embeddings of a step: uniformity of each kind, alignment and modality gap of the first two, () each.

    The two must be of one space: a model without contrast gives first tokens of different widths.
    """
    embeds = {name: embed.detach() for name, embed in f.cached_embeddings().items()}
    x, y, *_ = [*embeds.values(), None, None]
    with deferred_checks():
        record = {f"geometry/uniformity_{name}": uniformity(embed) for name, embed in embeds.items()}
        if y is not None and x.shape == y.shape:
            record |= {"geometry/alignment": alignment(x, y), "geometry/modality_gap": modality_gap(x, y)}
    return record


def train(experiment: Experiment, resume: bool = False, code: UserCode = NO_CODE) -> int:
    """Run the experiment, or resume it, and return the exit code.

    Args:
        code: The user's own code that the experiment is made of, to be kept with the run.
    """
    with TrainingInterrupt() as interrupted, RunLock(experiment.folder) as lock:
        try:
            run = set_up(experiment, resume, lock, code)
        except Stopped:
            print("vlp: stopped while waiting for other processes", file=sys.stderr)
            return STOPPED
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
        run.finish_saves()  # the copy may be behind
        run.writer.log(f"{folder} is already at its last step, {run.total_steps}")
        return
    try:
        done = Trainer(run).fit(interrupted)
    except Stopped:
        done = False
    run.finish_saves()
    if done:
        run.writer.log(f"done: {folder}")
    else:
        copy_to = run.experiment.save.copy_to
        named = [f"save.copy_to={copy_to}"] if copy_to else []
        if stream := run.experiment.data.stream:
            named += stream.commands_to_name
            named += [] if stream.inexact_resume else ["data.train.0.inexact_resume=true"]
        command = shlex.join(["vlp", "train", "--resume", str(folder), *named, *code.options])
        run.writer.log(f"stopped at step {run.state.step} and saved; continue with: {command}")


if __name__ == "__main__":
    # Modules below the command line must not import it, so run it as a program.
    sys.argv.insert(1, "train")
    runpy.run_module("vlp.cli", run_name="__main__", alter_sys=True)
