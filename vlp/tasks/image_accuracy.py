"""Pictures with classes: how often is the class that the model's own classifier scores highest the true one?

n pictures, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vlp.config import Data
from vlp.data.reading.labelled import FORMS, LabelledImages, read_labelled
from vlp.errors import UserError
from vlp.forward import Forward
from vlp.specs.fields import setting
from vlp.tasks.base import EvalModel, Result, Task
from vlp.tasks.metrics import bootstrap
from vlp.tasks.mistakes import confused
from vlp.tasks.probe import encode_pictures
from vlp.types import Batch


@dataclass(frozen=True)
class ImageAccuracy(Task):
    """Top-1 and top-5 accuracy of a classifier that was trained with the image tower, such as `Classification` does.

    The classes are numbered as the folder's: by label of its labels.jsonl, or by name of its folders, from 0. So they must
    have been in training.

    Args:
        data: a folder of pictures, see `vlp.data.reading.labelled`.
        split: of it; None = all.
        batch_size: pictures at a time.
        resamples: of the bootstrap, over pictures.
    """

    name = "image-accuracy"
    headline = "top1"

    data: str = ""
    split: str | None = "val"
    batch_size: int = setting(64, least=1, changes_result=False)
    resamples: int = setting(1000, least=0, changes_result=False)

    def validate(self, data: Data) -> None:
        """Raises UserError where there are no pictures."""
        self._read()

    def evaluated_images(self, data: Data) -> list[Path]:
        """Those of the pictures that are files of their own, see `vlp.tasks.contamination`."""
        return [picture for picture, _ in self._read()[0] if isinstance(picture, Path)]

    def _read(self) -> tuple[LabelledImages, list[str]]:
        if not self.data:
            raise UserError(f"there are no pictures to classify: give data=FOLDER with {FORMS}")
        return read_labelled(Path(self.data), self.split)

    def evaluate(self, subject: EvalModel) -> Result:
        """Metrics: ``top1``, and ``top5`` where there are more than five classes."""
        pictures, names = self._read()
        model = subject.model
        if getattr(model, "classifier", None) is None or getattr(model, "preprocess", None) is None:
            raise UserError(
                "accuracy of pictures needs an image tower with a classifier; train one with model.classes=C"
            )

        def logits(image: Tensor) -> Tensor:
            batch = Batch(torch.arange(len(image), device=image.device), image)
            return model.classify(Forward(model, batch)).float().cpu()

        encoded = encode_pictures(subject, pictures, logits, self.batch_size)
        scores, labels = encoded.features, encoded.labels
        if scores.shape[1] != len(names):
            raise UserError(
                f"{self.data} has {len(names)} classes, the model {scores.shape[1]}; give the data it learned"
            )
        # as in retrieval, a class that ties with the true one counts as ahead of it
        rank = (scores >= scores.gather(1, labels[:, None])).sum(1) - 1
        return Result(
            protocol=f"the classifier's highest score, of {len(names)} classes"
            + (f"; split {self.split}" if self.split else ""),
            data=self.data,
            n={"images": len(labels), "classes": len(names)},
            metrics={
                f"top{k}": bootstrap((rank < k).double().numpy(), np.arange(len(rank)), subject.seed, self.resamples)
                for k in (1, 5)
                if k < len(names)
            },
            details={"classes": names, "confused": confused(labels, scores.argmax(1), names)},
            bad=encoded.bad,
        )
