"""Classification by the features of a frozen image tower: nearest neighbours, and a linear classifier.

n train images, m test images, D width of the features, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vlp.config import Data
from vlp.data.reading.labelled import FORMS, LabelledImages, read_train_and_test
from vlp.errors import UserError
from vlp.files import local_path
from vlp.specs.fields import setting
from vlp.tasks.base import EvalModel, Result, Task
from vlp.tasks.details import confusions
from vlp.tasks.features import Features, LabelledFeatures, encode_labelled, select_features
from vlp.tasks.metrics import topk, topk_accuracy
from vlp.tasks.requirements import need_features


@dataclass(frozen=True)
class _FeatureClassifier(Task):
    """Accuracy on one split of a folder of images, by a classifier made from the features of another split.

    Metrics are ``top1``, and ``top5`` where there are more than five classes.

    Args:
        data: Folder with a labels.jsonl (image, label, name, split), or with TRAIN_SPLIT/CLASS/ and SPLIT/CLASS/ folders.
        train_split: Split whose labels the classifier learns from.
        split: Split that is classified.
        features: "pooled", the output of the tower, or "embed", the output of the head that the loss reads.
        batch_size: Images encoded at a time.
        resamples: Bootstrap resamples, over test images.
    """

    headline = "top1"

    data: str = ""
    train_split: str = "train"
    split: str = "val"
    features: Features = "pooled"
    batch_size: int = setting(64, least=1, changes_result=False)
    resamples: int = setting(1000, least=0, changes_result=False)

    def metric_names(self) -> tuple[str, ...]:
        return ("top1", "top5")

    def validate(self, data: Data) -> None:
        self._read()

    def evaluated_images(self, data: Data) -> list[Path]:
        return [image for image, _ in self._read()[1] if isinstance(image, Path)]

    def _read(self) -> tuple[LabelledImages, LabelledImages, list[str]]:
        if not self.data:
            raise UserError(f"{self.name} has no images to classify; give data=FOLDER with {FORMS}")
        return read_train_and_test(local_path(self.data), self.train_split, self.split)

    def evaluate(self, model: EvalModel) -> Result:
        train_images, test_images, classes = self._read()
        need_features(model, self.name, "image")

        def encode(image: Tensor) -> Tensor:
            return select_features(model.model.encode_image(image), self.features)

        train = encode_labelled(model, train_images, encode, self.batch_size)
        test = encode_labelled(model, test_images, encode, self.batch_size)
        scores, protocol, details = self._classify(train, test.features, len(classes), model.seed)  # (m, C)
        return Result(
            protocol=f"{protocol}; {self.features} features, {self.train_split} -> {self.split}",
            data=self.data,
            split=self.split,
            n={"images": len(test.labels), "train images": len(train.labels), "classes": len(classes)},
            metrics=topk_accuracy(scores, test.labels, model.seed, self.resamples),
            details={"classes": classes, "confused": confusions(test.labels, scores.argmax(1), classes)} | details,
            bad=train.bad + test.bad,
            choices=len(classes),
        )

    def _classify(self, train: LabelledFeatures, test: Tensor, classes: int, seed: int) -> tuple[Tensor, str, dict]:
        """Return (m, C) scores, the protocol and entries of the result's details."""
        raise NotImplementedError


@dataclass(frozen=True)
class Knn(_FeatureClassifier):
    """Classify an image by the votes of its nearest train images (Wu et al. 2018, sec. 3.4, and MoCo's practice).

    ``score of class c = sum over the k nearest of class c of exp(cosine / temperature)``

    Args:
        k: Number of neighbours, all train images where there are fewer.
        temperature: Divides the cosine similarities of the votes.
    """

    name = "knn"

    k: int = setting(200, least=1)
    temperature: float = 0.1

    def validate(self, data: Data) -> None:
        if self.temperature <= 0:
            raise UserError(f"kNN with temperature={self.temperature}; it must be above 0")
        super().validate(data)

    def _classify(self, train: LabelledFeatures, test: Tensor, classes: int, seed: int) -> tuple[Tensor, str, dict]:
        k = min(self.k, len(train.labels))
        scores = knn_scores(train.features, train.labels, test, classes, k, self.temperature)
        return scores, f"kNN, k={k} by cosine similarity, weights exp(cosine / {self.temperature:g})", {}


@dataclass(frozen=True)
class LinearProbe(_FeatureClassifier):
    """Classify images by multinomial logistic regression on standardised features, which must fit in memory in float64.

    The classifier minimises ``mean cross-entropy + l2 / 2 ||W||^2``, with a free bias, to convergence. The result therefore
    does not depend on a learning rate or schedule. Only the train split decides on ``l2``.

    Args:
        l2: Strengths to choose from by accuracy in cross-validation. The strongest wins a tie.
        folds: Folds of the cross-validation.
        steps: Steps of L-BFGS at most.
    """

    name = "probe"

    l2: tuple[float, ...] = (1e-3, 1e-2, 1e-1, 1.0)
    folds: int = 5
    steps: int = 200

    def validate(self, data: Data) -> None:
        if not self.l2 or min(self.l2) <= 0 or self.folds < 2 or self.steps < 1:
            raise UserError(
                f"a probe with l2={self.l2}, folds={self.folds}, steps={self.steps}; give strengths above 0, two or more "
                f"folds, and at least one step"
            )
        super().validate(data)

    def _classify(self, train: LabelledFeatures, test: Tensor, classes: int, seed: int) -> tuple[Tensor, str, dict]:
        strengths = sorted(self.l2, reverse=True)
        x, labels = train.features.double(), train.labels
        accuracy = cross_validate(x, labels, classes, strengths, self.folds, self.steps, seed)
        best = strengths[int(np.argmax(accuracy))]
        weight, bias = fit_logistic(x, labels, classes, [best], self.steps)[0]
        protocol = (
            f"logistic regression to convergence on standardised features, l2 by {self.folds}-fold cross-validation"
        )
        details = {"l2": best, "cross_validation": {f"{l2:g}": a for l2, a in zip(strengths, accuracy)}}
        return test.double() @ weight + bias, protocol, details


def knn_scores(train: Tensor, labels: Tensor, test: Tensor, classes: int, k: int, temperature: float) -> Tensor:
    """Return (m, C) votes, in units of the nearest neighbour's vote.

    Args:
        train: (n, D).
        labels: (n,) int64.
        test: (m, D).
        k: Neighbours, at most n.
    """
    cosine, nearest = topk(F.normalize(test, dim=1), F.normalize(train, dim=1), k)  # (m, k)
    votes = ((cosine - cosine[:, :1]) / temperature).exp()  # relative, since small temperatures overflow
    return torch.zeros(len(test), classes).scatter_add_(1, labels[nearest], votes)


def fit_logistic(
    x: Tensor, labels: Tensor, classes: int, strengths: list[float], steps: int
) -> list[tuple[Tensor, Tensor]]:
    """Fit a logistic regression for each strength of the L2 penalty.

    Features are standardised for the fit. The returned classifiers apply to the features as given.

    Args:
        x: (n, D) float64.
        labels: (n,) int64.
        strengths: Strengths, the strongest first: each fit starts from the solution of the one before.
        steps: Steps of L-BFGS at most.

    Returns:
        (D, C) weight and (C,) bias for each strength.
    """
    mean, std = x.mean(0), x.std(0, correction=0)
    # a feature that is constant within the float32 precision of the tower carries no information
    constant = std <= 4 * torch.finfo(torch.float32).eps * x.abs().amax(0)
    std = std.masked_fill(constant, 1.0)
    x = ((x - mean) / std).masked_fill(constant, 0.0)
    weight, bias = (torch.zeros(shape, dtype=x.dtype, requires_grad=True) for shape in ((x.shape[1], classes), classes))
    fitted = []
    for l2 in strengths:
        optimizer = torch.optim.LBFGS(
            [weight, bias], max_iter=steps, tolerance_grad=1e-5, tolerance_change=1e-12, line_search_fn="strong_wolfe"
        )

        def loss() -> Tensor:  # LBFGS enables gradients
            optimizer.zero_grad()  # noqa: B023 - called within the iteration
            value = F.cross_entropy(x @ weight + bias, labels) + l2 / 2 * weight.square().sum()  # noqa: B023
            value.backward()
            return value

        optimizer.step(loss)
        raw = weight.detach() / std[:, None]
        fitted.append((raw, bias.detach() - mean @ raw))
    return fitted


def cross_validate(
    x: Tensor, labels: Tensor, classes: int, strengths: list[float], folds: int, steps: int, seed: int
) -> list[float]:
    """Return the accuracy of each strength on held-out folds, which are stratified by class."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    order = order[labels[order].argsort(stable=True)]
    fold = torch.empty_like(order)
    fold[order] = torch.arange(len(x)) % folds
    correct = np.zeros(len(strengths))
    for number in fold.unique():
        held_out = fold == number
        fitted = fit_logistic(x[~held_out], labels[~held_out], classes, strengths, steps)
        for i, (weight, bias) in enumerate(fitted):
            correct[i] += int(((x[held_out] @ weight + bias).argmax(1) == labels[held_out]).sum())
    return (correct / len(x)).tolist()
