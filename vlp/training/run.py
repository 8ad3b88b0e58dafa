"""A run: what training builds before the first step, and what it does between steps besides training."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

import torch
from accelerate import Accelerator

from vlp.config import Experiment
from vlp.data.stream import Loaded, TrainDataset, training_loader
from vlp.data.text import load_tokenizer
from vlp.distributed import broadcast_from_main
from vlp.errors import UserError
from vlp.files import file_hash
from vlp.objectives.needs import has_pictures
from vlp.optim.ema import EMA
from vlp.optim.groups import describe_groups, parameter_groups, starts_with
from vlp.optim.optimizers import Lamb, Lars
from vlp.specs.user_code import NO_CODE, UserCode
from vlp.tasks.base import EvalModel, Result
from vlp.tasks.contamination import contaminated_images
from vlp.training import checkpoint
from vlp.training.engines import engine, start
from vlp.training.logging import peak_memory_mib, read_log
from vlp.training.run_writer import RunWriter
from vlp.training.state import TrainState
from vlp.training.validation import validate
from vlp.weights import checkpoints


def total_steps(experiment: Experiment, epoch_samples: int) -> int:
    train = experiment.train
    if (train.steps is None) == (train.epochs is None):
        raise UserError("set one of train.steps and train.epochs, and the other to none")
    steps = (
        train.steps if train.steps is not None else math.ceil(train.epochs * epoch_samples / experiment.data.batch_size)
    )
    if steps < 1:
        raise UserError(f"train.steps or train.epochs gives {steps} steps; make it at least one")
    return steps


class Run:
    """What belongs to one run in one process."""

    def __init__(self, experiment: Experiment, accelerator: Accelerator, resume: bool, whole: Path | None):
        self.experiment, self.accelerator, self.resumed_from = experiment, accelerator, whole
        self.folder, self.is_main, self.resume = experiment.folder, accelerator.is_main_process, resume
        torch.manual_seed(experiment.seed)
        # a checkpoint holds every weight, so a resumed run no longer needs the files that it once started from
        self.model = experiment.model.build(load_weights=whole is None)
        self.tokenizer = self.vocabulary = None
        if self.model.text is not None:
            data = experiment.data
            given = (str(self.folder / "tokenizer"),) if resume else (data.tokenizer, data.sep, data.clean)
            self.tokenizer = load_tokenizer(*given)
            self.vocabulary = self.tokenizer.vocabulary().to(accelerator.device)
            self._check_text()
        data = experiment.data
        self.dataset = TrainDataset(
            data.train,
            (data.augment, *data.views),
            self.model.preprocess if has_pictures(data) else None,
            self.tokenizer,
            data.max_length,
            data.max_pixels,
            experiment.seed,
            data.text_views,
        )
        self._check_classes()
        self._check_same_data()
        self.epoch_samples = len(self.dataset)
        if data.batch_size > self.epoch_samples:
            raise UserError(
                f"data.batch_size={data.batch_size} is larger than the data ({self.epoch_samples} samples in "
                f"{', '.join(r.location for r in self.dataset.readers)}); lower it to at most that"
            )
        for task in experiment.evaluate.values():
            task.validate(data)
        self.total_steps = total_steps(experiment, self.epoch_samples)
        self._prepare_model()
        self.state = self._start_state()
        groups = parameter_groups(
            self.model, experiment.optim.weight_decay, experiment.train.layer_decay, experiment.train.lr_scales
        )
        if engine(accelerator) == "deepspeed":
            self._check_zero()
        self.optimizer = experiment.optim.build(groups)
        if whole is not None:
            self._restore(whole)
        self.records = RunWriter(experiment, accelerator, self.state, self.epoch_samples)

    @classmethod
    def start(cls, experiment: Experiment, resume: bool, code: UserCode = NO_CODE) -> Run:
        """Raises UserError for whatever of the experiment cannot be, before anything is written."""
        validate(experiment)
        folder = experiment.folder
        accelerator = start(experiment.train, experiment.data.batch_size // experiment.train.accumulation)
        if not resume and (folder / "experiment.json").exists():
            raise UserError(
                f"{folder} already holds a run; continue it with --resume {folder}, or set another name=..."
            )
        whole = checkpoints.newest_whole(folder / "checkpoints") if resume else None
        accelerator.wait_for_everyone()  # all have looked before one writes
        if not resume:
            experiment = experiment.resolved()
        run = cls(experiment, accelerator, resume, whole)
        fingerprints = [reader.fingerprint() for reader in run.dataset.readers]
        run.records.open(resume, run.tokenizer, fingerprints, run._audit(), run.total_steps, code)
        run.records.say(run.describe())
        if whole is None:
            for tower, report in run.model.reports.items():
                run.records.say(f"{tower} weights: {report or 'random'}")
        return run

    def _check_text(self) -> None:
        tower, data = self.model.text, self.experiment.data
        if self.tokenizer.vocab_size > tower.vocab_size:
            raise UserError(
                f"the tokenizer has {self.tokenizer.vocab_size} tokens but the text tower only {tower.vocab_size}; "
                f"use the tokenizer of its weights, or set the tower's vocab_size"
            )
        if data.max_length > tower.max_length:
            raise UserError(
                f"data.max_length={data.max_length} but the text tower takes {tower.max_length} tokens; lower it"
            )

    def _check_classes(self) -> None:
        count = getattr(self.experiment.model, "classes", None)
        for reader in self.dataset.readers:
            if count is not None and len(found := getattr(reader, "classes", ())) not in (0, count):
                raise UserError(
                    f"{reader.location} has {len(found)} classes and the model {count}; set model.classes to {len(found)}"
                )

    def _check_same_data(self) -> None:
        """The order is a function of the shards' sizes: with a shard more, a resumed run would repeat and miss samples."""
        path = self.folder / "data.json"
        if not self.resume or not path.exists():
            return
        try:
            begun_with = json.loads(path.read_text())
        except ValueError:
            raise UserError(f"{path} is damaged: put it back, or remove it to resume unchecked") from None
        for reader, before in zip(self.dataset.readers, begun_with):
            if reader.fingerprint() != before:
                raise UserError(
                    f"the shards at {reader.location} are not the ones that {self.folder} was started with "
                    f"({before['samples']:,} samples in {before['shards']} shards then, {len(reader):,} in "
                    f"{len(reader.shards)} now); put them back, or start a new run"
                )

    def _check_zero(self) -> None:
        if isinstance(self.experiment.optim, (Lamb, Lars)):
            raise UserError(
                f"{type(self.experiment.optim).__name__} needs whole parameters and ZeRO cuts them up; use vlp.optim.optimizers.AdamW, or another launch config"
            )
        if self.experiment.train.nonfinite == "skip" and self.experiment.train.accumulation > 1:
            raise UserError("train.nonfinite=skip with DeepSpeed needs train.accumulation=1; set one of them")

    def _start_state(self) -> TrainState:
        experiment, device = self.experiment, self.accelerator.device
        state = TrainState()
        if experiment.train.ema_decay is not None:
            state.average = EMA(self.model, experiment.train.ema_decay)
        if experiment.momentum:
            state.momentum = EMA(self.model, experiment.momentum.decay, experiment.momentum.mode)
        # the same on every process, whatever the model drew
        generator = torch.Generator().manual_seed(experiment.seed)
        for name, objective in experiment.objectives.items():
            if hasattr(objective, "init_queue"):
                state.queues[name] = objective.init_queue(self.model, self.epoch_samples, device, generator)
        return state

    def _prepare_model(self) -> None:
        train, model = self.experiment.train, self.model
        for prefix in train.frozen:
            frozen = [p for n, p in model.named_parameters() if starts_with(n, prefix)]
            if not frozen:
                raise UserError(
                    f"train.frozen: no parameter starts with {prefix!r}; they start with {', '.join(dict(model.named_children()))}"
                )
            for p in frozen:
                p.requires_grad_(False)
        if train.activation_checkpointing != "none":
            model.set_activation_checkpointing(train.activation_checkpointing)
        model.to(self.accelerator.device)
        if engine(self.accelerator) != "deepspeed":  # which sends weights as plain bytes
            # convolutions run faster so, transformers do not mind
            model.to(memory_format=torch.channels_last)
        if train.compile:
            for tower in filter(None, (model.image, model.text)):
                tower.compile()
        model.train()
        # what is frozen is so altogether: no dropout, and a BatchNorm keeps its statistics
        for name, module in model.named_modules():
            if any(starts_with(f"{name}.", f"{prefix}.") for prefix in train.frozen):
                module.eval()

    def _restore(self, whole: Path) -> None:
        checkpoints.load_model(self.model, checkpoints.read(whole, "model"), whole)
        self.state.load(checkpoints.read_state(whole), partial(checkpoints.read, whole))

    def restore_optimizer(self, optimizer, zero: bool) -> None:
        """After the engine has wrapped everything: ZeRO has made its own copies by then."""
        if self.resumed_from is not None:
            tensors = checkpoints.read(self.resumed_from, "optimizer")
            checkpoint.load_optimizer(self.model, optimizer, zero, tensors)

    def _audit(self) -> str:
        """Where every weight came from, and which learning rate and weight decay it gets."""
        reports = [f"{tower}: {report or 'random'}" for tower, report in self.model.reports.items()]
        return "\n".join([*reports, "", describe_groups(self.optimizer.param_groups)]) + "\n"

    @property
    def to_evaluate(self) -> bool:
        """Whether the step just done is one after which to evaluate."""
        step, every = self.state.step, self.experiment.evaluate_every
        return bool(self.experiment.evaluate) and (step == self.total_steps or (every and step and step % every == 0))

    @property
    def evaluated(self) -> bool:
        return any(e["step"] == self.state.step for e in read_log(self.folder / "eval.jsonl"))

    @property
    def finished(self) -> bool:
        return self.state.step >= self.total_steps and (self.evaluated or not self.to_evaluate)

    def describe(self) -> str:
        e, n = self.experiment, sum(p.numel() for p in self.model.parameters())
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        start = (
            f"resumed at step {self.state.step} from {self.resumed_from.name}" if self.resumed_from else "from step 0"
        )
        return (
            f"{e.folder}: {n / 1e6:.1f} M parameters ({trained / 1e6:.1f} M trained), {self.epoch_samples:,} samples an epoch, "
            f"{self.total_steps:,} steps of {e.data.batch_size} samples, {self.accelerator.num_processes} process(es), {start}"
        )

    def micro_batches(self) -> Iterator[Loaded]:
        data, accelerator = self.experiment.data, self.accelerator
        return training_loader(
            self.dataset,
            start=self.state.position,
            stop=self.total_steps * data.batch_size,
            size=data.batch_size // self.experiment.train.accumulation,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            workers=data.workers,
            pin_memory=accelerator.device.type == "cuda",
        )

    def memory_mib(self) -> float:
        if self.accelerator.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20
        return peak_memory_mib()

    def save(self, optimizer, zero: bool) -> Path:
        """Writes a checkpoint. Every process must call it: ZeRO's state is gathered from all."""
        folder = self.folder / "checkpoints"
        path = folder / f"step-{self.state.step:08d}"
        optimizer_tensors = checkpoint.optimizer_tensors(self.model, optimizer, zero)
        if self.is_main:
            files = {"model": self.model.state_dict(), "optimizer": optimizer_tensors, **self.state.files()}
            checkpoint.save(folder, self.state.step, files, self.state.counters())
            checkpoint.prune(folder, self.experiment.save.keep, self.state.step)
        self.accelerator.wait_for_everyone()
        return path

    def evaluate(self, saved: Path) -> None:
        """Runs every task on the weights just saved (the averaged ones, if there are), and keeps the best checkpoint."""
        weights = saved / ("average.safetensors" if self.state.average else "model.safetensors")
        model = self.state.average.network if self.state.average else self.model
        subject = EvalModel(
            model,
            self.tokenizer,
            self.experiment.data,
            self.accelerator.device,
            self.experiment.seed,
            file_hash(weights),
            self.accelerator.process_index,
            self.experiment.name,
        )
        # running means are each process's own; those of the main process are in the checkpoint
        broadcast_from_main(model.buffers())
        results = {name: task(subject) for name, task in self.experiment.evaluate.items()}
        if self.is_main:
            results = {name: replace(result, trained_on=self.trained_on[name]) for name, result in results.items()}
            self.records.evaluation(results, subject)
            self._mark_best(results)
        self.accelerator.wait_for_everyone()

    @cached_property
    def trained_on(self) -> dict[str, int | None]:
        """How many of each task's pictures the run is trained on."""
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
        if before is None or value > before["value"]:
            checkpoint.mark_best(self.folder / "checkpoints", self.state.step, best, value)

    def close(self, together: bool) -> None:
        """Closes the files; ``together``: every process is here, so wait for all (one that ends while another still talks
        to it makes that one abort). After an error the others may be elsewhere, and the launcher ends them."""
        self.records.close()
        if together:
            self.accelerator.wait_for_everyone()
            self.accelerator.end_training()
