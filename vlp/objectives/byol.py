"""BYOL: predict the momentum encoder's embedding of the other view, without negatives (Grill et al. 2020).

B rows of a bundle, E embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlp.config import Experiment
from vlp.forward import Forward
from vlp.losses.inputs import check_finite, in_float32
from vlp.models.base import HeadSpec
from vlp.objectives.base import Objective
from vlp.objectives.geometry import sides_of
from vlp.objectives.requirements import require_image_views, require_momentum
from vlp.specs.fields import setting


@dataclass(frozen=True)
class Predictor:
    """Two linear layers with BatchNorm and ReLU between them, from E to E dimensions.

    Args:
        hidden_size: Width between the layers; the paper's is 4,096.
        norm: Use BatchNorm. It normalises the rows of one process.
    """

    hidden_size: int = setting(4096, least=1)
    norm: bool = True

    def build(self, width: int) -> nn.Module:
        norm = nn.BatchNorm1d(self.hidden_size) if self.norm else nn.Identity()
        return nn.Sequential(nn.Linear(width, self.hidden_size), norm, nn.ReLU(), nn.Linear(self.hidden_size, width))


@dataclass(frozen=True)
class Byol(Objective):
    """Squared distance of the predictor's output to the target, both of unit norm (Grill et al. 2020, eq. 2).

    ``1/B sum_i [2 - 2 cos(q(z_i), z'_i)]``, summed over the two ways to assign the views. z is the model's embedding before
    normalisation, q the predictor, z' the momentum encoder's embedding of the other view, without gradient. Needs one
    further view (``data.views``) and the momentum encoder, whose decay the paper raises from 0.996 to 1 and vlp keeps
    constant. Both views pass tower and predictor in one batch; the published code runs each view by itself.

    Args:
        predictor: The head q.
    """

    predictor: Predictor = Predictor()

    def validate(self, experiment: Experiment) -> None:
        require_image_views(experiment, "Byol")
        require_momentum(experiment, "Byol")

    def heads(self) -> Mapping[str, HeadSpec]:
        return {"byol_predictor": self.predictor}

    def __call__(self, f: Forward) -> Tensor:
        x, y = sides_of(f, "images")
        predicted = f.model.heads["byol_predictor"](torch.cat([x.projection, y.projection]))  # (2B, E)
        target_x, target_y = sides_of(f.momentum, "images")
        return byol_loss(predicted, torch.cat([target_y.embed, target_x.embed]))


@in_float32
def byol_loss(predicted: Tensor, targets: Tensor) -> Tensor:
    """Compute BYOL's loss of (2B, E) predictions, two for each image, and their (2B, E) targets of unit norm."""
    cosine = F.cosine_similarity(predicted, targets.detach(), dim=1)  # (2B,)
    return check_finite(2 * (2 - 2 * cosine).mean(), predicted=predicted, targets=targets)
