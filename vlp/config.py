"""An experiment is one frozen dataclass: defined in a Python file, changed by ``dotted.key=value``, and stored as JSON.

The JSON in a run folder contains everything that the run depends on, including the sizes of the towers. The run can be
resumed and evaluated without the config file and without the weights that it started from.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from vlp.data.augment import RandomResizedCrop, Resize
from vlp.data.mixup import Mixup
from vlp.data.reading.annotated import Annotated
from vlp.data.reading.sentences import Sentences
from vlp.data.reading.shards import Source
from vlp.data.reading.tar_streams import WebDatasetStream
from vlp.encoders.activation_checkpointing import Checkpointing
from vlp.errors import UserError
from vlp.files import local_path
from vlp.models.base import Model, ModelSpec
from vlp.optim.ema import MomentumConfig
from vlp.optim.optimizers import AdamW
from vlp.optim.schedule import Schedule
from vlp.specs.config_file import call_config
from vlp.specs.fields import setting
from vlp.specs.json import flatten, read, read_without_code, to_plain
from vlp.specs.names import NO_TYPES


@dataclass(frozen=True)
class Data:
    """Sources of samples and how they are preprocessed.

    Args:
        train: Sources of the training stream: shards of image-caption pairs, annotations, or files of texts; or one
            `vlp.data.reading.tar_streams.WebDatasetStream`.
        val: Shards for evaluations during training, and the default of ``vlp eval``. None disables both.
        tokenizer: Folder, tokenizer.json, vocab.txt, ``pip:PACKAGE/path`` or ``open_clip:NAME``.
        add_sep: Whether ``[SEP]`` ends a text. None follows the tokenizer. ALBEF was trained without it.
        clean_captions: Whether to lower-case captions and remove their punctuation, the preprocessing that ALBEF was trained
            with: see `vlp.data.text.clean_caption`.
        batch_size: Samples of an optimizer step, over all processes and accumulated micro-batches.
        max_length: Tokens of a text. Longer texts are truncated and counted.
        augment: Transform of training images. Its random numbers depend only on (seed, epoch, sample).
        views: Transforms of further views of each image. SimCLR and MoCo read one.
        text_views: Transforms of a text into its further views: see `vlp.data.text_views`.
        resize: Transform of evaluated images.
        readers: Canonical readers of the training stream, to which the shards are dealt in each epoch. On any number of
            processes that divides it, every process reads its own part of the shards, and the order of the samples stays
            the same. It must divide the micro-batch, and with sources that keep samples ``together``, their multiples. With 1,
            every process reads every shard.
        prefetch_shards: Remote shards that each training process downloads before it needs them, to the folder $VLP_CACHE.
            0 downloads a shard when its first sample is read.
        workers: Data-loading processes of each training process.
        max_bad_fraction: Fraction of all samples. The run stops if more than these are unusable.
        max_pixels: Images with more pixels are unusable.
    """

    train: tuple[Source | Annotated | Sentences | WebDatasetStream, ...]
    val: str | None = None
    tokenizer: str = ""
    add_sep: bool | None = None
    clean_captions: bool = False
    batch_size: int = setting(256, least=1)
    max_length: int = setting(64, least=2)  # [CLS] and a token
    augment: Any = field(default_factory=RandomResizedCrop)
    views: tuple[Any, ...] = ()
    text_views: tuple[Any, ...] = ()
    resize: Resize = field(default_factory=Resize)
    readers: int = setting(1, least=1)
    prefetch_shards: int = setting(8, least=0, most=10_000)
    workers: int = setting(1, least=0, most=1024)
    max_bad_fraction: float = setting(0.01, least=0, most=1)
    max_pixels: int = setting(64_000_000, least=1)

    @property
    def together(self) -> int:
        """Divisor that each micro-batch of a process must have, to keep the related samples of every source together."""
        return math.lcm(*(source.together for source in self.train))

    @property
    def stream(self) -> WebDatasetStream | None:
        """The stream without an index that the run is trained on, or None."""
        return next((source for source in self.train if isinstance(source, WebDatasetStream)), None)


@dataclass(frozen=True)
class Training:
    """Settings of the training loop.

    Args:
        steps: Optimizer steps. None computes them from ``epochs``.
        epochs: Passes over all samples, rounded up to whole steps. None if ``steps`` is set.
        precision: float32, or bfloat16 autocast with losses in float32.
        accumulation: Micro-batches of a step. Contrastive losses take negatives from one micro-batch.
        grad_cache: Contrast against all micro-batches of the step, at the cost of a second forward pass of the towers.
        clip_norm: Largest norm of the gradient, which is scaled down to it. None disables clipping.
        layer_decay: Learning rate of a layer relative to the next one. 1 disables it.
        lr_scales: Parameter-name prefix -> factor on the learning rate.
        frozen: Parameter-name prefixes that are not trained. ``*`` matches anything up to the next dot.
        random_frozen: Whether a whole tower may be frozen at its random start, as a control. Otherwise it is refused.
        ema_decay: Decay of an exponential moving average of the weights, which is evaluated and saved in addition to the
            trained weights. None disables it.
        mixup: Mixup and CutMix of images and their classes: see `vlp.data.mixup`. None disables both.
        backward: "once" runs one backward pass for all losses. "per_loss" runs that of a loss before the forward pass of
            the next one, which needs less memory.
        activation_checkpointing: Activations to recompute in the backward pass instead of storing them: "cheap" for the
            operations between matrix products, "full" for whole blocks. See `vlp.encoders.activation_checkpointing`.
        compile: Whether to run the blocks of the towers through torch.compile.
        profile: Whether to profile five steps, the sixth to the tenth after the start: see `vlp.training.profile`.
        nonfinite: What to do if a loss or the gradient is not finite: "stop" and name the samples, or "skip" the step.
        processes: Number of processes that the launcher must have started. None allows any number.
        engine: Engine that must run. None allows any.
        threads: CPU threads of each process. None follows torch.
        stall_timeout: Seconds after which a process that does not answer, or for which the others wait, ends the run with a
            message that names it. None leaves that to gloo and NCCL, which give up after half an hour.
    """

    steps: int | None = None
    epochs: float | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    accumulation: int = setting(1, least=1)
    grad_cache: bool = False
    clip_norm: float | None = setting(1.0, above=0)
    layer_decay: float = setting(1.0, above=0)
    lr_scales: dict[str, float] = field(default_factory=dict)
    frozen: tuple[str, ...] = ()
    random_frozen: bool = False
    ema_decay: float | None = setting(None, least=0, most=1)
    mixup: Mixup | None = None
    backward: Literal["once", "per_loss"] = "once"
    activation_checkpointing: Checkpointing = "none"
    compile: bool = False
    profile: bool = False
    nonfinite: Literal["stop", "skip"] = "stop"
    processes: int | None = setting(None, least=1)
    engine: Literal["single", "ddp", "deepspeed", "fsdp2"] | None = None
    threads: int | None = setting(None, least=1, most=1024)
    stall_timeout: float | None = setting(600.0, above=0)

    @property
    def backward_passes(self) -> int:
        """Backward passes of a step: one per micro-batch, or one for all of them with ``grad_cache``."""
        return 1 if self.grad_cache else self.accumulation


@dataclass(frozen=True)
class Saving:
    """Checkpoints.

    Args:
        every: Steps between checkpoints. The last step is always saved.
        keep: Number of newest checkpoints to keep in addition to the best one.
        best: ``task/metric`` that selects the best checkpoint, e.g. ``retrieval/mean_recall``: its highest value, or the
            lowest of a metric such as perplexity. None selects no checkpoint.
        copy_to: URL of a folder, such as ``s3://bucket/runs``, to which each complete checkpoint and the run's records are
            copied in the background: see `vlp.training.store`. A value in an experiment.json is not used: name it again to
            resume. None copies nothing.
    """

    every: int = setting(500, least=1)
    keep: int = setting(2, least=1)
    best: str | None = None
    copy_to: str | None = None


@dataclass(frozen=True)
class Logging:
    """Logs in addition to log.jsonl, which has one line per step.

    Args:
        geometry_every: Steps between measurements of alignment, uniformity and modality gap. 0 disables them.
        tensorboard: Whether to write TensorBoard events (extra ``tensorboard``).
        wandb: Weights & Biases project to log to (extra ``wandb``). None disables it.
        sample_keys: Whether to write the sample keys of every step, in one file for each process, to debug the data.
        chance_steps: Steps in a row after which a loss that stays at the level of a model that has learned nothing is reported:
            see `vlp.training.chance`. 0 reports none.
    """

    geometry_every: int = setting(10, least=0)
    tensorboard: bool = False
    wandb: str | None = None
    sample_keys: bool = False
    chance_steps: int = setting(500, least=0)


@dataclass(frozen=True)
class Experiment:
    """Everything that defines a run.

    Args:
        name: Name of the run folder in ``output``.
        model: Model spec, e.g. `vlp.models.dual.Dual`.
        objectives: Name -> objective. The total loss is the sum of weight * loss.
        data: Sources of samples and their preprocessing.
        optim: Optimizer settings: see `vlp.optim.optimizers`.
        schedule: Learning-rate schedule.
        train: Settings of the training loop.
        momentum: Momentum encoder, for objectives that need one. None disables it.
        evaluate: Name -> task, evaluated every ``evaluate_every`` steps and at the end.
        evaluate_every: Steps between evaluations. 0 evaluates only at the end.
        save: Checkpoints.
        log: Logs in addition to log.jsonl.
        seed: Seed of all random numbers.
        output: Folder in which the run folder is created.
    """

    name: str
    model: ModelSpec
    objectives: dict[str, Any]
    data: Data
    optim: Any = field(default_factory=AdamW)
    schedule: Schedule = field(default_factory=Schedule)
    train: Training = field(default_factory=Training)
    momentum: MomentumConfig | None = None
    evaluate: dict[str, Any] = field(default_factory=dict)
    evaluate_every: int = setting(0, least=0)
    save: Saving = field(default_factory=Saving)
    log: Logging = field(default_factory=Logging)
    seed: int = setting(0, least=0)
    output: str = "runs"

    @property
    def measures(self) -> list[str]:
        """Return the names of the measures of the objectives in the log, ``OBJECTIVE/MEASURE``."""
        return [f"{name}/{measure}" for name, each in self.objectives.items() for measure in each.measures]

    @property
    def micro_batch_size(self) -> int:
        """Samples of a micro-batch over all processes."""
        return self.data.batch_size // self.train.accumulation

    def build_model(self, load_weights: bool = True) -> Model:
        """Build the model with the heads that the objectives ask for.

        Raises:
            UserError: If it cannot be built, or does not fit into memory.
        """
        try:
            model = self.model.build(load_weights)
            for objective in self.objectives.values():
                model.add_heads(objective.heads())
        except (RuntimeError, MemoryError) as e:
            if isinstance(e, MemoryError) or "allocate" in str(e):
                raise UserError(
                    f"the model does not fit into memory; lower its sizes ({' '.join(str(e).split())[:200]})"
                ) from e
            raise
        return model

    @property
    def folder(self) -> Path:
        return local_path(Path(self.output) / self.name)

    def resolved(self) -> Experiment:
        """Return the experiment with every value that weights and annotations determine filled in: sizes, classes, ..."""
        train = tuple(s.resolved() if isinstance(s, Annotated) else s for s in self.data.train)
        return replace(self, model=self.model.resolved(), data=replace(self.data, train=train))


# Keys that may change when a run is resumed. No loss depends on them.
FREE_ON_RESUME = (
    "name",
    "output",
    "data.workers",
    "data.prefetch_shards",
    "data.train.0.inexact_resume",
    "train.processes",
    "train.engine",
    "train.threads",
    "train.stall_timeout",
    "train.profile",
    "save",
    "log",
)


# Keys that may also change by --resume RUN key=value, because `vlp.training.setup` then checks the new values: locations of
# data that have moved, and the length of a run that is trained further.
CHECKED_ON_RESUME = re.compile(
    r"data\.train\.\d+\.(shards|path|images|urls)|data\.val|evaluate\.[^.]+\.data|train\.(steps|epochs)"
)


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
    if config.endswith(".json") and local_path(config).is_file():
        return load_json(local_path(config), own_types)
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
    """Return the dotted keys in which two experiments differ, except for those in `FREE_ON_RESUME`."""
    a, b = flatten(to_plain(old)), flatten(to_plain(new))
    keys = [k for k in {**a, **b} if a.get(k) != b.get(k)]
    return [k for k in keys if not any(k == free or k.startswith(free + ".") for free in FREE_ON_RESUME)]
