"""Classification of texts with one or two images: visual entailment, NLVR2, statements of a synthetic world.

n lines, P images (or pairs of images) of a batch, Q lines about these, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from vlp.config import Data
from vlp.data.by_image import AnnotatedImage, AnnotatedImageDataset
from vlp.data.reading.annotated import Annotated, AnnotatedReader, to_evaluate
from vlp.data.reading.shards import RawSample
from vlp.errors import BadSample, UserError
from vlp.forward import Forward
from vlp.specs.fields import setting
from vlp.tasks.base import EvalModel, Result, Task
from vlp.tasks.details import confusion_matrix, confusions, wrong_predictions
from vlp.tasks.metrics import Interval, bootstrap
from vlp.tasks.requirements import need_images_with_texts
from vlp.tasks.sharded import ShardedBatches
from vlp.tasks.submission import check_submission, need_ids, write_submission
from vlp.tasks.text_only import TextOnly
from vlp.types import Batch


@dataclass(frozen=True)
class PairClassification(Task):
    """Accuracy of the model's classifier on annotated images, each line once.

    Metrics are ``accuracy``; ``accuracy_CLASS`` of the lines of a class; ``FIELD_VALUE`` with ``by``; and for baselines
    ``text_only`` with the difference to it as ``gain``, and ``majority``, which always predicts the most frequent class of the
    training.

    Args:
        data: Annotations. None uses those of the training, with ``split``. Fields are named as there.
        images: Folder of images, or shards, if not the same as in training.
        split: Lines of this split. None uses all lines.
        image: Fields of the images, for weights without a training config. NLVR2 has image0,image1. None uses those of the
            training.
        label: Field of the class. None uses that of the training.
        classes: Classes in the order of the classifier's outputs. None uses those of the training. Published models have
            contradiction,neutral,entailment and False,True.
        by: Field of the lines. The accuracy of each of its values is also reported.
        baseline: Also report a text-only baseline, `vlp.tasks.text_only.TextOnly` on the annotations of the training.
        submission: File for NLVR2's predictions, ``identifier,class`` a line. Lines without a class are skipped.
        batch_size: Images, or pairs of images, at a time.
        resamples: Bootstrap resamples, over (first) images.
        blind: Whether to evaluate a second time with the images of other samples. A metric that is as high without the right
            image says nothing about reading it. Doubles the cost.
    """

    name = "classification"
    headline = "accuracy"

    data: str | None = None
    images: str | None = setting(None, changes_result=False)
    split: str | None = None
    image: tuple[str, ...] | None = setting(None, changes_result=False)
    label: str | None = setting(None, changes_result=False)
    classes: tuple[str, ...] | None = setting(None, changes_result=False)
    by: str | None = None
    baseline: bool = True
    submission: str | None = setting(None, changes_result=False)
    batch_size: int = setting(32, least=1, changes_result=False)
    resamples: int = setting(1000, least=0, changes_result=False)
    blind: bool = setting(True, changes_result=False)

    def validate(self, data: Data) -> None:
        source = self._source(data)
        if not source.label:
            raise UserError(
                f"the lines of {source.path} have no classes: the training has no Annotated(label=..., classes=...); give "
                f"label=FIELD classes=A,B,..."
            )
        reader = source.open()
        if not len(reader):
            raise UserError(f"{source.path} has no line; give other data")
        if self.submission:
            check_submission(self.submission)
            need_ids(reader.column("identifier"), "identifier")

    def evaluated_images(self, data: Data) -> AnnotatedReader:
        return self._source(data).open()

    def _source(self, data: Data) -> Annotated:
        source = to_evaluate(data.train, self.data, self.images, self.split)
        given = {"image": self.image, "label": self.label, "classes": self.classes}
        return replace(source, **{name: value for name, value in given.items() if value is not None})

    def for_blind(self) -> PairClassification:
        return replace(self, submission=None, baseline=False)

    def evaluate(self, model: EvalModel) -> Result:
        if model.model.num_classes is None:
            raise UserError("classification needs a model with a classifier; train one with model.classes=C")
        data, source = model.data, self._source(model.data)
        if source.text:
            need_images_with_texts(model, self.name, len(source.image))
        reader, names = source.open(), source.class_list()
        if model.model.num_classes != len(names):
            raise UserError(
                f"the model has {model.model.num_classes} classes and the data {len(names)}; evaluate it on those of its training"
            )
        dataset = AnnotatedImageDataset(reader, data.resize, model.preprocess, data.max_pixels)
        batches = ShardedBatches(model, dataset, self.batch_size)
        rows = []
        for images in batches:
            lines = [line for image in images for line in image.lines]
            guesses = classify(model, images).argmax(1).tolist()
            rows += [(line.source_row, line.image_id, line.label, guess) for line, guess in zip(lines, guesses)]
        rows, bad = batches.gather(rows)
        if not rows:
            raise UserError(
                f"no line of {source.path} has an image and a class, {len(bad)} were skipped, e.g. {bad[0]['reason']}"
            )
        lines = [reader.annotation(number) for number, *_ in rows]
        predictions = Predictions(lines, *np.array(rows)[:, 1:].T, names)
        if self.submission:
            guessed = zip(lines, predictions.guesses)
            text = "".join(f"{line.meta['identifier']},{names[guess]}\n" for line, guess in guessed)
            write_submission(self.submission, text, bad)
        trained = read_training(data, names) if self.baseline else None
        protocol = f"the classifier's highest score, of {len(names)} classes"
        if trained:
            protocol += "; text_only: logistic regression on the words of the training's texts"
        return Result(
            protocol=protocol,
            data=source.described,
            n={"lines": len(rows), "images": len(set(predictions.groups.tolist())), "classes": len(names)},
            metrics=self._metrics(predictions, trained, model.seed),
            details=predictions.details(source),
            bad=bad,
            choices=len(names),
        )

    def _metrics(
        self, predictions: Predictions, trained: tuple[list[str], list[int]] | None, seed: int
    ) -> dict[str, Interval]:
        correct, labels = predictions.guesses == predictions.labels, predictions.labels

        def mean(values: np.ndarray, subset: np.ndarray | slice = slice(None)) -> Interval:
            return bootstrap(values[subset].astype(float), predictions.groups[subset], seed, self.resamples)

        metrics = {"accuracy": mean(correct)}
        for c in sorted(set(labels.tolist())):
            metrics[f"accuracy_{predictions.names[c]}"] = mean(correct, labels == c)
        if self.by:
            values = np.array([str(line.meta.get(self.by)) for line in predictions.lines])
            metrics |= {f"{self.by}_{v}": mean(correct, values == v) for v in sorted(set(values.tolist()))}
        if trained:
            text_only = np.array(TextOnly(*trained, len(predictions.names))(predictions.texts)) == labels
            metrics |= {"text_only": mean(text_only), "gain": mean(correct.astype(float) - text_only)}
            metrics["majority"] = mean(labels == np.bincount(trained[1]).argmax())
        return metrics


@dataclass(frozen=True)
class Predictions:
    """Lines in the order of their file, with predicted and true classes.

    Args:
        lines: n lines.
        groups: (n,) id of a line's first image.
        labels: (n,) true class.
        guesses: (n,) predicted class.
        names: C classes.
    """

    lines: list[RawSample]
    groups: np.ndarray
    labels: np.ndarray
    guesses: np.ndarray
    names: Sequence[str]

    @property
    def texts(self) -> list[str]:
        return [" ".join(line.captions) for line in self.lines]

    def details(self, source: Annotated) -> dict:
        """Return wrong predictions and confusions for the report."""
        by_line = zip(self.lines, self.guesses, self.labels)
        wrong = [(line, self.names[guess], self.names[label]) for line, guess, label in by_line if guess != label]
        labels, guesses = torch.from_numpy(self.labels), torch.from_numpy(self.guesses)
        found = {"classes": self.names, "confusion": confusion_matrix(labels, guesses, len(self.names))}
        return found | wrong_predictions(source, wrong) | {"confused": confusions(labels, guesses, self.names)}


def classify(model: EvalModel, images: Sequence[AnnotatedImage]) -> Tensor:
    """Classify all lines about P images. An image is encoded once for all its lines, a pair of images for each line.

    Returns:
        (Q, C) logits.

    Raises:
        UserError: if a logit is not finite.
    """
    captions = [line.captions for image in images for line in image.lines]
    image_of = torch.tensor([n for n, image in enumerate(images) for _ in image.lines], device=model.device)  # (Q,)
    ids = mask = None
    if captions[0]:
        ids, mask = model.tokenize([caption for caption, *_ in captions])
    views = [model.normalise(view) for view in zip(*(image.images for image in images))]  # (P, 3, H, W) each
    first, *others = views if len(views) == 1 else [view[image_of] for view in views]
    batch = Batch(image_of, first, ids, mask, views=tuple(Batch(image_of, other) for other in others))
    # An image with one view is encoded once for all its texts.
    encoded = {} if others else {"image": model.model.encode_image(first)[image_of]}
    logits = model.model.classify(Forward(model.model, batch, encoded=encoded))
    if not logits.isfinite().all():
        raise UserError("the model's scores are not finite; choose another checkpoint")
    return logits


def read_training(data: Data, names: Sequence[str]) -> tuple[list[str], list[int]] | None:
    """Return the texts and classes that a run was trained on, None if its annotations have other classes."""
    texts, labels = [], []
    for source in data.train:
        if not isinstance(source, Annotated) or not (source.label and source.text):
            continue
        if source.class_list() != tuple(names):
            continue
        try:
            reader = source.open()
        except UserError:  # the training data have moved
            continue
        for row in range(len(reader)):
            try:
                line = reader.annotation(row)
            except BadSample:
                continue
            texts.append(" ".join(line.captions))
            labels.append(line.label)
    return (texts, labels) if texts else None
