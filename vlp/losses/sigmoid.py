"""The sigmoid loss: every pair on its own, without a softmax over keys."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from vlp.losses.inputs import check_finite, check_ids, in_float32


@in_float32
def sigmoid_loss(
    queries: Tensor, keys: Tensor, scale: Tensor | float, bias: Tensor | float, query_ids: Tensor, key_ids: Tensor
) -> Tensor:
    """Tell matching pairs from all others (SigLIP, Zhai et al. 2023, eq. 1).

    ``-1/B sum_ij log sigmoid(z_ij (scale q_i . k_j + bias))`` with z = 1 where the ids are equal and -1 elsewhere.
    Computed in float32; gradient flows to queries, keys, scale and bias. A row without a positive is all negatives.

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
        ValueError: naming the row, if an embedding is not finite.
    """
    check_ids(queries, keys, query_ids, key_ids)
    logits = (scale * queries) @ keys.T + bias
    margins = logits.where(query_ids[:, None] == key_ids, -logits)
    loss = -F.logsigmoid(margins).sum() / len(queries)
    # an infinite similarity can have a loss of 0, whose gradient is not a number
    seen = 0 * (queries.detach().sum() + keys.detach().sum())
    return check_finite(loss + seen, queries=queries, keys=keys, scale=scale, bias=bias)
