"""Entries of `vlp.tasks.base.Result.details` that the report draws: wrong predictions, confusions, and retrieval examples.

n images or samples, m captions, q queries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlp.data.reading.annotated import Annotated
from vlp.data.reading.shards import RawSample

MAX_WRONG = 100  # wrong predictions that a result keeps
MAX_CONFUSIONS = 20


def wrong_predictions(source: Annotated, wrong: Sequence[tuple[RawSample, str, str]]) -> dict[str, Any]:
    """Describe the first wrong predictions, and the location of their images.

    Args:
        wrong: Line, prediction and truth of each.
    """
    return {
        "images": source.images or str(Path(source.path).parent),
        "wrong": [
            {
                "line": line.key,
                "text": " ".join(line.captions),
                "prediction": prediction,
                "truth": truth,
                "images": [line.meta[field] for field in source.image],
            }
            for line, prediction, truth in wrong[:MAX_WRONG]
        ],
    }


def confusion_matrix(labels: Tensor, guesses: Tensor, classes: int) -> list[list[int]]:
    """Count samples by true class (rows) and predicted class, (C, C).

    Args:
        labels: (n,) int64.
        guesses: (n,) int64.
        classes: C.
    """
    return torch.bincount(labels * classes + guesses, minlength=classes**2).view(classes, -1).tolist()


def confusions(labels: Tensor, guesses: Tensor, names: Sequence[str]) -> list[dict[str, Any]]:
    """Count the pairs of classes that are confused most often.

    Args:
        labels: (n,) int64.
        guesses: (n,) int64.

    Returns:
        True class, guessed class, how often, and samples of the true class, for each pair.
    """
    wrong = labels != guesses
    pairs, counts = torch.stack([labels[wrong], guesses[wrong]]).unique(dim=1, return_counts=True)
    of_class = labels.bincount(minlength=len(names)).tolist()
    order = counts.argsort(descending=True, stable=True)[:MAX_CONFUSIONS]
    return [
        {"true": names[true], "guessed": names[guess], "count": count, "of": of_class[true]}
        for (true, guess), count in zip(pairs[:, order].T.tolist(), counts[order].tolist())
    ]


def answer_confusions(predictions: Sequence[str], truths: Sequence[str]) -> list[dict[str, Any]]:
    """Count `confusions` of free-form answers."""
    names = list(dict.fromkeys([*truths, *predictions]))
    number = {name: n for n, name in enumerate(names)}
    labels, guesses = (
        torch.tensor([number[name] for name in each], dtype=torch.int64) for each in (truths, predictions)
    )
    return confusions(labels, guesses, names)


@dataclass(frozen=True)
class RetrievalRanking:
    """Ranks of the own answers of all queries, and the best answers of any query.

    Args:
        rows: n positions of the images' samples in the source.
        captions: m texts.
        image_of: (m,) int64 position of the image that a caption belongs to.
        i2t_rank: (n,) rank of the best of an image's own captions, 0 for the first.
        t2i_rank: (m,) rank of a caption's own image.
        i2t_best: From (q,) images to the (q, 5) captions they retrieve, the best first.
        t2i_best: From (q,) captions to the (q, 5) images they retrieve.
    """

    rows: Sequence[int]
    captions: Sequence[str]
    image_of: Tensor
    i2t_rank: Tensor
    t2i_rank: Tensor
    i2t_best: Callable[[Tensor], Tensor]
    t2i_best: Callable[[Tensor], Tensor]

    def examples(self, count: int, seed: int) -> dict[str, list[dict]]:
        """Return ``count`` random captions, and the captions and images whose own answer has the lowest rank.

        No two of the hardest captions belong to the same image.
        """
        random = np.random.default_rng(seed).permutation(len(self.captions))[:count]
        order = self.t2i_rank.argsort(descending=True, stable=True)
        # of an image's captions the hardest is assigned last, and stays
        hardest_of = {int(self.image_of[caption]): int(caption) for caption in order.flip(0)}
        hardest = sorted(hardest_of.values(), key=lambda caption: -int(self.t2i_rank[caption]))[:count]
        hardest_images = self.i2t_rank.argsort(descending=True, stable=True)[:count]
        return {
            "text_to_image": self._of_captions(torch.from_numpy(random)),
            "hardest_text_to_image": self._of_captions(torch.tensor(hardest)),
            "hardest_image_to_text": self._of_images(hardest_images),
        }

    def _of_captions(self, queries: Tensor) -> list[dict]:
        return [
            {
                "query": self.captions[query],
                "answer": self.rows[int(self.image_of[query])],
                "found": [self.rows[image] for image in best],
                "rank": int(self.t2i_rank[query]) + 1,
            }
            for query, best in zip(queries.tolist(), self.t2i_best(queries).tolist())
        ]

    def _of_images(self, queries: Tensor) -> list[dict]:
        return [
            {
                "query": self.rows[query],
                "answers": [self.captions[c] for c in (self.image_of == query).nonzero()[:, 0].tolist()],
                "found": [self.captions[caption] for caption in best],
                "rank": int(self.i2t_rank[query]) + 1,
            }
            for query, best in zip(queries.tolist(), self.i2t_best(queries).tolist())
        ]
