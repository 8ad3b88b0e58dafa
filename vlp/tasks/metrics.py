"""Metrics: ranks and accuracies in bounded memory, rank correlation, and bootstrap intervals.

n queries, m keys, C classes, E embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Interval:
    """A metric with its 95 % bootstrap interval.

    Args:
        percent: Whether to show the value as a percentage. False for distances, correlations and other numbers.
    """

    value: float
    low: float
    high: float
    percent: bool = True

    def texts(self, digits: int = 1) -> tuple[str, str, str]:
        """Format value, low and high, with ``digits`` decimals of a percentage, and two more of another number."""
        return tuple(
            f"{x:.{digits}%}" if self.percent else f"{x:.{digits + 2}f}" for x in (self.value, self.low, self.high)
        )

    def __str__(self) -> str:
        return self.texts()[0]


def rank_of_positive(scores: Tensor, positive: Tensor) -> Tensor:
    """Return the rank of each query's best positive, 0 for the first.

    A negative that ties with it counts as ahead of it, so that equal scores earn nothing.

    Args:
        scores: (n, k).
        positive: (n, k) bool.

    Returns:
        (n,) int64, k minus the number of positives at most. Without a positive, the number of negatives.
    """
    best = scores.masked_fill(~positive, -torch.inf).amax(1, keepdim=True)  # (n, 1)
    return ((scores >= best) & ~positive).sum(1)


def ranks(queries: Tensor, keys: Tensor, query_ids: Tensor, key_ids: Tensor, chunk: int = 256) -> Tensor:
    """Return `rank_of_positive` of each query among all keys by dot product.

    Args:
        queries: (n, E).
        keys: (m, E).
        query_ids: (n,). A key with an equal id is a positive.
        key_ids: (m,).
        chunk: Queries compared at a time. Memory is that of chunk * m scores.

    Returns:
        (n,) int64.

    Raises:
        ValueError: if a query has no positive, naming the first.
    """
    found = []
    for start in range(0, len(queries), chunk):
        scores = queries[start : start + chunk] @ keys.T  # (chunk, m)
        positive = query_ids[start : start + chunk, None] == key_ids
        if not positive.any(1).all():
            raise ValueError(f"query {start + int((~positive.any(1)).nonzero()[0])} has no positive among the keys")
        found.append(rank_of_positive(scores, positive))
    return torch.cat(found)


def topk(queries: Tensor, keys: Tensor, k: int, chunk: int = 256) -> tuple[Tensor, Tensor]:
    """Return the k keys of each query with the largest dot products, the best first.

    Args:
        queries: (n, E).
        keys: (m, E).
        chunk: Queries compared at a time. Memory is that of chunk * m scores.

    Returns:
        (n, k) dot products and (n, k) int64 positions of the keys, with k at most m.
    """
    found = [(part @ keys.T).topk(min(k, len(keys)), dim=1) for part in queries.split(chunk)]
    return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])


def topk_accuracy(
    scores: Tensor, labels: Tensor, seed: int, resamples: int, ks: Sequence[int] = (1, 5)
) -> dict[str, Interval]:
    """Return the share of samples whose class is among the k highest scores, as ``top{k}`` for each k below C.

    A class that ties with the true one counts as ahead of it.

    Args:
        scores: (n, C).
        labels: (n,) int64.
        resamples: Bootstrap resamples, over samples.
    """
    rank = rank_of_positive(scores, F.one_hot(labels, scores.shape[1]).bool())
    groups = np.arange(len(rank))
    return {
        f"top{k}": bootstrap((rank < k).double().numpy(), groups, seed, resamples) for k in ks if k < scores.shape[1]
    }


def bootstrap(values: np.ndarray, groups: np.ndarray, seed: int, resamples: int = 1000) -> Interval:
    """Return the mean of ``values`` with a percentile interval over resampled groups.

    Args:
        values: (n,) one for each query.
        groups: (n,) group of each query. Queries of a group, such as captions of an image, are not independent and are drawn
            together.
        resamples: Draws with replacement. 0 gives an interval without width.
    """
    # numbered by first appearance, so that the interval depends on which queries share a group, and not on the ids
    _, first, group = np.unique(groups, return_index=True, return_inverse=True)
    group = np.argsort(np.argsort(first))[group]
    sums, counts = np.bincount(group, weights=values), np.bincount(group)
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    for i in range(resamples):
        drawn = rng.integers(len(sums), size=len(sums))
        means[i] = sums[drawn].sum() / counts[drawn].sum()
    return percentiles(float(values.mean()), means)


def percentiles(value: float, resampled: np.ndarray, percent: bool = True) -> Interval:
    """Return ``value`` with the interval that covers 95 % of the (resamples,) values of resampled data."""
    low, high = np.quantile(resampled, [0.025, 0.975]) if len(resampled) else (value, value)
    return Interval(value, float(low), float(high), percent)


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Return Spearman's rank correlation. Equal values share the mean of their ranks. 0 where a side is constant.

    Args:
        x: (n,).
        y: (n,).

    Raises:
        ValueError: if the shapes differ, there are fewer than two pairs, or a value is not finite, naming the pair.
    """
    return _rank_correlation(*_levels(x, y), np.ones(len(x)))


def resampled_spearman(x: np.ndarray, y: np.ndarray, seed: int, resamples: int) -> np.ndarray:
    """Return (resamples,) `spearman` of pairs drawn with replacement. Sorts once: a pair drawn twice has weight 2."""
    levels, n = _levels(x, y), len(x)
    rng = np.random.default_rng(seed)
    drawn = (np.bincount(rng.integers(n, size=n), minlength=n) for _ in range(resamples))
    return np.array([_rank_correlation(*levels, counts) for counts in drawn])


def _levels(*sides: np.ndarray) -> list[np.ndarray]:
    """Replace each value by its position among the distinct values of its side."""
    sides = [np.asarray(side, dtype=np.float64) for side in sides]
    if len({side.shape for side in sides}) > 1 or sides[0].ndim != 1 or len(sides[0]) < 2:
        raise ValueError(f"two or more pairs are needed, got {' and '.join(str(side.shape) for side in sides)}")
    bad = ~np.isfinite(sides).all(0)
    if bad.any():
        raise ValueError(f"pair {bad.argmax()} is not finite")
    return [np.unique(side, return_inverse=True)[1] for side in sides]


def _rank_correlation(x: np.ndarray, y: np.ndarray, counts: np.ndarray) -> float:
    """Return Pearson's correlation of the mean ranks of (n,) levels, where pair i occurs ``counts[i]`` times."""
    centred = []
    for levels in (x, y):
        size = np.bincount(levels, weights=counts)
        ranks = (size.cumsum() - size / 2)[levels]  # half a rank below the mean rank, which centring removes
        centred.append(ranks - (counts * ranks).sum() / counts.sum())
    a, b = centred
    spread = np.sqrt((counts * a * a).sum() * (counts * b * b).sum())
    return float((counts * a * b).sum() / spread) if spread > 0 else 0.0
