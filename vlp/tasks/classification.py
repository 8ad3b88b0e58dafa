"""Texts with classes: how often is the class that the model's own classifier scores highest the true one?

n texts, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from vlp.config import Data
from vlp.data.reading.sentences import Sentences
from vlp.distributed import gather_objects, world_size
from vlp.errors import BadSample, UserError
from vlp.specs.fields import setting
from vlp.tasks.base import EvalModel, Result, Task, evaluating
from vlp.tasks.embeddings import merge
from vlp.tasks.metrics import bootstrap


@dataclass(frozen=True)
class TextAccuracy(Task):
    """Accuracy of a text tower with a classifier that was trained with it, such as `vlp.objectives.cutoff.Cutoff` does.

    Args:
        source: the texts, made as those of the training were, with label and classes.
        batch_size: texts at a time.
        resamples: of the bootstrap, over texts.
    """

    name = "accuracy"
    headline = "accuracy"

    source: Sentences
    batch_size: int = setting(128, least=1, changes_result=False)
    resamples: int = setting(1000, least=0, changes_result=False)

    def validate(self, data: Data) -> None:
        """Raises UserError where the file cannot be read, or no text has a label."""
        if not self.source.label:
            raise UserError(f"the texts of {self.source.path} have no labels: set label and classes of the source")
        if not len(self.source.open()):
            raise UserError(f"{self.source.path} holds no text; give other data")

    def evaluate(self, subject: EvalModel) -> Result:
        """Metric: ``accuracy``."""
        if getattr(subject.model, "classifier", None) is None or subject.model.text is None:
            raise UserError("accuracy on texts needs a text tower with a classifier: model=Single(text=..., classes=C)")
        reader = self.source.open()
        right, bad = torch.zeros(len(reader), dtype=torch.int64), []  # 1 wrong, 2 right, 0 left out
        with evaluating(subject.model):
            for start in range(subject.rank * self.batch_size, len(reader), world_size() * self.batch_size):
                samples = []
                for row in range(start, min(start + self.batch_size, len(reader))):
                    try:
                        samples.append(reader.read(0, row))
                    except BadSample as e:
                        bad.append(reader.quarantine_entry(0, row, str(e)))
                if samples:
                    rows = torch.tensor([sample.source_row for sample in samples])
                    right[rows] = 1 + self._right(subject, samples)
        found = merge(right)
        values = (found[found > 0] - 1).double().numpy()
        if not len(values):
            raise UserError(f"no text of {self.source.path} has a class among {', '.join(self.source.classes)}")
        return Result(
            protocol=f"the classifier's highest score, of {len(self.source.classes)} classes",
            data=self.source.path,
            n={"texts": len(values)},
            metrics={"accuracy": bootstrap(values, np.arange(len(values)), subject.seed, self.resamples)},
            bad=[b for part in gather_objects(bad) for b in part],
        )

    def _right(self, subject: EvalModel, samples: list) -> torch.Tensor:
        """(n,) int64, 1 where the classifier is right."""
        ids, mask, _ = subject.tokenizer([sample.captions[0] for sample in samples], subject.data.max_length)
        encoded = subject.model.encode_text(ids.to(subject.device), mask.to(subject.device))
        guess = subject.model.classifier(encoded.tokens[:, 0]).argmax(1).cpu()
        return (guess == torch.tensor([sample.label for sample in samples])).long()
