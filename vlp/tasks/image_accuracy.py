"""Accuracy of the model's own classifier on labelled images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vlp.config import Data
from vlp.data.reading.labelled import FORMS, LabelledImages, read_labelled
from vlp.errors import UserError
from vlp.files import local_path
from vlp.forward import Forward
from vlp.specs.fields import setting
from vlp.tasks.base import EvalModel, Result, Task
from vlp.tasks.details import confusions
from vlp.tasks.features import encode_labelled
from vlp.tasks.metrics import topk_accuracy
from vlp.types import Batch


@dataclass(frozen=True)
class ImageAccuracy(Task):
    """Accuracy of the classifier that the image tower was trained with, e.g. by `Classification`.

    Classes are numbered as in the folder: by label of its labels.jsonl, or by name of its folders, from 0. The training must
    have used the same classes. Metrics are ``top1``, and ``top5`` where there are more than five classes.

    Args:
        data: Folder of labelled images, see `vlp.data.reading.labelled`.
        split: Split of the folder. None uses all images.
        batch_size: Images at a time.
        resamples: Bootstrap resamples, over images.
    """

    name = "image-accuracy"
    headline = "top1"

    data: str = ""
    split: str | None = "val"
    batch_size: int = setting(64, least=1, changes_result=False)
    resamples: int = setting(1000, least=0, changes_result=False)

    def metric_names(self) -> tuple[str, ...]:
        return ("top1", "top5")

    def validate(self, data: Data) -> None:
        self._read()

    def evaluated_images(self, data: Data) -> list[Path]:
        return [image for image, _ in self._read()[0] if isinstance(image, Path)]

    def _read(self) -> tuple[LabelledImages, list[str]]:
        if not self.data:
            raise UserError(f"image-accuracy has no images to classify; give data=FOLDER with {FORMS}")
        return read_labelled(local_path(self.data), self.split)

    def evaluate(self, model: EvalModel) -> Result:
        images, names = self._read()
        network = model.model
        if network.num_classes is None or model.preprocess is None:
            raise UserError("image-accuracy needs an image tower with a classifier; train one with model.classes=C")
        if network.num_classes != len(names):
            raise UserError(
                f"{self.data} has {len(names)} classes, the model {network.num_classes}; give the data it was trained on"
            )

        def logits(image: Tensor) -> Tensor:
            return network.classify(Forward(network, Batch(torch.arange(len(image), device=image.device), image)))

        encoded = encode_labelled(model, images, logits, self.batch_size)
        scores, labels = encoded.features, encoded.labels  # (n, C), (n,)
        split = f"; split {self.split}" if self.split else ""
        return Result(
            protocol=f"the classifier's highest score, of {len(names)} classes{split}",
            data=self.data,
            split=self.split or "",
            n={"images": len(labels), "classes": len(names)},
            metrics=topk_accuracy(scores, labels, model.seed, self.resamples),
            details={"classes": names, "confused": confusions(labels, scores.argmax(1), names)},
            bad=encoded.bad,
            choices=len(names),
        )
