"""Numbers for tables: recalls from embeddings in bounded memory, and bootstrap intervals."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Interval:
    """A number with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


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
    _, group = np.unique(groups, return_inverse=True)
    sums, counts = np.bincount(group, weights=values), np.bincount(group)
    value = float(values.mean())
    if not resamples:
        return Interval(value, value, value)
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    for i in range(resamples):
        drawn = rng.integers(len(sums), size=len(sums))
        means[i] = sums[drawn].sum() / counts[drawn].sum()
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(value, float(low), float(high))
