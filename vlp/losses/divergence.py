"""How much several predictions of the same thing differ.

V views, B rows, C classes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vlp.losses.inputs import check_finite, in_float32


@in_float32
def jensen_shannon(*logits: Tensor) -> Tensor:
    """Jensen-Shannon divergence of V predictions, ``1/V sum_v KL(p_v || m)`` with m their mean (Cutoff, Shen 2020).

    Between 0, where all agree, and log V. The published Cutoff code has the arguments the other way round, KL(m || p_v),
    which is not this divergence and exceeds log V without bound. Gradient flows to every view.

    Args:
        logits: V of (B, C); p_v is the softmax of a row, and -inf leaves a class out of it.

    Returns:
        () mean over rows, in nats; of one view, 0.

    Raises:
        ValueError: if there is no view or row or the shapes differ; naming the row, if it has NaN, +inf or no class.
    """
    if not logits or any(view.shape != logits[0].shape for view in logits) or logits[0].numel() == 0:
        raise ValueError(f"jensen_shannon needs views of one shape, got {[tuple(view.shape) for view in logits]}")
    # exp(-1000) is 0 already, and a left-out class adds 0 * -1000 where it would add 0 * -inf
    log_p = torch.stack(logits).log_softmax(dim=2).clamp(min=-1000)  # (V, B, C)
    log_mean = log_p.logsumexp(dim=0) - math.log(len(logits))
    divergence = (log_p.exp() * (log_p - log_mean)).sum(dim=2)  # (V, B)
    return check_finite(divergence.mean(), logits=divergence.sum(0))
