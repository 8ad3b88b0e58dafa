"""Classes of texts about pictures, one or two at a time: visual entailment, NLVR2, statements of a synthetic world.

n lines, P pictures (or pairs of them) at a time, Q lines about these, C classes.
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
from vlp.data.stream import evaluation_batches
from vlp.distributed import gather_objects, world_size
from vlp.errors import BadSample, UserError
from vlp.forward import Forward
from vlp.specs.fields import setting
from vlp.tasks.base import EvalModel, Result, Task, evaluating
from vlp.tasks.metrics import Interval, bootstrap
from vlp.tasks.mistakes import confused, mistakes
from vlp.tasks.requirements import need_reader
from vlp.tasks.submission import check_submission, need_ids, write_submission
from vlp.tasks.text_only import TextOnly
from vlp.types import Batch


@dataclass(frozen=True)
class Classes(Task):
    """How often is the class that the model's classifier scores highest the true one? Each line once.

    Args:
        data: annotations; None = those of the training, of which ``split`` is to be evaluated. Fields are named as there.
        images: folder of pictures, or shards, if not as in training.
        split: lines of ``data``; None = all.
        image: fields of the pictures, for weights that bring no training; NLVR2's are image0, image1. None = as in training.
        label: field of the class, likewise.
        classes: in the order of the classifier, likewise: published are contradiction, neutral, entailment, and False, True.
        by: field of the lines; the accuracy of each of its values is given, too.
        baseline: also what can be told from the text alone, by `vlp.tasks.text_only.TextOnly` on the training's annotations.
        submission: where to write NLVR2's predictions, ``identifier,class`` a line; lines without a class are no part of them.
        batch_size: pictures, or pairs of them, at a time.
        resamples: of the bootstrap, over (first) pictures.
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

    def validate(self, data: Data) -> None:
        """Raises UserError where there are no lines with classes."""
        source = self._source(data)
        if not source.label:
            raise UserError(
                f"the lines of {source.path} have no classes: the training has no Annotated(label=..., classes=...); give "
                f"label=FIELD classes=A,B,..."
            )
        reader = source.open()
        if not len(reader):
            raise UserError(f"{source.path} holds no line; give other data")
        if self.submission:
            check_submission(self.submission)
            need_ids(reader.column("identifier"), "identifier")

    def evaluated_images(self, data: Data) -> AnnotatedReader:
        """The annotations, see `vlp.tasks.contamination`."""
        return self._source(data).open()

    def _source(self, data: Data) -> Annotated:
        source = to_evaluate(data.train, self.data, self.images, self.split)
        given = {name: getattr(self, name) for name in ("image", "label", "classes")}
        return replace(source, **{name: value for name, value in given.items() if value is not None})

    def evaluate(self, subject: EvalModel) -> Result:
        """Metrics: ``accuracy``; ``accuracy_CLASS`` of the lines of a class; ``FIELD_VALUE`` with ``by``; and of the lines'
        texts alone ``text_only``, with the difference to it as ``gain``, and ``majority`` = always the training's most
        frequent class."""
        data = subject.data
        if getattr(subject.model, "classifier", None) is None:
            raise UserError("classification needs a model with a classifier; train one with model.classes=C")
        source = self._source(data)
        if source.text:
            need_reader(subject, "classification", len(source.image))
        reader, names = source.open(), source.class_list()
        dataset = AnnotatedImageDataset(reader, data.resize, subject.preprocess, data.max_pixels)
        own, bad = [], []
        with evaluating(subject.model):
            for pictures, unusable in evaluation_batches(
                dataset, self.batch_size, data.workers, subject.rank, world_size()
            ):
                bad += unusable
                lines = [line for picture in pictures for line in picture.lines]
                if lines:
                    said = best_class(subject, pictures, len(names))
                    own += [(line.source_row, line.image_id, line.label, best) for line, best in zip(lines, said)]
        found = sorted(row for part in gather_objects(own) for row in part)
        bad = [b for part in gather_objects(bad) for b in part]
        if not found:
            raise UserError(
                f"no line of {source.path} has a picture and a class, {len(bad)} were left out, e.g. {bad[0]['reason']}"
            )
        told = Told([reader.annotation(row) for row, *_ in found], *np.array(found)[:, 1:].T, names)
        if self.submission:
            said = [f"{line.meta['identifier']},{names[best]}\n" for line, best in zip(told.lines, told.said)]
            write_submission(self.submission, "".join(said), bad, subject.rank)
        trained = read_training(data, names) if self.baseline else None
        protocol = f"the classifier's highest score, of {len(names)} classes"
        if trained:
            protocol += "; text_only: logistic regression on the words of the training's texts"
        return Result(
            protocol=protocol,
            data=source.described,
            n={"lines": len(found), "pictures": len(set(told.groups.tolist())), "classes": len(names)},
            metrics=self._metrics(told, trained, subject.seed),
            details={"classes": names, "confusion": told.confusion()} | told.mistakes(source),
            bad=bad,
        )

    def _metrics(self, told: Told, trained: tuple[list[str], list[int]] | None, seed: int) -> dict[str, Interval]:
        right, labels = told.said == told.labels, told.labels

        def over_pictures(values: np.ndarray, of: np.ndarray | slice = slice(None)) -> Interval:
            return bootstrap(values[of].astype(float), told.groups[of], seed, self.resamples)

        metrics = {"accuracy": over_pictures(right)}
        metrics |= {
            f"accuracy_{told.names[c]}": over_pictures(right, labels == c) for c in sorted(set(labels.tolist()))
        }
        if self.by:
            values = np.array([str(line.meta.get(self.by)) for line in told.lines])
            metrics |= {f"{self.by}_{v}": over_pictures(right, values == v) for v in sorted(set(values.tolist()))}
        if trained:
            alone = np.array(TextOnly(*trained, len(told.names))(told.texts)) == labels
            metrics |= {"text_only": over_pictures(alone), "gain": over_pictures(right.astype(float) - alone)}
            metrics["majority"] = over_pictures(labels == np.bincount(trained[1]).argmax())
        return metrics


@dataclass(frozen=True)
class Told:
    """Lines in the order of their file, their pictures (as numbers), true classes and those that the model said: n each."""

    lines: list[RawSample]
    groups: np.ndarray
    labels: np.ndarray
    said: np.ndarray
    names: Sequence[str]

    @property
    def texts(self) -> list[str]:
        return [" ".join(line.captions) for line in self.lines]

    def confusion(self) -> list[list[int]]:
        """(C, C) lines by true class and by what was said."""
        counts = np.zeros((len(self.names), len(self.names)), int)
        np.add.at(counts, (self.labels, self.said), 1)
        return counts.tolist()

    def mistakes(self, source: Annotated) -> dict:
        """For the report: the lines where the model is wrong, and the classes that it mixes up."""
        both = zip(self.lines, self.said, self.labels)
        wrong = [(line, self.names[said], self.names[label]) for line, said, label in both if said != label]
        pairs = confused(torch.from_numpy(self.labels), torch.from_numpy(self.said), self.names)
        return mistakes(source, wrong) | {"confused": pairs}


def best_class(subject: EvalModel, pictures: Sequence[AnnotatedImage], classes: int) -> list[int]:
    """For all lines about P pictures; one is encoded once, of a pair both for each line.

    Raises:
        UserError: if the model has another number of classes, or its scores are not finite.
    """
    model, device = subject.model, subject.device
    captions = [line.captions for picture in pictures for line in picture.lines]
    of = torch.tensor([n for n, picture in enumerate(pictures) for _ in picture.lines], device=device)
    ids = mask = None
    if captions[0]:
        ids, mask, _ = subject.tokenizer([caption for caption, *_ in captions], subject.data.max_length)
        ids, mask = ids.to(device), mask.to(device)
    views = [subject.preprocess.normalise(torch.stack(view).to(device)) for view in zip(*(p.images for p in pictures))]
    first, *others = views if len(views) == 1 else [view[of] for view in views]
    batch = Batch(of, first, ids, mask, views=tuple(Batch(of, other) for other in others))
    encoded = (
        {} if others else {"image": model.encode_image(first)[of]}
    )  # an image is encoded once for all of its lines
    logits: Tensor = model.classify(Forward(model, batch, encoded=encoded))
    if logits.shape[1] != classes:
        raise UserError(
            f"the model has {logits.shape[1]} classes and the data {classes}; evaluate it on those of its training"
        )
    if not logits.isfinite().all():
        raise UserError("the model's scores are not finite; choose another checkpoint")
    return logits.argmax(1).tolist()


def read_training(data: Data, names: Sequence[str]) -> tuple[list[str], list[int]] | None:
    """Texts and classes of what a run was trained on; None where that had no such classes."""
    texts, labels = [], []
    for source in data.train:
        if (
            not isinstance(source, Annotated)
            or not (source.label and source.text)
            or source.class_list() != tuple(names)
        ):
            continue
        reader = source.open()
        for row in range(len(reader)):
            try:
                line = reader.annotation(row)
            except BadSample:
                continue
            texts.append(" ".join(line.captions))
            labels.append(line.label)
    return (texts, labels) if texts else None
