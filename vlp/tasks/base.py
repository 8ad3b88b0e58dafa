"""The contract of a task: what it is given (`EvalModel`), what it returns (`Result`), and what it declares (`Task`)."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vlp.config import Data
from vlp.data.preprocess import Preprocess
from vlp.errors import UserError
from vlp.files import write_atomically
from vlp.models.base import Model
from vlp.specs.origin import origin
from vlp.tasks.identity import Images, data_id
from vlp.tasks.metrics import Interval
from vlp.tasks.progress import evaluation
from vlp.types import Encoded


@dataclass
class EvalModel:
    """A model under evaluation, with the tokenizer and data settings that belong to its weights.

    Args:
        tokenizer: None for a model without a text tower, and for weights that come without a tokenizer.
        data: Data settings of the run, or of the published weights.
        device: Device of the model.
        seed: Seed of bootstraps and of every other random choice of a task.
        checkpoint: SHA-256 of the weights, or a note where they are not in a file.
        name: Name of the run or of the weights.
        has_training_data: Whether the sources of ``data.train`` are those that the run was trained on. A relative path may
            name other data where the run is evaluated.
        is_blind: Whether samples have the images of other samples, see `vlp.tasks.sharded.ShardedBatches`.
    """

    model: Model
    tokenizer: Any
    data: Data
    device: torch.device
    seed: int = 0
    checkpoint: str = ""
    name: str = ""
    has_training_data: bool = True
    is_blind: bool = False

    @property
    def preprocess(self) -> Preprocess | None:
        """Return the preprocessing of the image tower, or None for a model without one."""
        return self.model.preprocess

    def normalise(self, images: Sequence[Tensor]) -> Tensor:
        """Stack resized (3, H, W) uint8 images, and move and normalise them to (B, 3, H, W) float32."""
        if self.preprocess is None:
            raise UserError("this model has no image tower; evaluate it with a task of texts, such as sts")
        return self.preprocess.normalise(torch.stack(list(images)).to(self.device))

    def encode_images(self, images: Sequence[Tensor]) -> Encoded:
        """Encode resized (3, H, W) uint8 images."""
        return self.model.encode_image(self.normalise(images))

    def tokenize(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return (B, L) int64 token ids and the (B, L) bool mask of texts, truncated to ``data.max_length`` tokens."""
        if self.tokenizer is None:
            raise UserError(
                "there is no tokenizer for texts; give tokenizer=FOLDER, or evaluate images with knn or probe"
            )
        input_ids, attention_mask, _ = self.tokenizer(texts, self.data.max_length)
        return input_ids.to(self.device), attention_mask.to(self.device)

    def encode_texts(self, texts: Sequence[str]) -> Encoded:
        """Encode texts, truncated to ``data.max_length`` tokens."""
        return self.model.encode_text(*self.tokenize(texts))


@dataclass
class Result:
    """Metrics of one evaluation, and the facts that are needed to repeat and to judge them.

    The report draws these entries of ``details``, of any task:

    | entry | drawn as |
    |---|---|
    | `confused` | table of the most frequent confusions, see `vlp.tasks.details.confusions` |
    | `wrong` and `images` | wrong predictions with their images, see `vlp.tasks.details.wrong_predictions` |
    | `text_to_image` | random captions with the images they retrieve, see `vlp.tasks.details.RetrievalRanking` |
    | `hardest_text_to_image`, `hardest_image_to_text` | queries whose own answer was ranked last |

    Args:
        protocol: Exact procedure of the measurement. Only results with the same protocol are compared.
        data: Location of the evaluated samples.
        n: Sample counts by name, e.g. ``{"images": 1000, "captions": 5000}``.
        metrics: Metric name -> value with its interval.
        details: Examples and other findings, as JSON.
        bad: Samples that were skipped, with the reason.
        name: Name of the protocol with its data and weights, e.g. ``flickr30k-test-zero-shot@coco-ft``.
        choices: Number of answers that a random guess chooses from, for the report. None where that has no meaning.
        split: Split of ``data`` that was evaluated, if ``data`` does not say it.
        task: `Task.name`. Filled in by `Task.__call__`, as are the next five.
        headline: `Task.headline`.
        lower_is_better: `Task.lower_is_better`.
        blind: The metrics of the same evaluation with the images of other samples, see `Task.blind`.
        seconds: Duration of the evaluation.
        data_id: Identity of the data, see `vlp.tasks.identity`. Results with different ones are not compared.
        trained_on: Number of evaluated images that the run was trained on, None where it was not counted.
    """

    protocol: str
    data: str
    n: dict[str, int]
    metrics: dict[str, Interval]
    details: dict[str, Any] = field(default_factory=dict)
    bad: list[dict] = field(default_factory=list)
    name: str = ""
    choices: int | None = None
    split: str = ""
    task: str = ""
    headline: str = ""
    lower_is_better: tuple[str, ...] = ()
    blind: dict[str, Interval] = field(default_factory=dict)
    seconds: float = 0.0
    data_id: str = ""
    trained_on: int | None = None

    def write(self, path: Path, model: EvalModel, step: int | None = None) -> None:
        """Write the result as JSON, with the seed, the hash of the weights, their step, the command and the commit."""
        record = asdict(self) | {
            "seed": model.seed,
            "checkpoint_sha256": model.checkpoint,
            "step": step,
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            **origin(),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(record, indent=1).encode())


class Task:
    """Base class of tasks. A task is a dataclass whose fields are its options.

    | member | meaning | default |
    |---|---|---|
    | `evaluate(model)` | Measure the model and return a `Result`. | must be defined |
    | `name` | Name of the task in results and, for tasks in `vlp.tasks`, for `vlp eval RUN NAME`. | the class name |
    | `headline` | The metric that represents the task in reports. | the first metric |
    | `lower_is_better` | Names of the metrics of which smaller values are better. | none |
    | `blind` | Whether to evaluate a second time, with the images of other samples: `Result.blind`. | False |
    | `baselines` | Names of the metrics that do not depend on the images that the model sees. | none |
    | `for_blind()` | The task with the options of the second evaluation. | the same |
    | `plotted` | Names of the metrics that the report plots over the training steps, times 100. | `headline` |
    | `metric_names()` | Names of all metrics, where they do not depend on the data. | None: not known |
    | `validate(data)` | Raise `UserError` for options or inputs that cannot work. | accepts everything |
    | `evaluated_images(data)` | Images to compare with the training images of the run. | None: not compared |

    Fields declared with `vlp.specs.fields.setting` carry their limits, and whether they change the result. The explanations
    of `vlp eval RUN TASK --help` are read from the ``Args`` section of the class docstring.

    ``evaluate`` runs in every process, in evaluation mode and without gradients, and must return the same result in each.
    `vlp.tasks.sharded` divides the work among the processes.
    """

    name: ClassVar[str]
    headline: ClassVar[str] = ""
    lower_is_better: ClassVar[tuple[str, ...]] = ()
    baselines: ClassVar[tuple[str, ...]] = ()
    blind: bool = False

    def __init_subclass__(cls) -> None:
        if "name" not in vars(cls):
            cls.name = cls.__name__

    def __call__(self, model: EvalModel) -> Result:
        """Evaluate ``model``, and complete the result with the facts that all tasks share."""
        began = time.monotonic()
        with evaluating(model.model), evaluation(self.name):
            result = self.evaluate(model)
            blind = self._blind_metrics(model) if self.blind and result.metrics else {}
        seconds = time.monotonic() - began
        return replace(
            result,
            task=self.name,
            headline=self.headline or next(iter(result.metrics), ""),
            lower_is_better=self.lower_is_better,
            blind=blind,
            seconds=seconds,
            data_id=data_id(self.evaluated_images(model.data), result.data, result.split),
        )

    def _blind_metrics(self, model: EvalModel) -> dict[str, Interval]:
        found = self.for_blind().evaluate(replace(model, is_blind=True)).metrics
        return {name: interval for name, interval in found.items() if name not in self.baselines}

    def for_blind(self) -> Task:
        """Return the task with the options of the blind evaluation, which must not write the files of the other one."""
        return self

    def evaluate(self, model: EvalModel) -> Result:
        """Measure the model.

        Raises:
            UserError: if the model cannot do the task, or no sample is usable.
        """
        raise NotImplementedError(f"{type(self).__name__} must define evaluate(model)")

    @property
    def plotted(self) -> tuple[str, ...]:
        return (self.headline,) if self.headline else ()

    def metric_names(self) -> tuple[str, ...] | None:
        """Return the names that ``Result.metrics`` may have, or None if they depend on the data."""
        return None

    def validate(self, data: Data) -> None:
        """Raise UserError for options or inputs that cannot work. Called before the model is built or loaded.

        Args:
            data: Data settings of the run.
        """

    def evaluated_images(self, data: Data) -> Images | None:
        """Return the images that the task evaluates, None to skip the check for contamination."""
        return None


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode without gradients. On exit, restore the mode of each module: frozen ones never train."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
