"""Queries of a retrieval with what they found, for the report: some at random, and those whose answer came last.

n pictures, m captions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Best = Callable[[Tensor], Tensor]  # numbers of queries -> (q, 5) numbers of keys, the best first


@dataclass(frozen=True)
class Found:
    """What an evaluation knows of every query.

    Args:
        rows: n numbers of the samples of the pictures.
        captions: m texts.
        picture_of: (m,) number of the picture that a caption belongs to.
        i2t_rank: (n,) rank of the best of a picture's captions, 0 = first.
        t2i_rank: (m,) of a caption's picture.
        i2t_best: the captions that pictures find; t2i_best: the pictures that captions find.
    """

    rows: Sequence[int]
    captions: Sequence[str]
    picture_of: Tensor
    i2t_rank: Tensor
    t2i_rank: Tensor
    i2t_best: Best
    t2i_best: Best

    def examples(self, count: int, seed: int) -> dict[str, list[dict]]:
        """``text_to_image``, ``count`` drawn at random, and ``hardest_``, of which no two captions have the same picture."""
        drawn = np.random.default_rng(seed).permutation(len(self.captions))[:count]
        order = self.t2i_rank.argsort(descending=True, stable=True)
        worst = {
            int(self.picture_of[caption]): int(caption) for caption in order.flip(0)
        }  # a picture's hardest is last
        hardest = sorted(worst.values(), key=lambda caption: -int(self.t2i_rank[caption]))[:count]
        pictures = self.i2t_rank.argsort(descending=True, stable=True)[:count]
        return {
            "text_to_image": self._captions(torch.from_numpy(drawn)),
            "hardest_text_to_image": self._captions(torch.tensor(hardest)),
            "hardest_image_to_text": self._pictures(pictures),
        }

    def _captions(self, queries: Tensor) -> list[dict]:
        """Of each caption: the samples whose pictures it found, its own, and where that came, from 1."""
        return [
            {
                "query": self.captions[query],
                "answer": self.rows[int(self.picture_of[query])],
                "found": [self.rows[picture] for picture in best],
                "rank": int(self.t2i_rank[query]) + 1,
            }
            for query, best in zip(queries.tolist(), self.t2i_best(queries).tolist())
        ]

    def _pictures(self, queries: Tensor) -> list[dict]:
        """Of each picture: its sample, the captions that it found, its own, and where the first of these came, from 1."""
        return [
            {
                "query": self.rows[query],
                "answers": [self.captions[c] for c in (self.picture_of == query).nonzero()[:, 0].tolist()],
                "found": [self.captions[caption] for caption in best],
                "rank": int(self.i2t_rank[query]) + 1,
            }
            for query, best in zip(queries.tolist(), self.i2t_best(queries).tolist())
        ]
