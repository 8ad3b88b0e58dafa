"""Further views of a text, made from its token ids: each is called as ``view(row, rng, vocabulary)`` and returns a row.

A row begins with ``[CLS]`` and may end with ``[SEP]``; neither moves. Every draw comes from ``rng``, which is seeded by
(seed, epoch, sample): the views of an epoch are not those of the next.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from vlp.types import Vocabulary


@dataclass(frozen=True)
class Same:
    """The text itself: with dropout in the tower it is another view (SimCSE, Gao et al. 2021, sec. 3)."""

    def __call__(self, row: list[int], rng: np.random.Generator, vocabulary: Vocabulary) -> list[int]:
        return row


@dataclass(frozen=True)
class Repetition:
    """Some tokens, or words, said twice (ESimCSE, Wu et al. 2022, sec. 3.2).

    Of N, ``dup_len`` in [0, max(2, int(rate * N))] distinct ones are drawn, all lengths alike, at most N. The published
    code excludes the upper end, caps it at 10, and draws once for all epochs; here it is the paper's, drawn every epoch.

    Args:
        rate: dup_rate; 0.32 for BERT-base.
        of: "token" = pieces, as in the paper's best runs; "word" = a word with all its pieces.
    """

    rate: float = 0.32
    of: Literal["token", "word"] = "token"

    def __call__(self, row: list[int], rng: np.random.Generator, vocabulary: Vocabulary) -> list[int]:
        special, continues = vocabulary.special.numpy(), vocabulary.continues.numpy()
        units: list[list[int]] = []
        for token in row:
            if self.of == "word" and units and continues[token] and not special[token]:
                units[-1].append(token)
            else:
                units.append([token])
        candidates = [n for n, unit in enumerate(units) if not special[unit[0]]]
        if not candidates:
            return row
        most = min(len(candidates), max(2, int(self.rate * len(candidates))))
        twice = set(rng.choice(candidates, size=rng.integers(most + 1), replace=False).tolist())
        return [token for n, unit in enumerate(units) for token in unit * (2 if n in twice else 1)]
