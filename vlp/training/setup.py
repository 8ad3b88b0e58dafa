"""Build everything that a training run needs before its first step."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from vlp.config import Experiment, Training
from vlp.data.reading.annotated import AnnotatedReader
from vlp.data.stream import TrainDataset, TrainingData
from vlp.data.text import Tokenizer, load_tokenizer
from vlp.data.unindexed import StreamDataset
from vlp.distributed import refuse_together
from vlp.encoders.mome_layer import MomeLayer
from vlp.errors import UserError
from vlp.files import read_log
from vlp.models.base import Model
from vlp.objectives.requirements import has_images
from vlp.optim.ema import EMA
from vlp.optim.groups import describe_groups, parameter_groups, starts_with
from vlp.specs.user_code import NO_CODE, UserCode
from vlp.training.engines import Engine, repeated_blocks
from vlp.training.launch import start_engine
from vlp.training.run import Run
from vlp.training.run_lock import RunLock
from vlp.training.run_writer import RunWriter
from vlp.training.state import TrainState
from vlp.training.validation import check_resumable, check_rows, check_shards, check_together, validate, validate_tasks
from vlp.weights import checkpoints


def set_up(experiment: Experiment, resume: bool, lock: RunLock, code: UserCode = NO_CODE) -> Run:
    """Build a run in this process and create its folder, or reopen the folder of a run to resume.

    Args:
        experiment: The experiment. It is resolved here, unless the run is resumed.
        resume: Whether to continue from the newest undamaged checkpoint in the run's folder.
        lock: Lock of the run's folder, which the main process takes before it reads a checkpoint or writes.
        code: The user's own code that the experiment is made of, to be kept with the run.

    Raises:
        UserError: If the experiment cannot be trained. Nothing has been written by then.
    """
    validate(experiment)
    folder = experiment.folder
    engine = start_engine(experiment.train, experiment.micro_batch_size)
    accelerator = engine.accelerator
    engine.check(experiment)
    check_rows(experiment, accelerator.num_processes)
    check_together(experiment, accelerator.num_processes)
    check_shards(experiment, accelerator.num_processes)
    with refuse_together():
        if not resume:
            check_new(folder)
        elif accelerator.is_main_process:
            lock.acquire()
    checkpoint = checkpoints.newest_whole(folder / "checkpoints") if resume else None
    if checkpoint is not None:
        check_resumable(experiment)
    accelerator.wait_for_everyone()  # every process has looked before one of them writes
    with moved_data_hint(resume):
        validate_tasks(experiment)
    if not resume:
        experiment = experiment.resolved()
    torch.manual_seed(experiment.seed)
    # a checkpoint contains every weight, so a resumed run does not need the files that it once started from
    model = experiment.build_model(load_weights=checkpoint is None)
    tokenizer = load_run_tokenizer(experiment, model, resume) if model.text is not None else None
    with moved_data_hint(resume):
        dataset = open_data(experiment, model, tokenizer)
    if resume:
        check_same_data(folder, dataset)
    check_dataset(experiment, dataset)
    total_steps = count_steps(experiment, len(dataset))
    if resume:
        check_not_shorter(folder, total_steps)
    prepare_model(model, experiment.train, engine)
    if checkpoint is None and not experiment.train.random_frozen:
        check_frozen(model)
    state = initial_state(experiment, model, len(dataset), accelerator.device)
    groups = parameter_groups(
        model, experiment.optim.weight_decay, experiment.train.layer_decay, experiment.train.lr_scales
    )
    optimizer = experiment.optim.build(groups)
    if checkpoint is not None:
        checkpoints.load_model(model, checkpoints.read(checkpoint, "model"), checkpoint)
        state.load(checkpoints.read_state(checkpoint), partial(checkpoints.read, checkpoint))
    writer = RunWriter(experiment, engine, state, len(dataset))
    run = Run(experiment, engine, model, tokenizer, dataset, optimizer, state, writer, total_steps, checkpoint)
    reports = [f"{part} weights: {report or 'random'}" for part, report in model.reports.items()]
    parameters = "\n".join([*reports, "", describe_groups(optimizer.param_groups)]) + "\n"
    with refuse_together():
        if run.copy:
            run.copy.check()
        if accelerator.is_main_process and not resume:
            lock.acquire()
            check_new(folder)  # which another process may have trained meanwhile
    writer.open(resume, tokenizer, [reader.fingerprint() for reader in dataset.readers], parameters, total_steps, code)
    run.saver.start_copy()
    for line in (describe(run), *(reports if checkpoint is None else ())):
        writer.log(line)
    return run


def open_data(experiment: Experiment, model: Model, tokenizer: Tokenizer | None) -> TrainingData:
    """Open the training data.

    Raises:
        UserError: If a source is missing, damaged or empty.
    """
    data = experiment.data
    settings = (
        (data.augment, *data.views),
        model.preprocess if has_images(data) else None,
        tokenizer,
        data.max_length,
        data.max_pixels,
        experiment.seed,
        data.text_views,
    )
    if data.stream is None:
        return TrainDataset(data.train, *settings, data.readers)
    # validation has checked that there are steps, or else samples of an epoch
    return StreamDataset(data.stream, data.stream.epoch_samples or experiment.train.steps * data.batch_size, *settings)


def check_new(folder: Path) -> None:
    """Check that a folder is not that of a run.

    Raises:
        UserError: If it is.
    """
    if (folder / "experiment.json").exists():
        advice = f"continue it with --resume {folder}, or set another name=..."
        if not (folder / "checkpoints").is_dir():
            advice = f"it has no checkpoint yet: remove {folder} to start again, or set another name=..."
        raise UserError(f"{folder} already holds a run; {advice}")


def load_run_tokenizer(experiment: Experiment, model: Model, resume: bool) -> Tokenizer:
    """Load the tokenizer, from the run's folder if the run is resumed.

    Raises:
        UserError: If the text tower has fewer tokens or positions than the experiment needs.
    """
    data, tower = experiment.data, model.text
    if resume:
        tokenizer = load_tokenizer(str(experiment.folder / "tokenizer"))
    else:
        tokenizer = load_tokenizer(data.tokenizer, data.add_sep, data.clean_captions)
    if tokenizer.vocab_size > tower.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens but the text tower only {tower.vocab_size}; "
            f"use the tokenizer of its weights, or set the tower's vocab_size"
        )
    if data.max_length > tower.max_length:
        raise UserError(
            f"data.max_length={data.max_length} but the text tower takes {tower.max_length} tokens; lower it"
        )
    return tokenizer


def check_dataset(experiment: Experiment, dataset: TrainingData) -> None:
    """Check that the data have the model's classes and at least one batch.

    Raises:
        UserError: If not.
    """
    num_classes, batch_size = experiment.model.classes, experiment.data.batch_size
    for reader in dataset.readers:
        if num_classes is None or not isinstance(reader, AnnotatedReader) or not reader.classes:
            continue
        if len(reader.classes) != num_classes:
            raise UserError(
                f"{reader.location} has {len(reader.classes)} classes and the model {num_classes}; "
                f"set model.classes to {len(reader.classes)}"
            )
    if batch_size > len(dataset):
        raise UserError(
            f"data.batch_size={batch_size} is larger than the data ({len(dataset)} samples in "
            f"{', '.join(source.location for source in experiment.data.train)}); lower it to at most that"
        )


def check_same_data(folder: Path, dataset: TrainingData) -> None:
    """Check that a resumed run reads the data that it was started with.

    The order of samples is a function of the sizes of the shards. With one more shard the run would repeat some samples and
    miss others.

    Raises:
        UserError: If the data have changed, or data.json is damaged.
    """
    path = folder / "data.json"
    if not path.exists():
        return
    try:
        fingerprints = json.loads(path.read_text())
    except ValueError:
        raise UserError(f"{path} is damaged; put it back, or remove it to resume unchecked") from None
    for reader, before in zip(dataset.readers, fingerprints):
        if reader.fingerprint() != before:
            raise UserError(
                f"the shards at {reader.location} are not the ones that {folder} was started with "
                f"({before['samples']:,} samples in {before['shards']} shards then, {len(reader):,} in "
                f"{len(reader.shards)} now); name the same shards with data.train=LOCATION, or start a new run"
            )


@contextmanager
def moved_data_hint(resume: bool) -> Iterator[None]:
    """Context in which an error about the data of a resumed run says how to name their new location."""
    try:
        yield
    except UserError as e:
        if not resume:
            raise
        raise UserError(f"{e}; if the data have moved, resume with data.train=NEW data.val=NEW") from None


def check_not_shorter(folder: Path, total_steps: int) -> None:
    """Check that a resumed run is as long as before, or longer.

    Raises:
        UserError: If not.
    """
    before = max((start.get("total_steps", 0) for start in read_log(folder / "starts.jsonl")), default=0)
    if total_steps < before:
        raise UserError(
            f"{folder} is a run of {before:,} steps, and train.steps or train.epochs now gives {total_steps:,}; it may only "
            f"become longer"
        )


def count_steps(experiment: Experiment, epoch_samples: int) -> int:
    """Return the optimizer steps of a run.

    Raises:
        UserError: Unless exactly one of steps and epochs is set, and gives at least one step.
    """
    train = experiment.train
    if (train.steps is None) == (train.epochs is None):
        raise UserError("set one of train.steps and train.epochs, and the other to none")
    if train.steps is not None:
        steps = train.steps
    else:
        steps = math.ceil(train.epochs * epoch_samples / experiment.data.batch_size)
    if steps < 1:
        raise UserError(f"train.steps or train.epochs gives {steps} steps; make it at least one")
    return steps


def configure_model(model: Model, train: Training) -> None:
    """Freeze parameters, set up activation checkpointing, and switch to training mode.

    Raises:
        UserError: If a prefix of ``train.frozen`` matches no parameter.
    """
    for prefix in train.frozen:
        frozen = [p for name, p in model.named_parameters() if starts_with(name, prefix)]
        if not frozen:
            own = dict(model.named_parameters(recurse=False))
            children = ", ".join([*dict(model.named_children()), *own])
            raise UserError(f"train.frozen: no parameter starts with {prefix!r}; they start with {children}")
        for p in frozen:
            p.requires_grad_(False)
    if train.activation_checkpointing != "none":
        model.set_activation_checkpointing(train.activation_checkpointing)
    model.train()
    # frozen modules stay in evaluation mode: no dropout, and BatchNorm keeps its statistics
    for name, module in model.named_modules():
        if any(starts_with(f"{name}.", f"{prefix}.") for prefix in train.frozen):
            module.eval()


def prepare_model(model: Model, train: Training, engine: Engine) -> None:
    """Configure the model, move it to the device, and set its memory format and compilation."""
    configure_model(model, train)
    engine.place(model)
    if train.compile:
        compile_blocks(model)


def compile_blocks(model: Model, backend: str = "inductor") -> None:
    """Compile the repeated blocks of the image and the text tower, such as those of a ViT and the layers of BERT.

    A block has no branches that depend on data, so it is one graph. What runs between blocks, such as the grouping of texts by
    length, stays in Python.

    Raises:
        UserError: If the towers have no such blocks.
    """
    found = [block for tower in (model.image, model.text) if tower is not None for block in repeated_blocks(tower)]
    blocks = [
        block for block in found if not isinstance(block, MomeLayer)
    ]  # packs texts by lengths that the host knows
    if not blocks:
        raise UserError(
            "train.compile compiles blocks of an image and a text tower, and the model has none; set it to false"
        )
    for block in blocks:
        block.compile(backend=backend)


def check_frozen(model: Model) -> None:
    """Check that no whole part of the model is frozen at its random start.

    Raises:
        UserError: If one is.
    """
    for part, report in model.reports.items():
        prefix = "" if part == "model" else f"{part}."
        trained = [p.requires_grad for name, p in model.named_parameters() if name.startswith(prefix)]
        if report is None and trained and not any(trained):
            raise UserError(
                f"train.frozen freezes {part}, whose weights are random; load weights, leave it out of train.frozen, or "
                f"set train.random_frozen=true if it is a control"
            )


def initial_state(experiment: Experiment, model: Model, epoch_samples: int, device: torch.device) -> TrainState:
    """Return the counters, averages and queues at the start of a run."""
    state = TrainState()
    if experiment.train.ema_decay is not None:
        state.average = EMA(model, experiment.train.ema_decay)
    if experiment.momentum:
        state.momentum = EMA(model, experiment.momentum.decay, experiment.momentum.mode)
    # a generator of its own, so that queues start equal on every process, whatever random numbers the model used
    generator = torch.Generator().manual_seed(experiment.seed)
    for name, objective in experiment.objectives.items():
        queue = objective.init_queue(model, epoch_samples, device, generator)
        if queue is not None:
            state.queues[name] = queue
    return state


def describe(run: Run) -> str:
    """Return one line about the run (its size, its length and where it starts), and one for each doubt about it."""
    parameters = list(run.model.parameters())
    total, trained = sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)
    start = f"resumed at step {run.state.step} from {run.resumed_from.name}" if run.resumed_from else "from step 0"
    summary = (
        f"{run.folder}: {total / 1e6:.1f} M parameters ({trained / 1e6:.1f} M trained), "
        f"{run.epoch_samples:,} samples an epoch, {run.total_steps:,} steps of "
        f"{run.experiment.data.batch_size} samples, {run.accelerator.num_processes} process(es) with {run.engine.description}, {start}"
    )
    return "\n".join([summary, *_schedule_notes(run), *run.dataset.notes()])


def _schedule_notes(run: Run) -> list[str]:
    warmup, lr = run.experiment.schedule.warmup_steps, run.experiment.optim.lr
    if warmup <= run.total_steps:
        return []
    highest = lr * run.experiment.schedule.factor(run.total_steps - 1, run.total_steps)
    return [
        f"the warm-up of {warmup:,} steps (schedule.warmup_steps) is longer than the run of {run.total_steps:,}: the learning "
        f"rate ends at {highest:.3g} and never reaches optim.lr={lr:g}"
    ]
