"""Further views of a text, computed from its token ids.

A view is called as ``view(row, rng, vocabulary)`` and returns a row of ids. A row begins with ``[CLS]`` and may end with
``[SEP]``; a view moves neither. Every draw comes from ``rng``, which is seeded by (seed, epoch, sample), so the views of a
sample differ between epochs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from vlp.types import Vocabulary


@dataclass(frozen=True)
class Same:
    """The text itself. Dropout in the tower makes it a different view (SimCSE, Gao et al. 2021, sec. 3)."""

    def __call__(self, row: list[int], rng: np.random.Generator, vocabulary: Vocabulary) -> list[int]:
        return row


@dataclass(frozen=True)
class Repetition:
    """Repetition of some tokens or words (ESimCSE, Wu et al. 2022, sec. 3.2).

    Of N units, ``dup_len`` distinct ones are repeated, ``dup_len`` uniform in [0, max(2, int(rate * N))] and at most N.
    The published code excludes the upper end, limits it to 10, and draws once for all epochs. This is the paper's version,
    drawn in every epoch.

    Args:
        rate: dup_rate of the paper; 0.32 for BERT-base.
        unit: Unit of repetition. "token" repeats pieces, as in the paper's best runs. "word" repeats a word with all its
            pieces.
    """

    rate: float = 0.32
    unit: Literal["token", "word"] = "token"

    def __call__(self, row: list[int], rng: np.random.Generator, vocabulary: Vocabulary) -> list[int]:
        special, continues = vocabulary.special.numpy(), vocabulary.continues.numpy()
        units: list[list[int]] = []
        for token in row:
            if self.unit == "word" and units and continues[token] and not special[token]:
                units[-1].append(token)
            else:
                units.append([token])
        candidates = [n for n, unit in enumerate(units) if not special[unit[0]]]
        if not candidates:
            return row
        most = min(len(candidates), max(2, int(self.rate * len(candidates))))
        twice = set(rng.choice(candidates, size=rng.integers(most + 1), replace=False).tolist())
        return [token for n, unit in enumerate(units) for token in unit * (2 if n in twice else 1)]
