"""InfoNCE: softmax cross-entropy of similarity rows against a target distribution over the keys.

One function covers every use. Positives are pairs with equal ids: the image id for captioned images, or ``key_ids =
arange(M)`` and ``query_ids = positive`` where each query has one known key. A queue is appended to ``keys`` with the ids of
its rows. ``allowed`` excludes pairs that must not count (a view with itself, hard-negative candidates). Any other target,
such as the distribution of a teacher, goes to `soft_info_nce`.

B queries, M keys, E embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlp.losses.inputs import check_every_row, check_finite, check_ids, in_float32


@in_float32
def info_nce(
    queries: Tensor,
    keys: Tensor,
    scale: Tensor | float,
    query_ids: Tensor,
    key_ids: Tensor,
    label_smoothing: float = 0.0,
    allowed: Tensor | None = None,
) -> Tensor:
    """InfoNCE of queries among keys (van den Oord et al. 2018, eq. 4). ALIGN eq. 1-2 is the sum of both directions.

    ``-1/B sum_i sum_j p_ij log softmax_j(scale * q_i . k_j)`` with p from `id_targets`. With unique ids this is
    ``F.cross_entropy(scale * queries @ keys.T, positive, label_smoothing=...)``. Computed in float32. Gradient flows to
    queries, keys and scale. Stores the (B, M) similarities, `vlp.losses.tiled.tiled_info_nce` does not.

    Args:
        queries: (B, E) embeddings, normally of unit norm (not required).
        keys: (M, E) embeddings.
        scale: () or (1,) inverse temperature.
        query_ids: (B,) int64.
        key_ids: (M,) int64. A key with the query's id is a positive.
        label_smoothing: Probability spread evenly over the row's allowed keys, including its positives.
        allowed: (B, M) bool, False where a pair is excluded from the softmax. None allows all.

    Returns:
        () mean over queries, in nats.

    Raises:
        ValueError: naming the row, if a query has no allowed positive.
        NonFiniteLoss: naming the row, if an embedding is not finite.
    """
    check_ids(queries, keys, query_ids, key_ids)
    logits = (scale * queries) @ keys.T  # (B, M)
    if allowed is not None:
        logits = logits.masked_fill(~allowed, -torch.inf)
    targets = id_targets(query_ids, key_ids, label_smoothing, allowed, dtype=logits.dtype)
    # An infinite key that is excluded, or whose logits are -inf, would reach the gradients but not the loss.
    zero_or_nan = 0 * keys.detach().sum()
    return check_finite(_cross_entropy(logits, targets).mean() + zero_or_nan, queries=queries, keys=keys, scale=scale)


@in_float32
def soft_info_nce(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of similarity rows against a target distribution (ALBEF eq. 6).

    Computed in float32. Gradient flows to ``logits`` only.

    Args:
        logits: (B, M) similarities already divided by the temperature. -inf excludes a pair.
        targets: (B, M) with row sums of 1, e.g. ``distill * softmax(teacher) + (1 - distill) * one_hot``.

    Returns:
        () mean over rows, in nats.

    Raises:
        ValueError: if the shapes differ.
        NonFiniteLoss: naming the row, if it has NaN, +inf, no pair, or a target on an excluded pair.
    """
    if logits.shape != targets.shape:
        raise ValueError(f"logits {tuple(logits.shape)} and targets {tuple(targets.shape)} differ in shape")
    rows = _cross_entropy(logits, targets)  # (B,)
    return check_finite(rows.mean(), **{"logits and targets": rows})


def id_targets(
    query_ids: Tensor,
    key_ids: Tensor,
    label_smoothing: float = 0.0,
    allowed: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Target distribution from ids, ``p_ij = (1 - eps) [id_i = id_j] / count_i + eps / M_i`` over M_i allowed keys.

    Args:
        query_ids: (B,) int64.
        key_ids: (M,) int64.
        label_smoothing: eps.
        allowed: (B, M) bool, False where a pair is excluded: its target is 0. None allows all.
        dtype: Of the result.

    Returns:
        (B, M) with row sums of 1.

    Raises:
        ValueError: naming the first row without a positive.
    """
    positive = query_ids[:, None] == key_ids
    if allowed is not None:
        positive = positive & allowed
    count = positive.sum(1, keepdim=True, dtype=dtype)
    check_every_row(count[:, 0] > 0, "has no positive: no allowed key has its id")
    targets = positive * ((1 - label_smoothing) / count)
    if label_smoothing == 0:
        return targets
    if allowed is None:
        return targets + label_smoothing / len(key_ids)
    return targets + allowed * (label_smoothing / allowed.sum(1, keepdim=True, dtype=dtype))


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return (B,) cross-entropies. Where the target is 0, a log-probability of -inf counts as 0, the limit of x log x."""
    targets = targets.detach()
    log_probs = logits.log_softmax(dim=1)
    return -(targets * log_probs.masked_fill((targets == 0) & (log_probs == -torch.inf), 0.0)).sum(dim=1)
