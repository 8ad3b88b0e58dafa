"""An experiment is one frozen dataclass: written in a Python file, overridden by ``dotted.key=value``, kept as JSON.

The JSON in the run folder holds every fact that the run depends on, sizes of the towers included, so that the run can be
resumed and evaluated without the file and without the weights that it started from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from vlp.data.augment import RandomResizedCrop, Resize
from vlp.data.mixup import Mixup
from vlp.data.reading.annotated import Annotated
from vlp.data.reading.sentences import Sentences
from vlp.data.reading.shards import Source
from vlp.encoders.activation_checkpointing import Checkpointing
from vlp.errors import UserError
from vlp.optim.ema import MomentumConfig
from vlp.optim.optimizers import AdamW
from vlp.optim.schedule import Schedule
from vlp.specs.config_file import call_config
from vlp.specs.json import flatten, read, read_without_code, to_plain
from vlp.specs.names import NO_TYPES


@dataclass(frozen=True)
class Data:
    """Where samples come from and what is done to them.

    Args:
        train: sources of the training stream: shards of pictures with captions, annotations, or files of texts.
        val: shards for the evaluations during training and for `vlp eval`'s default; None = none.
        tokenizer: folder, tokenizer.json, vocab.txt, ``pip:PACKAGE/path`` or ``open_clip:NAME``.
        sep: whether ``[SEP]`` ends a caption; None = as the tokenizer has it. ALBEF's weights were trained without.
        clean: whether captions are lower-cased and lose their punctuation first, as ALBEF's weights know them: see
            `vlp.data.text.clean_caption`.
        batch_size: samples of one optimizer step over all processes and accumulated micro-batches.
        max_length: tokens of a caption; longer ones are cut and counted.
        augment: what training pictures go through; every draw is seeded by (seed, epoch, sample).
        views: what further views of each picture go through: SimCLR and MoCo take one.
        text_views: how further views of each text are made from the first: see `vlp.data.text_views`.
        resize: what evaluated pictures go through.
        workers: loading processes of each training process.
        max_bad_fraction: of all samples; the run stops when more than this many are found unusable.
        max_pixels: a picture with more is bad.
    """

    train: tuple[Source | Annotated | Sentences, ...]
    val: str | None = None
    tokenizer: str = ""
    sep: bool | None = None
    clean: bool = False
    batch_size: int = 256
    max_length: int = 64
    augment: Any = field(default_factory=RandomResizedCrop)
    views: tuple[Any, ...] = ()
    text_views: tuple[Any, ...] = ()
    resize: Resize = field(default_factory=Resize)
    workers: int = 1
    max_bad_fraction: float = 0.01
    max_pixels: int = 64_000_000


@dataclass(frozen=True)
class Training:
    """The loop.

    Args:
        steps: optimizer steps; None = from ``epochs``.
        epochs: passes over all samples, rounded up to whole steps; None = from ``steps``.
        precision: float32, or bfloat16 autocast (the losses stay float32).
        accumulation: micro-batches of a step. The contrastive losses see the negatives of one micro-batch.
        grad_cache: they see those of all micro-batches, for a second forward of the towers: see `vlp.training.grad_cache`.
        clip_norm: the gradient's norm is scaled down to this; None = not.
        layer_decay: learning rate of a layer relative to the one after it (1 = the same).
        lr_scales: parameter-name prefix -> factor on the learning rate.
        frozen: parameter-name prefixes that are not trained; a ``*`` stands for anything up to the next dot.
        ema_decay: of the averaged weights that are evaluated and saved beside the trained ones; None = no average.
        mix: mixup and CutMix of the pictures and their classes, see `vlp.data.mixup`; None = neither.
        backward: of all losses "once", or "per_loss", before the next one's forward, for less memory: see `vlp.training.split_backward`.
        activation_checkpointing: what the backward pass makes again to save memory, see `vlp.encoders.activation_checkpointing`: "cheap" =
            what lies between matrix products, "full" = whole blocks.
        compile: run the model through torch.compile.
        nonfinite: what to do at a loss or gradient that is not finite: stop, naming the samples, or skip the step.
        processes: stop at start-up unless the launcher started this many; None = any number.
        engine: stop at start-up unless this runs; None = any.
        threads: of each process on a CPU; None = torch's choice.
    """

    steps: int | None = None
    epochs: float | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    accumulation: int = 1
    grad_cache: bool = False
    clip_norm: float | None = 1.0
    layer_decay: float = 1.0
    lr_scales: dict[str, float] = field(default_factory=dict)
    frozen: tuple[str, ...] = ()
    ema_decay: float | None = None
    mix: Mixup | None = None
    backward: Literal["once", "per_loss"] = "once"
    activation_checkpointing: Checkpointing = "none"
    compile: bool = False
    nonfinite: Literal["stop", "skip"] = "stop"
    processes: int | None = None
    engine: Literal["single", "ddp", "deepspeed"] | None = None
    threads: int | None = None


@dataclass(frozen=True)
class Saving:
    """Checkpoints.

    Args:
        every: steps; the last step is always saved.
        keep: the newest so many stay, and the best one.
        best: ``task/metric`` that decides which is best (higher is better), e.g. ``retrieval/mean_recall``; None = none is.
    """

    every: int = 500
    keep: int = 2
    best: str | None = None


@dataclass(frozen=True)
class Logging:
    """What is written beside log.jsonl, which has a line for every step.

    Args:
        geometry_every: steps between measures of alignment, uniformity and modality gap; 0 = never.
        tensorboard: also write TensorBoard events (extra ``tensorboard``).
        wandb: project to log to (extra ``wandb``); None = no.
        samples: also write every step's sample keys, a file a process, for debugging the data.
    """

    geometry_every: int = 10
    tensorboard: bool = False
    wandb: str | None = None
    samples: bool = False


@dataclass(frozen=True)
class Experiment:
    """All of a run.

    Args:
        name: of the run folder in ``output``.
        model: a spec with ``build()`` and ``resolved()``, e.g. `vlp.models.dual.Dual`.
        objectives: name -> objective; the total loss is the sum of weight * loss.
        momentum: the momentum encoder of the objectives that want one; None = none is kept.
        evaluate: name -> task, run every ``evaluate_every`` steps and at the end.
        evaluate_every: steps; 0 = only at the end.
    """

    name: str
    model: Any
    objectives: dict[str, Any]
    data: Data
    optim: Any = field(default_factory=AdamW)
    schedule: Schedule = field(default_factory=Schedule)
    train: Training = field(default_factory=Training)
    momentum: MomentumConfig | None = None
    evaluate: dict[str, Any] = field(default_factory=dict)
    evaluate_every: int = 0
    save: Saving = field(default_factory=Saving)
    log: Logging = field(default_factory=Logging)
    seed: int = 0
    output: str = "runs"

    @property
    def folder(self) -> Path:
        return Path(self.output) / self.name

    def resolved(self) -> Experiment:
        """With every size and normalisation that the weights bring, and every class, written out."""
        train = tuple(s.resolved() if isinstance(s, Annotated) else s for s in self.data.train)
        return replace(self, model=self.model.resolved(), data=replace(self.data, train=train))


# What may change between a run and its continuation: nothing that a loss depends on.
FREE_ON_RESUME = ("name", "output", "data.workers", "train.processes", "train.engine", "train.threads", "save", "log")


def load_config(config: str, *kinds: type, own_types: Mapping[str, type] = NO_TYPES) -> Any:
    """Return the experiment of a config: ``FILE.py``, ``FILE.py:NAME``, or a JSON file that `vlp.specs.json.dump` wrote.

    Args:
        config: Python file, and the name of a function in it if that is not ``config``.
        kinds: Classes of which the function's result must be an instance. The default is `Experiment`.
        own_types: Name -> class of the user's own types that a JSON file may name.

    Raises:
        UserError: If there is no such file or function, the file names a field that does not exist, or the function
            returns something else.
    """
    if config.endswith(".json") and Path(config).is_file():
        return load_json(Path(config), own_types)
    return call_config(config, kinds or (Experiment,))


def load_json(path: Path, own_types: Mapping[str, type] = NO_TYPES) -> Experiment:
    """Return the experiment of a JSON file. Only vlp's types and ``own_types`` are built: see `vlp.specs.user_code`.

    Raises:
        UserError: If the file is missing, damaged, not an experiment, or names another type.
    """
    return _checked(read(path, own_types), path)


def load_without_code(path: Path) -> Experiment:
    """Return the experiment of a JSON file, with a `vlp.specs.json.Foreign` for each spec of a user's own type.

    Raises:
        UserError: If the file is missing, damaged, or not an experiment.
    """
    return _checked(read_without_code(path), path)


def _checked(experiment: Any, path: Path) -> Experiment:
    if not isinstance(experiment, Experiment):
        raise UserError(f"{path} is not an experiment; is the folder a run?")
    return experiment


def changed_keys(old: Experiment, new: Experiment) -> list[str]:
    """Dotted keys in which two experiments differ, those of `FREE_ON_RESUME` left out."""
    a, b = flatten(to_plain(old)), flatten(to_plain(new))
    keys = [k for k in {**a, **b} if a.get(k) != b.get(k)]
    return [k for k in keys if not any(k == free or k.startswith(free + ".") for free in FREE_ON_RESUME)]
