"""Consistency of several predictions for the same sample.

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

    Between 0, if all agree, and log V. The published Cutoff code swaps the arguments, KL(m || p_v), which is another
    divergence without an upper bound. Gradient flows to every view.

    Args:
        logits: V tensors (B, C). p_v is the softmax of a row. A logit of -inf excludes a class.

    Returns:
        () mean over rows, in nats. 0 for a single view.

    Raises:
        ValueError: if there is no view or row, or the shapes differ.
        NonFiniteLoss: naming the row, if it has NaN, +inf or no class.
    """
    if not logits or any(view.shape != logits[0].shape for view in logits) or logits[0].numel() == 0:
        raise ValueError(f"jensen_shannon needs views of one shape, got {[tuple(view.shape) for view in logits]}")
    # exp(-1000) is 0 in float32. An excluded class then adds 0 * -1000 = 0 instead of 0 * -inf = NaN.
    log_p = torch.stack(logits).log_softmax(dim=2).clamp(min=-1000)  # (V, B, C)
    log_mean = log_p.logsumexp(dim=0) - math.log(len(logits))  # (B, C)
    divergence = (log_p.exp() * (log_p - log_mean)).sum(dim=2)  # (V, B)
    return check_finite(divergence.mean(), logits=divergence.sum(0))
