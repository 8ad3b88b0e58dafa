"""Check an experiment before anything is built or written."""

from __future__ import annotations

import json

from vlp.config import Experiment
from vlp.errors import UserError
from vlp.objectives.base import Objective
from vlp.specs.fields import check_limits
from vlp.specs.json import dump, from_plain
from vlp.specs.overrides import suggest
from vlp.specs.types import check_types
from vlp.specs.user_code import own_types
from vlp.tasks.base import Task
from vlp.tasks.naming import check_task_names
from vlp.tasks.submission import check_stored_tasks
from vlp.training import detached
from vlp.training.logging import require
from vlp.training.store import check_url

LONGEST_NAME = 200  # bytes; a file system allows 255, and an ablation adds a suffix


def validate(experiment: Experiment) -> None:
    """Check the values of an experiment: their types, their limits, and whether they are compatible.

    Raises:
        UserError: For the first mistake.
    """
    check_types(experiment)
    _check_json(experiment)
    check_limits(experiment)
    check_name(experiment.name)
    data, train = experiment.data, experiment.train
    if data.batch_size % train.accumulation:
        raise UserError(
            f"data.batch_size={data.batch_size} is not a multiple of train.accumulation={train.accumulation}"
        )
    if not data.train:
        raise UserError("data.train names no data; set data.train=SHARDS")
    check_stream(experiment)
    check_together(experiment, 1)
    if experiment.micro_batch_size % (data.readers * data.together):
        raise UserError(
            f"data.readers={data.readers} does not divide the micro-batch of {_micro_batch(experiment)} "
            "(data.batch_size / train.accumulation); give one that does"
        )
    if not experiment.objectives:
        raise UserError("the experiment has no objective; add one to objectives")
    objectives = list(experiment.objectives.values())
    if any(a == b for n, a in enumerate(objectives) for b in objectives[:n]):
        raise UserError("objectives has the same objective twice; give it once, with the weight of both")
    for name, objective in experiment.objectives.items():
        if not isinstance(objective, Objective):
            raise UserError(f"objectives.{name} is not a vlp.objectives.base.Objective; make its class a subclass")
        objective.validate(experiment)
    check_rows(experiment, 1)
    detached.validate(experiment)
    if train.mixup:
        check_mixup(experiment)
    for name, task in experiment.evaluate.items():
        if not isinstance(task, Task):
            raise UserError(f"evaluate.{name} is not a vlp.tasks.base.Task; make its class a subclass")
    check_task_names(experiment.evaluate)
    check_stored_tasks(experiment.evaluate)
    check_best(experiment)
    if experiment.save.copy_to is not None:
        check_url(experiment.save.copy_to, "save.copy_to")
    require(experiment.log)


def _check_json(experiment: Experiment) -> None:
    """Check that the experiment can be rebuilt from its experiment.json, where lists become tuples and keys texts."""
    try:
        rebuilt = from_plain(json.loads(dump(experiment)), own_types(experiment))
    except TypeError as e:
        raise UserError(
            f"the experiment cannot be stored as JSON ({e}); use dataclasses, numbers, texts, tuples and dicts"
        ) from None
    try:
        check_types(rebuilt)
    except UserError as e:
        raise UserError(
            f"the experiment could not be resumed, because its JSON is read back differently: {e}; use a tuple instead of "
            f"a list, and texts as the keys of a dict"
        ) from None


def validate_tasks(experiment: Experiment) -> None:
    """Check the options and inputs of every task, which may read the headers of its data.

    Raises:
        UserError: For the first mistake.
    """
    for task in experiment.evaluate.values():
        task.validate(experiment.data)


def check_name(name: str) -> None:
    """Check that a run's name can be that of a folder in ``output``.

    Raises:
        UserError: If not.
    """
    if not name:
        raise UserError("the run has no name; set name=NAME, the name of its folder")
    is_text = name.isprintable() and len(name.encode(errors="replace")) <= LONGEST_NAME
    if not is_text or "/" in name or name.startswith("."):
        shown = ascii(name if len(name) < 40 else f"{name[:20]}...")
        raise UserError(
            f"name={shown} is not the name of a folder: at most {LONGEST_NAME} bytes without / and control characters, "
            f"and no dot at the start; set name=NAME, and output=FOLDER for the folder that it is in"
        )


def check_together(experiment: Experiment, processes: int) -> None:
    """Check that the micro-batch of a process contains only whole groups of related samples.

    Raises:
        UserError: If not.
    """
    together, rows = experiment.data.together, experiment.micro_batch_size
    if rows // processes % together:
        per_process = f" / {processes} processes" if processes > 1 else ""
        raise UserError(
            f"the sources of data.train keep {together} samples together, which does not divide the "
            f"{rows // processes} samples of a micro-batch (data.batch_size / train.accumulation{per_process}); "
            f"make data.batch_size a multiple of {together * experiment.train.accumulation * processes}"
        )


def check_stream(experiment: Experiment) -> None:
    """Check that the rest of the experiment does without what a `WebDatasetStream` lacks.

    Raises:
        UserError: If not.
    """
    data, stream = experiment.data, experiment.data.stream
    if stream is None:
        return
    if len(data.train) > 1:
        raise UserError(
            f"data.train mixes a WebDatasetStream with {len(data.train) - 1} other source(s), whose share of it could not be kept; "
            "give one WebDatasetStream, or Sources only"
        )
    if data.readers != 1:
        raise UserError(
            f"data.readers={data.readers} deals out the order of indexed shards, which a WebDatasetStream does not have; set it to 1"
        )
    if experiment.train.epochs is not None and stream.epoch_samples is None:
        raise UserError(
            "train.epochs needs to know the samples of an epoch, and a WebDatasetStream does not; set data.train.0.epoch_samples, "
            "or train.steps"
        )


def check_shards(experiment: Experiment, processes: int) -> None:
    """Check that a `WebDatasetStream` has a shard for each data worker of each process.

    Raises:
        UserError: If not, or there is no shard.
    """
    data, stream = experiment.data, experiment.data.stream
    if stream is None:
        return
    shards, readers = len(stream.open()), processes * max(1, data.workers)
    if shards < readers and not stream.resampled:
        raise UserError(
            f"data.train has {shards} shard(s) for {readers} readers ({processes} process(es) with data.workers={data.workers}), and "
            "each must have its own; lower data.workers, or set data.train.0.resampled=true"
        )


def check_resumable(experiment: Experiment) -> None:
    """Check that the data can continue where the checkpoint was saved, or the user does without that.

    Raises:
        UserError: If not.
    """
    if experiment.data.stream is not None and not experiment.data.stream.inexact_resume:
        raise UserError(
            "a WebDatasetStream cannot continue where it stopped: it starts at a new place, so that samples may be repeated or "
            "skipped; set data.train.0.inexact_resume=true to resume like that"
        )


def _micro_batch(experiment: Experiment) -> str:
    rows, together = experiment.micro_batch_size, experiment.data.together
    return f"{rows} samples" if together == 1 else f"{rows // together} groups of {together} samples"


def check_rows(experiment: Experiment, processes: int) -> None:
    """Check that every loss sees as many rows at once as it needs.

    A contrastive loss of a single pair is 0, and its gradient too.

    Raises:
        UserError: If an objective sees too few.
    """
    train = experiment.train
    rows = experiment.data.batch_size // train.backward_passes
    size = "data.batch_size" if train.backward_passes == 1 else "data.batch_size / train.accumulation"
    for name, objective in experiment.objectives.items():
        seen, where = (
            (rows, size) if objective.row_scope == "global" else (rows // processes, f"{size} / {processes} processes")
        )
        if seen < objective.min_rows:
            raise UserError(
                f"objectives.{name} compares at least {objective.min_rows} samples with each other and sees {seen} at once "
                f"({where}); raise data.batch_size or lower train.accumulation"
            )


def check_best(experiment: Experiment) -> None:
    """Check that an evaluation of the experiment measures the metric that selects the best checkpoint.

    Raises:
        UserError: If not, as far as it is known before the evaluation.
    """
    best = experiment.save.best
    if best is None:
        return
    name, _, metric = best.partition("/")
    if name not in experiment.evaluate:
        raise UserError(
            f"save.best={best!r} names no task of evaluate ({', '.join(experiment.evaluate) or 'there is none'})"
        )
    known = experiment.evaluate[name].metric_names()
    if not metric or (known is not None and metric not in known):
        names = list(known or filter(None, [experiment.evaluate[name].headline]))
        raise UserError(f"save.best={best!r}: {name} has no metric {metric!r}{suggest(metric, names)}")


def check_mixup(experiment: Experiment) -> None:
    """Check that mixup has classes to mix, a positive parameter, and an even micro-batch.

    Raises:
        UserError: If not.
    """
    mix = experiment.train.mixup
    if experiment.model.classes is None:
        raise UserError("train.mixup mixes classes, and the model has none; set model.classes, or train.mixup to none")
    if min(mix.mixup, mix.cutmix) < 0 or max(mix.mixup, mix.cutmix) == 0:
        raise UserError(f"train.mixup has mixup={mix.mixup:g}, cutmix={mix.cutmix:g}; one must be above 0, none below")
    if experiment.micro_batch_size % 2:
        raise UserError("train.mixup mixes pairs; make data.batch_size / train.accumulation even")
