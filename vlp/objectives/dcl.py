"""Decoupled contrastive learning: InfoNCE whose softmax does not contain the positive (Yeh et al. 2022).

B rows of a bundle, M rows of all processes and micro-batches, E embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlp.config import Experiment
from vlp.forward import Forward
from vlp.losses.inputs import check_finite, in_float32
from vlp.objectives.base import Objective
from vlp.objectives.geometry import all_of, sides_of
from vlp.objectives.requirements import require_image_views
from vlp.specs.fields import setting


@dataclass(frozen=True)
class Dcl(Objective):
    """Decoupled contrastive loss of two views of an image (Yeh et al. 2022, eq. 6).

    ``1/2M sum_i [-z_i . z'_i / T + log sum_k exp(z_i . z_k / T)]``, k over both views of all other images. Needs one
    further view: ``data.views``. An image that occurs twice in a batch counts as two images, as in SimCLR.

    Args:
        temperature: T.
    """

    min_rows: ClassVar[int] = 2

    temperature: float = setting(0.1, above=0)

    def validate(self, experiment: Experiment) -> None:
        require_image_views(experiment, "Dcl")

    def __call__(self, f: Forward) -> Tensor:
        own = sides_of(f, "images")
        queries = torch.cat([view.embed for view in own])  # (2B, E)
        positives = torch.cat([view.embed for view in reversed(own)])
        keys = torch.cat(all_of(f, "images"))  # (2M, E)
        image = torch.arange(len(keys), device=keys.device) % (len(keys) // 2)  # (2M,) image of each key
        is_other = f.all.rows.repeat(2)[:, None] != image  # (2B, 2M)
        return dcl_loss(queries, positives, keys, is_other, self.temperature)


@in_float32
def dcl_loss(queries: Tensor, positives: Tensor, keys: Tensor, is_negative: Tensor, temperature: float) -> Tensor:
    """Compute the decoupled contrastive loss, mean over queries, in nats.

    Args:
        queries: (B, E).
        positives: (B, E), one for each query.
        keys: (M, E).
        is_negative: (B, M) bool. A query without a negative has a loss of 0.
    """
    attraction = (queries * positives).sum(1) / temperature  # (B,)
    logits = (queries @ keys.T / temperature).masked_fill(~is_negative, -torch.inf)
    has_negative = is_negative.any(1)
    loss = torch.where(has_negative, logits.logsumexp(1) - attraction, 0.0)
    return check_finite(loss.mean(), queries=queries, positives=positives, keys=keys)
