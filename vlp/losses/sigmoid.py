"""The sigmoid loss: binary classification of every pair independently, without a softmax over keys."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from vlp.losses.inputs import check_finite, check_ids, in_float32


@in_float32
def sigmoid_loss(
    queries: Tensor, keys: Tensor, scale: Tensor | float, bias: Tensor | float, query_ids: Tensor, key_ids: Tensor
) -> Tensor:
    """Sigmoid loss of matching pairs against all others (SigLIP, Zhai et al. 2023, eq. 1).

    ``-1/B sum_ij log sigmoid(z_ij (scale q_i . k_j + bias))`` with z = 1 where the ids are equal and -1 elsewhere.
    Computed in float32. Gradient flows to queries, keys, scale and bias. A row may consist of negatives only.

    Args:
        queries: (B, E) embeddings, normally of unit norm.
        keys: (M, E) embeddings.
        scale: () or (1,) inverse temperature.
        bias: () or (1,) added to every scaled similarity.
        query_ids: (B,) int64.
        key_ids: (M,) int64.

    Returns:
        () sum over keys, mean over queries, in nats.

    Raises:
        ValueError: if the numbers of embeddings and ids differ.
        NonFiniteLoss: naming the row, if an embedding is not finite.
    """
    check_ids(queries, keys, query_ids, key_ids)
    logits = (scale * queries) @ keys.T + bias  # (B, M)
    margins = logits.where(query_ids[:, None] == key_ids, -logits)
    loss = -F.logsigmoid(margins).sum() / len(queries)
    # an infinite similarity can have a loss of 0, but its gradient is NaN
    zero_or_nan = 0 * (queries.detach().sum() + keys.detach().sum())
    return check_finite(loss + zero_or_nan, queries=queries, keys=keys, scale=scale, bias=bias)
