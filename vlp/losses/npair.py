"""The (N+1)-tuplet and the multi-class N-pair loss (Sohn 2016), which use many negatives at once.

Similarities are inner products: the paper does not normalise embeddings.

B rows, N negatives, E embedding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vlp.losses.inputs import check_finite, in_float32


@in_float32
def tuplet_loss(anchor: Tensor, positive: Tensor, negatives: Tensor, allowed: Tensor | None = None) -> Tensor:
    """(N+1)-tuplet loss: each anchor has one positive and N negatives of its own (Sohn 2016, sec. 3.1).

    ``mean_i log(1 + sum_j exp(a_i . n_ij - a_i . p_i))``, InfoNCE among these N + 1. The paper's "(N+1)-tuplet" has
    N - 1 negatives. With one negative and unit norms it is ``softplus((d_ap^2 - d_an^2) / 2)``, a smooth form of half a
    triplet loss with margin 0. pytorch-metric-learning's ``TupletMarginLoss`` is another loss, based on angles.

    Args:
        anchor: (B, E) embeddings.
        positive: (B, E) embeddings.
        negatives: (B, N, E) embeddings. With N = 0 the loss is 0.
        allowed: (B, N) bool, False where a negative is excluded. None allows all.

    Returns:
        () mean over anchors, in nats.

    Raises:
        ValueError: if there is no row or the shapes do not fit.
        NonFiniteLoss: naming the row, if an embedding is not finite.
    """
    rows, width = _pair_shape("tuplet_loss", anchor, positive)
    if negatives.dim() != 3 or (len(negatives), negatives.shape[2]) != (rows, width):
        raise ValueError(f"tuplet_loss needs negatives ({rows}, N, {width}), got {tuple(negatives.shape)}")
    to_positive = (anchor * positive).sum(1, keepdim=True)  # (B, 1)
    to_negatives = torch.einsum("be,bne->bn", anchor, negatives)  # (B, N)
    # of the similarities, not of the loss: a negative at -inf leaves the loss finite but not its gradient
    check_finite(to_positive.sum() + to_negatives.sum(), anchor=anchor, positive=positive, negatives=negatives)
    if allowed is not None:
        to_negatives = to_negatives.masked_fill(~allowed, -torch.inf)
    return F.pad(to_negatives - to_positive, (1, 0)).logsumexp(1).mean()  # the 0 in front is the positive itself


@in_float32
def n_pair_loss(anchor: Tensor, positive: Tensor, l2: float = 0.002) -> Tensor:
    """Multi-class N-pair loss: the positives of all other rows are the negatives (Sohn 2016, sec. 3.2).

    ``mean_i log(1 + sum_{j != i} exp(a_i . p_j - a_i . p_i)) + l2/2 mean_x ||x||^2``, x over the 2N embeddings. The
    form and the weight of the norm penalty are those of TensorFlow's ``npairs_loss``. pytorch-metric-learning's
    ``NPairsLoss`` normalises unless told not to, and its ``LpRegularizer`` has neither the square nor the 1/2.

    Args:
        anchor: (B, E) embeddings, not normalised, of B different classes. Use `info_nce` with ids for repeated classes.
        positive: (B, E) embeddings, not normalised, of the same classes.
        l2: Weight of the norm penalty.

    Returns:
        () mean over anchors, in nats, plus the penalty. For one row it is only the penalty.

    Raises:
        ValueError: if there is no row or the shapes differ.
        NonFiniteLoss: naming the row, if an embedding is not finite.
    """
    rows, _ = _pair_shape("n_pair_loss", anchor, positive)
    nats = F.cross_entropy(anchor @ positive.T, torch.arange(rows, device=anchor.device))
    square_norm = (anchor.square().sum(1) + positive.square().sum(1)).mean() / 2
    return check_finite(nats + l2 / 2 * square_norm, anchor=anchor, positive=positive)


def _pair_shape(name: str, anchor: Tensor, positive: Tensor) -> torch.Size:
    if anchor.shape != positive.shape or anchor.dim() != 2 or len(anchor) < 1:
        raise ValueError(f"{name} needs pairs of rows, got {tuple(anchor.shape)} and {tuple(positive.shape)}")
    return anchor.shape
