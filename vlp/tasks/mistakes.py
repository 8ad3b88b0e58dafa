"""What a report shows of what a model has wrong: the lines of annotations, and what is taken for what."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlp.data.reading.annotated import Annotated
from vlp.data.reading.shards import RawSample

SHOWN = 100  # lines
PAIRS = 20  # that are mixed up


def mistakes(source: Annotated, wrong: Sequence[tuple[RawSample, str, str]]) -> dict[str, Any]:
    """``wrong``, the first lines of (line, what was said, what is true), and ``pictures``, where the names of theirs lead to."""
    return {
        "pictures": source.images or str(Path(source.path).parent),
        "wrong": [
            {
                "line": line.key,
                "asked": " ".join(line.captions),
                "said": said,
                "true": true,
                "pictures": [line.meta[field] for field in source.image],
            }
            for line, said, true in wrong[:SHOWN]
        ],
    }


def confused(labels: Tensor, guesses: Tensor, names: Sequence[str], most: int = PAIRS) -> list[dict]:
    """The pairs of classes that are mixed up most often: true, guessed, how many of how many pictures.

    Args:
        labels: (n,) int64.
        guesses: (n,) int64.
    """
    wrong = labels != guesses
    pairs, counts = torch.stack([labels[wrong], guesses[wrong]]).unique(dim=1, return_counts=True)
    of, order = labels.bincount(minlength=len(names)).tolist(), counts.argsort(descending=True, stable=True)[:most]
    return [
        {"true": names[true], "guessed": names[guess], "count": count, "of": of[true]}
        for (true, guess), count in zip(pairs[:, order].T.tolist(), counts[order].tolist())
    ]


def mixed_up(said: Sequence[str], true: Sequence[str]) -> list[dict[str, Any]]:
    """As `confused`, of answers that are no classes."""
    names = list(dict.fromkeys([*true, *said]))
    number = {name: n for n, name in enumerate(names)}
    labels, guesses = (torch.tensor([number[name] for name in each], dtype=torch.int64) for each in (true, said))
    return confused(labels, guesses, names)
