"""Losses of pairs and triplets by Euclidean distance, and the mining of triplets within a batch.

Embeddings need not have unit norm, but a margin is hard to choose without it.

B rows, E embedding, M candidates, T triplets.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from vlp.losses.inputs import check_finite, check_ids, in_float32

Triplets = tuple[Tensor, Tensor, Tensor]
"""(T,) int64 each: rows of the anchors, and rows of their positives and negatives among the candidates."""


@in_float32
def contrastive_loss(a: Tensor, b: Tensor, is_match: Tensor, margin: float = 1.0) -> Tensor:
    """Contrastive loss of pairs: pull matches together, push others apart to a margin (Hadsell et al. 2006, eq. 4).

    ``mean_i 1/2 (y d^2 + (1 - y) max(margin - d, 0)^2)`` with d the Euclidean distance and y = 1 for a match (in the paper,
    Y = 1 is a pair that does *not* match). pytorch-metric-learning's ``ContrastiveLoss`` has neither the square nor the
    1/2, normalises, and averages only over pairs with a loss above 0, separately for matches and others.

    Args:
        a: (B, E) embeddings.
        b: (B, E) embeddings, of either modality.
        is_match: (B,) bool.
        margin: Smallest distance of a pair that does not match at which its loss is 0.

    Returns:
        () mean over all pairs. A pair at distance 0 that does not match gets no gradient.

    Raises:
        ValueError: if there is no pair, the shapes differ, or ``is_match`` is not bool.
        NonFiniteLoss: naming the row, if an embedding is not finite.
    """
    if a.shape != b.shape or len(a) < 1 or is_match.shape != a.shape[:1] or is_match.dtype != torch.bool:
        raise ValueError(
            "contrastive_loss needs pairs of rows and a bool for each, got "
            f"{tuple(a.shape)}, {tuple(b.shape)} and {is_match.dtype} {tuple(is_match.shape)}"
        )
    distance = torch.linalg.vector_norm(a - b, dim=1)
    check_finite(distance.square().sum(), a=a, b=b)  # the hinge would turn an infinite distance into 0
    return torch.where(is_match, distance, (margin - distance).clamp(min=0)).square().mean() / 2


@in_float32
def triplet_loss(anchor: Tensor, positive: Tensor, negative: Tensor, margin: float = 0.2) -> Tensor:
    """Triplet loss with squared distances (FaceNet, Schroff et al. 2015, sec. 3.1, where it is a sum).

    ``mean_i max(||a_i - p_i||^2 - ||a_i - n_i||^2 + margin, 0)``. pytorch-metric-learning's ``TripletMarginLoss`` has plain
    distances, a margin of 0.05, and averages only over triplets with a loss above 0.
    ``torch.nn.functional.triplet_margin_loss`` has plain distances and a margin of 1.

    Args:
        anchor: (T, E) embeddings.
        positive: (T, E) embeddings.
        negative: (T, E) embeddings.
        margin: Difference of squared distances at which the loss of a triplet is 0.

    Returns:
        () mean over all triplets. If mining found none, 0 with a gradient of 0.

    Raises:
        ValueError: if the shapes differ.
        NonFiniteLoss: naming the row, if an embedding is not finite.
    """
    if not anchor.shape == positive.shape == negative.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (anchor, positive, negative))
        raise ValueError(f"triplet_loss needs triplets of rows, got {shapes}")
    near, far = (anchor - positive).square().sum(1), (anchor - negative).square().sum(1)
    check_finite((near + far).sum(), anchor=anchor, positive=positive, negative=negative)
    return (near - far + margin).clamp(min=0).sum() / max(len(anchor), 1)


@torch.no_grad()
def semi_hard_triplets(
    anchors: Tensor,
    candidates: Tensor,
    anchor_ids: Tensor,
    candidate_ids: Tensor,
    margin: float = 0.2,
    allowed: Tensor | None = None,
) -> Triplets:
    """Mine semi-hard triplets: for each anchor and positive the nearest negative with ``d_ap < d_an < d_ap + margin``.

    FaceNet, sec. 3.2, with d the squared Euclidean distance. All pairs of anchor and positive take part, as in the paper.
    Pairs without such a negative are skipped, so the result may be empty. For triplets within one set of embeddings pass
    it twice, with ``allowed=~torch.eye(B, dtype=torch.bool)`` so that no row is its own positive. pytorch-metric-learning's
    ``TripletMarginMiner(type_of_triplets="semihard")`` returns every such negative instead of the nearest.

    Args:
        anchors: (B, E) embeddings.
        candidates: (M, E) embeddings.
        anchor_ids: (B,) int64.
        candidate_ids: (M,) int64. A candidate with the anchor's id is a positive, any other a negative.
        margin: Width of the range of semi-hard negatives.
        allowed: (B, M) bool, False where a pair is neither positive nor negative. None allows all.

    Returns:
        Rows of anchors, positives and negatives, (T,) each, for `triplet_loss`.

    Raises:
        NonFiniteLoss: naming the row, if an embedding is not finite.
    """
    distance, is_positive, is_negative = _pairs(anchors, candidates, anchor_ids, candidate_ids, allowed)
    if distance.numel() == 0:
        return distance.nonzero().new_empty(3, 0).unbind()
    is_semi_hard, negative = _semi_hard(distance, is_positive, is_negative, margin)
    anchor, positive = is_semi_hard.nonzero(as_tuple=True)
    return anchor, positive, negative[anchor, positive]


@torch.no_grad()
def hardest_triplets(
    anchors: Tensor, candidates: Tensor, anchor_ids: Tensor, candidate_ids: Tensor, allowed: Tensor | None = None
) -> Triplets:
    """Mine "batch hard" triplets: each anchor with its farthest positive and its nearest negative (FaceNet, sec. 3.2).

    Anchors without a positive or without a negative are skipped. Equals pytorch-metric-learning's ``BatchHardMiner``.

    Args:
        anchors, candidates, anchor_ids, candidate_ids, allowed: as in `semi_hard_triplets`.

    Returns:
        Rows of anchors, positives and negatives, (T,) each with T <= B, for `triplet_loss`.

    Raises:
        NonFiniteLoss: naming the row, if an embedding is not finite.
    """
    distance, is_positive, is_negative = _pairs(anchors, candidates, anchor_ids, candidate_ids, allowed)
    if distance.numel() == 0:
        return distance.nonzero().new_empty(3, 0).unbind()
    has_triplet, farthest, nearest = _hardest(distance, is_positive, is_negative)
    anchor = has_triplet.nonzero().squeeze(1)
    return anchor, farthest[anchor], nearest[anchor]


@in_float32
def mined_triplet_loss(
    anchors: Tensor,
    candidates: Tensor,
    anchor_ids: Tensor,
    candidate_ids: Tensor,
    margin: float = 0.2,
    mining: Literal["semi_hard", "hardest"] = "semi_hard",
) -> Tensor:
    """`triplet_loss` of the triplets of `semi_hard_triplets` or `hardest_triplets`, whose number the host need not know.

    Returns:
        () mean over all triplets. If there is none, 0 with a gradient of 0.

    Raises:
        NonFiniteLoss: naming the row, if an embedding is not finite.
    """
    distance, is_positive, is_negative = _pairs(anchors, candidates, anchor_ids, candidate_ids, None)
    if distance.numel() == 0:
        return distance.sum()
    if mining == "hardest":
        is_triplet, positive, negative = (x[:, None] for x in _hardest(distance.detach(), is_positive, is_negative))
        near, far = distance.gather(1, positive), distance.gather(1, negative)  # (B, 1)
    else:
        is_triplet, negative = _semi_hard(distance.detach(), is_positive, is_negative, margin)
        near, far = distance, distance.gather(1, negative)  # (B, M)
    hinge = (near - far + margin).clamp(min=0).where(is_triplet, 0)
    return hinge.sum() / is_triplet.sum().clamp(min=1)


def _semi_hard(distance: Tensor, is_positive: Tensor, is_negative: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    """Return the (B, M) bool mask of the pairs with a semi-hard negative, and the (B, M) int64 nearest one."""
    # Each anchor's negatives in order of distance. A search then finds the first one beyond each positive, and the (B, M, M)
    # triplets never exist.
    negatives, order = distance.masked_fill(~is_negative, torch.inf).sort(dim=1)
    beyond = torch.searchsorted(negatives, distance, right=True).clamp(max=distance.shape[1] - 1)  # (B, M)
    nearest = negatives.gather(1, beyond)
    return is_positive & (distance < nearest) & (nearest < distance + margin), order.gather(1, beyond)


def _hardest(distance: Tensor, is_positive: Tensor, is_negative: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return which of the B anchors have a triplet, their farthest positives, and their nearest negatives."""
    farthest = distance.masked_fill(~is_positive, -torch.inf).argmax(1)
    nearest = distance.masked_fill(~is_negative, torch.inf).argmin(1)
    return is_positive.any(1) & is_negative.any(1), farthest, nearest


def _pairs(anchors, candidates, anchor_ids, candidate_ids, allowed) -> Triplets:
    """Return (B, M) squared distances, and (B, M) bool each of the positive and of the negative pairs."""
    check_ids(anchors, candidates, anchor_ids, candidate_ids)
    is_positive = anchor_ids[:, None] == candidate_ids
    is_negative = ~is_positive
    if allowed is not None:
        is_positive, is_negative = is_positive & allowed, is_negative & allowed
    return _square_distances(anchors, candidates), is_positive, is_negative


@in_float32
def _square_distances(a: Tensor, b: Tensor) -> Tensor:
    distance = (a.square().sum(1, keepdim=True) + b.square().sum(1) - 2 * a @ b.T).clamp_(min=0)
    check_finite(distance.sum(), anchors=a, candidates=b)
    return distance
