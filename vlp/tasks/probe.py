"""What a frozen image tower's features know of classes: nearest neighbours, and a linear classifier.

n train pictures, m test pictures, D width of the features, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vlp.config import Data
from vlp.data.reading.labelled import FORMS, LabelledImageDataset, LabelledImages, read_train_and_test
from vlp.data.stream import evaluation_batches
from vlp.distributed import gather_objects, world_size
from vlp.errors import UserError
from vlp.specs.fields import setting
from vlp.tasks.base import EvalModel, Result, Task, evaluating
from vlp.tasks.embeddings import merge
from vlp.tasks.metrics import bootstrap
from vlp.tasks.mistakes import confused
from vlp.tasks.requirements import need_alone
from vlp.types import Encoded

Features = Literal["pooled", "embed"]


@dataclass(frozen=True)
class _Classes(Task):
    """Accuracy on one split of a folder of pictures, of a classifier that is made from the features of the other.

    Args:
        data: a folder with a labels.jsonl (image, label, name, split), or with TRAIN_SPLIT/CLASS/ and SPLIT/CLASS/ folders.
        train_split: whose features and labels are known.
        split: what is classified.
        features: "pooled", the tower's own output, or "embed", what the head makes of it for the loss.
        batch_size: pictures encoded at a time.
        resamples: of the bootstrap, over test pictures.
    """

    headline = "top1"

    data: str = ""
    train_split: str = "train"
    split: str = "val"
    features: Features = "pooled"
    batch_size: int = setting(64, least=1, changes_result=False)
    resamples: int = setting(1000, least=0, changes_result=False)

    def validate(self, data: Data) -> None:
        """Raises UserError where there are no two splits of the same classes."""
        self._read()

    def evaluated_images(self, data: Data) -> list[Path]:
        """Those of the test pictures that are files of their own, see `vlp.tasks.contamination`."""
        return [picture for picture, _ in self._read()[1] if isinstance(picture, Path)]

    def _read(self) -> tuple[LabelledImages, LabelledImages, list[str]]:
        if not self.data:
            raise UserError(f"there are no pictures to classify: give data=FOLDER with {FORMS}")
        return read_train_and_test(Path(self.data), self.train_split, self.split)

    def evaluate(self, subject: EvalModel) -> Result:
        """Metrics: ``top1``, and ``top5`` where there are more than five classes."""
        train, test, classes = self._read()
        need_alone(subject, self.name, "image")
        known = encode_pictures(subject, train, self.features, self.batch_size)
        asked = encode_pictures(subject, test, self.features, self.batch_size)
        scores, protocol, details = self._classify(known, asked.features, len(classes), subject.seed)
        # as in retrieval, a class that ties with the true one counts as ahead of it
        rank = (scores >= scores.gather(1, asked.labels[:, None])).sum(1) - 1
        metrics = {
            f"top{k}": bootstrap((rank < k).double().numpy(), np.arange(len(rank)), subject.seed, self.resamples)
            for k in (1, 5)
            if k < len(classes)
        }
        return Result(
            protocol=f"{protocol}; {self.features} features, {self.train_split} -> {self.split}",
            data=self.data,
            n={"images": len(rank), "train images": len(known.labels), "classes": len(classes)},
            metrics=metrics,
            details={"classes": classes, "confused": confused(asked.labels, scores.argmax(1), classes)} | details,
            bad=known.bad + asked.bad,
        )


@dataclass(frozen=True)
class Knn(_Classes):
    """The classes of the nearest train pictures vote (Wu et al. 2018, sec. 3.4; MoCo's practice).

    ``score of c = sum over the k nearest of class c of exp(cosine / temperature)``

    Args:
        k: Number of neighbours, all train images where there are fewer.
        temperature: Divides the cosine similarities of the votes.
    """

    name = "knn"

    k: int = setting(200, least=1)
    temperature: float = 0.1

    def validate(self, data: Data) -> None:
        """Raises UserError as the base class, and where no neighbour could vote."""
        if self.temperature <= 0:
            raise UserError(f"kNN with temperature={self.temperature}; it must be above 0")
        super().validate(data)

    def _classify(self, known: EncodedPictures, asked: Tensor, classes: int, seed: int) -> tuple[Tensor, str, dict]:
        k = min(self.k, len(known.labels))
        scores = knn_scores(known.features, known.labels, asked, classes, k, self.temperature)
        return scores, f"kNN, k={k} by cosine similarity, weights exp(cosine / {self.temperature:g})", {}


@dataclass(frozen=True)
class LinearProbe(_Classes):
    """Multinomial logistic regression on standardised features, for sets whose features fit in memory in float64.

    It minimises ``mean cross-entropy + l2 / 2 ||W||^2`` (the bias is free) to convergence, so that no learning rate or
    schedule has a part in the number. Nothing but the train split decides on ``l2``.

    Args:
        l2: strengths to choose from, by accuracy in cross-validation; of equal ones the strongest.
        folds: of the cross-validation.
        steps: of L-BFGS at most.
    """

    name = "probe"

    l2: tuple[float, ...] = (1e-3, 1e-2, 1e-1, 1.0)
    folds: int = 5
    steps: int = 200

    def validate(self, data: Data) -> None:
        """Raises UserError as the base class, and where there is nothing to choose from."""
        if not self.l2 or min(self.l2) <= 0 or self.folds < 2 or self.steps < 1:
            raise UserError(
                f"a probe with l2={self.l2}, folds={self.folds}, steps={self.steps}; give strengths above 0, two or more "
                f"folds, and at least one step"
            )
        super().validate(data)

    def _classify(self, known: EncodedPictures, asked: Tensor, classes: int, seed: int) -> tuple[Tensor, str, dict]:
        strengths = sorted(self.l2, reverse=True)
        x, labels = known.features.double(), known.labels
        accuracy = cross_validate(x, labels, classes, strengths, self.folds, self.steps, seed)
        best = strengths[int(np.argmax(accuracy))]
        weight, bias = fit_logistic(x, labels, classes, [best], self.steps)[0]
        protocol = (
            f"logistic regression to convergence on standardised features, l2 by {self.folds}-fold cross-validation"
        )
        details = {"l2": best, "cross_validation": {f"{l2:g}": a for l2, a in zip(strengths, accuracy)}}
        return asked.double() @ weight + bias, protocol, details


@dataclass
class EncodedPictures:
    """What could be encoded, in the order of the pictures, on the CPU.

    Args:
        features: (n, D) float32.
        labels: (n,) int64.
        bad: pictures left out.
    """

    features: Tensor
    labels: Tensor
    bad: list[dict]


def encode_pictures(
    subject: EvalModel, pictures: LabelledImages, features: Features | Callable[[Tensor], Tensor], batch_size: int
) -> EncodedPictures:
    """The same for any number of processes, which share the batches out.

    Args:
        features: of the image tower, or (B, 3, H, W) normalised to (B, D) float32 on the CPU.

    Raises:
        UserError: if there is no image tower, no picture can be decoded, or the model's answer to one is not finite.
    """
    preprocess = getattr(subject, "preprocess", None)
    if preprocess is None:
        raise UserError("pictures cannot be classified: this run has no image tower; evaluate it with sts")
    dataset = LabelledImageDataset(pictures, subject.data.resize, subject.data.max_pixels, preprocess)
    own, bad = [], []

    def of_tower(image: Tensor) -> Tensor:
        return chosen(subject.model.encode_image(image), features)

    encode = features if callable(features) else of_tower
    with evaluating(subject.model):
        for numbers, pixels, unusable in evaluation_batches(
            dataset, batch_size, subject.data.workers, subject.rank, world_size()
        ):
            bad += unusable
            if numbers:
                image = preprocess.normalise(torch.stack(pixels).to(subject.device))
                own.append((numbers, encode(image)))
    bad = [b for part in gather_objects(bad) for b in part]
    rows = gather_rows(len(pictures), own)
    left = sorted(set(range(len(pictures))) - {b["number"] for b in bad})
    if not left:
        raise UserError(f"none of the {len(pictures)} pictures can be decoded; the first is {pictures[0][0]}")
    rows, labels = rows[left], torch.tensor([pictures[n][1] for n in left])
    if not (finite := rows.isfinite().all(1)).all():
        path = pictures[left[int(finite.int().argmin())]][0]
        raise UserError(f"the features of {path} are not finite; evaluate an earlier checkpoint")
    return EncodedPictures(rows, labels, bad)


def chosen(encoded: Encoded, features: Features) -> Tensor:
    """(B, D) float32 on the CPU."""
    return (encoded.tokens[:, 0] if features == "pooled" else encoded.embed).float().cpu()


def gather_rows(count: int, own: list[tuple[list[int], Tensor]]) -> Tensor:
    """(count, D) rows on every process, from the (numbers, rows) that each has; 0 where none has one."""
    width = max(gather_objects(max((rows.shape[1] for _, rows in own), default=0)))
    gathered = torch.zeros(count, width)
    for numbers, rows in own:
        gathered[numbers] = rows
    return merge(gathered)


def knn_scores(known: Tensor, labels: Tensor, asked: Tensor, classes: int, k: int, temperature: float) -> Tensor:
    """(m, C) votes, in units of the nearest neighbour's.

    Args:
        known: (n, D).
        labels: (n,) int64.
        asked: (m, D).
        k: at most n.
    """
    known, scores = F.normalize(known, dim=1), []
    for chunk in F.normalize(asked, dim=1).split(256):
        cosine, nearest = (chunk @ known.T).topk(k)
        votes = ((cosine - cosine[:, :1]) / temperature).exp()  # relative, or small temperatures overflow
        scores.append(torch.zeros(len(chunk), classes).scatter_add_(1, labels[nearest], votes))
    return torch.cat(scores)


def fit_logistic(
    x: Tensor, labels: Tensor, classes: int, strengths: list[float], steps: int
) -> list[tuple[Tensor, Tensor]]:
    """((D, C) weight, (C,) bias) of the classifier of ``x`` for each strength of the penalty.

    Features are standardised inside, which the result takes back: it applies to features as they are. One strength starts
    from the answer of the one before, so strong ones come first.

    Args:
        x: (n, D) float64.
        labels: (n,) int64.
        steps: of L-BFGS at most.
    """
    mean, std = x.mean(0), x.std(0, correction=0)
    # a feature that is always the same, as far as the tower's float32 tells, has nothing to say
    constant = std <= 4 * torch.finfo(torch.float32).eps * x.abs().amax(0)
    std = std.masked_fill(constant, 1.0)
    x = ((x - mean) / std).masked_fill(constant, 0.0)
    weight, bias = (torch.zeros(shape, dtype=x.dtype, requires_grad=True) for shape in ((x.shape[1], classes), classes))
    fitted = []
    for l2 in strengths:
        optimizer = torch.optim.LBFGS(
            [weight, bias], max_iter=steps, tolerance_grad=1e-5, tolerance_change=1e-12, line_search_fn="strong_wolfe"
        )

        def loss() -> Tensor:
            optimizer.zero_grad()  # noqa: B023 - called within the turn
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
    """Accuracy of each strength on folds that were held out; every fold has its share of each class."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    order = order[labels[order].argsort(stable=True)]
    fold = torch.empty_like(order)
    fold[order] = torch.arange(len(x)) % folds
    right = np.zeros(len(strengths))
    for number in fold.unique():
        out = fold == number
        for i, (weight, bias) in enumerate(fit_logistic(x[~out], labels[~out], classes, strengths, steps)):
            right[i] += int(((x[out] @ weight + bias).argmax(1) == labels[out]).sum())
    return (right / len(x)).tolist()
