"""VICReg: keep two views of an image equal, every dimension spread, and dimensions uncorrelated (Bardes et al. 2022).

M rows of all processes and micro-batches, E embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from vlp.config import Experiment
from vlp.errors import UserError
from vlp.forward import Forward
from vlp.losses.inputs import check_finite, in_float32
from vlp.objectives.base import Objective
from vlp.objectives.geometry import all_of, projection
from vlp.objectives.requirements import require_image_views
from vlp.specs.fields import setting


@dataclass(frozen=True)
class VicReg(Objective):
    """Variance-invariance-covariance regularisation (Bardes et al. 2022, eq. 6), on embeddings that are not normalised.

    ``lambda s(Z, Z') + mu [v(Z) + v(Z')] + nu [c(Z) + c(Z')]`` with the functions of `vicreg_loss`. Variances and
    covariances are those of the rows of all processes. Needs one further view: ``data.views``.

    Args:
        invariance: lambda, the factor of the mean squared distance of the two views.
        variance: mu, the factor of the hinge on the standard deviations. The published code halves this term: 12.5.
        covariance: nu, the factor of the squared covariances.
    """

    min_rows: ClassVar[int] = 2

    invariance: float = setting(25.0, least=0)
    variance: float = setting(25.0, least=0)
    covariance: float = setting(1.0, least=0)

    def validate(self, experiment: Experiment) -> None:
        require_image_views(experiment, "VicReg")
        if experiment.micro_batch_size < 2:
            raise UserError("VicReg needs the variance of a batch; make data.batch_size at least 2")

    def __call__(self, f: Forward) -> Tensor:
        # Variances are no means over rows, so every process computes the loss of all rows.
        x, y = all_of(f, "images", projection)
        return vicreg_loss(x, y, self.invariance, self.variance, self.covariance)


@in_float32
def vicreg_loss(x: Tensor, y: Tensor, invariance: float, variance: float, covariance: float) -> Tensor:
    """Compute VICReg's loss of two views, (M, E) each."""
    z = torch.stack([x, y])  # (2, M, E)
    rows, width = x.shape
    distance = F.mse_loss(x, y)  # eq. 5, and the mean over E as in the published code
    std = (z.var(1) + 1e-4).sqrt()  # (2, E)
    hinge = F.relu(1 - std).mean(1).sum()  # eq. 1
    centred = z - z.mean(1, keepdim=True)
    squares = (centred.mT @ centred / (rows - 1)).square()  # (2, E, E), eq. 3
    off_diagonal = squares.sum() - squares.diagonal(dim1=1, dim2=2).sum()  # eq. 4
    return check_finite(invariance * distance + variance * hinge + covariance * off_diagonal / width, x=x, y=y)
