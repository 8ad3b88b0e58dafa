"""Numbers for tables: recalls from embeddings in bounded memory, rank correlation, and bootstrap intervals."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Interval:
    """A number with its 95 % bootstrap interval.

    Args:
        percent: whether it is a fraction, to be shown as a percentage; others (a distance, a correlation) are shown as
            they are.
    """

    value: float
    low: float
    high: float
    percent: bool = True

    def texts(self, digits: int = 1) -> tuple[str, str, str]:
        """Value, low and high for a reader, with ``digits`` after the point of the percentage, two more of a number."""
        return tuple(
            f"{x:.{digits}%}" if self.percent else f"{x:.{digits + 2}f}" for x in (self.value, self.low, self.high)
        )

    def __str__(self) -> str:
        return self.texts()[0]


def ranks(queries: Tensor, keys: Tensor, query_ids: Tensor, key_ids: Tensor, chunk: int = 256) -> Tensor:
    """Rank of the best-placed positive of each query: 0 = first.

    A negative that ties with it counts as ahead of it, so that equal embeddings earn nothing.

    Args:
        queries: (n, E).
        keys: (m, E).
        query_ids: (n,); a key is a positive of the queries with an equal id.
        key_ids: (m,).
        chunk: queries compared at a time; chunk * m scores are held.

    Returns:
        (n,) int64.

    Raises:
        ValueError: if a query has no positive, naming the first.
    """
    found = []
    for start in range(0, len(queries), chunk):
        scores = queries[start : start + chunk] @ keys.T
        positive = query_ids[start : start + chunk, None] == key_ids
        if not positive.any(1).all():
            raise ValueError(f"query {start + int((~positive.any(1)).nonzero()[0])} has no positive among the keys")
        best = scores.masked_fill(~positive, -torch.inf).amax(1, keepdim=True)
        found.append(((scores >= best) & ~positive).sum(1))
    return torch.cat(found)


def top(queries: Tensor, keys: Tensor, k: int) -> Tensor:
    """(n, k) numbers of the k most similar keys of each query, the best first."""
    return (queries @ keys.T).topk(min(k, len(keys)), dim=1).indices


def bootstrap(values: np.ndarray, groups: np.ndarray, seed: int, resamples: int = 1000) -> Interval:
    """Mean of ``values`` with a percentile interval over resampled groups.

    Args:
        values: (n,) one a query.
        groups: (n,) queries of one group (captions of one picture) are drawn together, since they are not independent.
        resamples: drawn with replacement; 0 = no interval.
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
    """``value`` with the interval that holds 95 % of the (resamples,) values found on resampled data; of none, no width."""
    low, high = np.quantile(resampled, [0.025, 0.975]) if len(resampled) else (value, value)
    return Interval(value, float(low), float(high), percent)


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's rank correlation; equal values have the mean of their ranks. 0 where a side is constant.

    Args:
        x: (n,).
        y: (n,).

    Raises:
        ValueError: if the shapes differ, there are fewer than two pairs, or a value is not finite, naming the pair.
    """
    return _rank_correlation(*_levels(x, y), np.ones(len(x)))


def resampled_spearman(x: np.ndarray, y: np.ndarray, seed: int, resamples: int) -> np.ndarray:
    """(resamples,) `spearman` of pairs drawn with replacement. Sorts once: a pair drawn twice is one of weight 2."""
    levels, n = _levels(x, y), len(x)
    rng = np.random.default_rng(seed)
    drawn = (np.bincount(rng.integers(n, size=n), minlength=n) for _ in range(resamples))
    return np.array([_rank_correlation(*levels, counts) for counts in drawn])


def _levels(*sides: np.ndarray) -> list[np.ndarray]:
    """Values -> their places among the distinct values of their side."""
    sides = [np.asarray(side, dtype=np.float64) for side in sides]
    if len({side.shape for side in sides}) > 1 or sides[0].ndim != 1 or len(sides[0]) < 2:
        raise ValueError(f"two or more pairs are needed, got {' and '.join(str(side.shape) for side in sides)}")
    bad = ~np.isfinite(sides).all(0)
    if bad.any():
        raise ValueError(f"pair {bad.argmax()} is not finite")
    return [np.unique(side, return_inverse=True)[1] for side in sides]


def _rank_correlation(x: np.ndarray, y: np.ndarray, counts: np.ndarray) -> float:
    """Pearson's correlation of the mean ranks of (n,) levels, pair i being there ``counts[i]`` times."""
    centred = []
    for levels in (x, y):
        size = np.bincount(levels, weights=counts)
        ranks = (size.cumsum() - size / 2)[levels]  # half a rank below the mean rank, all of them
        centred.append(ranks - (counts * ranks).sum() / counts.sum())
    a, b = centred
    spread = np.sqrt((counts * a * a).sum() * (counts * b * b).sum())
    return float((counts * a * b).sum() / spread) if spread > 0 else 0.0
