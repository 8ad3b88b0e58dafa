"""Accuracy of the model's own classifier on labelled texts.

B texts of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from vlp.config import Data
from vlp.data.reading.sentences import SentenceReader, Sentences
from vlp.data.reading.shards import RawSample
from vlp.errors import BadSample, UserError
from vlp.forward import Forward
from vlp.specs.fields import setting
from vlp.tasks.base import EvalModel, Result, Task
from vlp.tasks.metrics import bootstrap
from vlp.tasks.sharded import ShardedBatches
from vlp.types import Batch


@dataclass(frozen=True)
class TextAccuracy(Task):
    """Accuracy of the classifier that the text tower was trained with, e.g. by `vlp.objectives.cutoff.Cutoff`.

    Args:
        source: LabelledImages texts, in the same form as those of the training.
        batch_size: Texts at a time.
        resamples: Bootstrap resamples, over texts.
    """

    name = "accuracy"
    headline = "accuracy"

    source: Sentences
    batch_size: int = setting(128, least=1, changes_result=False)
    resamples: int = setting(1000, least=0, changes_result=False)

    def metric_names(self) -> tuple[str, ...]:
        return ("accuracy",)

    def validate(self, data: Data) -> None:
        if not self.source.label:
            raise UserError(f"the texts of {self.source.path} have no labels; set label and classes of the source")
        if not len(self.source.open()):
            raise UserError(f"{self.source.path} has no text; give other data")

    def evaluate(self, model: EvalModel) -> Result:
        if model.model.num_classes is None or model.model.text is None:
            raise UserError("accuracy on texts needs a text tower with a classifier: model=Single(text=..., classes=C)")
        batches = ShardedBatches(model, LabelledTexts(self.source.open()), self.batch_size)
        rows = []
        for samples in batches:
            rows += zip([sample.source_row for sample in samples], self._correct(model, samples).tolist())
        rows, bad = batches.gather(rows)
        if not rows:
            raise UserError(f"no text of {self.source.path} has a class among {', '.join(self.source.classes)}")
        correct = np.array([hit for _, hit in rows], dtype=np.float64)
        return Result(
            protocol=f"the classifier's highest score, of {len(self.source.classes)} classes",
            data=self.source.path,
            n={"texts": len(correct)},
            metrics={"accuracy": bootstrap(correct, np.arange(len(correct)), model.seed, self.resamples)},
            bad=bad,
        )

    def _correct(self, model: EvalModel, samples: list[RawSample]) -> Tensor:
        """Return (B,) bool, whether the class of each text has the highest logit."""
        input_ids, attention_mask = model.tokenize([sample.captions[0] for sample in samples])
        batch = Batch(torch.arange(len(samples)), input_ids=input_ids, attention_mask=attention_mask)
        guesses = model.model.classify(Forward(model.model, batch)).argmax(1).cpu()
        return guesses == torch.tensor([sample.label for sample in samples])


class LabelledTexts(Dataset):
    """The texts of a reader by position, for `ShardedBatches`."""

    def __init__(self, reader: SentenceReader):
        self.reader = reader

    def __len__(self) -> int:
        return len(self.reader)

    def __getitems__(self, positions: Sequence[int]) -> tuple[list[RawSample], list[dict]]:
        samples, bad = [], []
        for position in positions:
            try:
                samples.append(self.reader.read(0, position))
            except BadSample as e:
                bad.append(self.reader.quarantine_entry(0, position, str(e)))
        return samples, bad
