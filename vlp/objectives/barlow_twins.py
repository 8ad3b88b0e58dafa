"""Barlow Twins: the cross-correlation of two views is the identity matrix (Zbontar et al. 2021).

M rows of all processes and micro-batches, E embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vlp.config import Experiment
from vlp.errors import UserError
from vlp.forward import Forward
from vlp.losses.inputs import check_finite, in_float32
from vlp.objectives.base import Objective
from vlp.objectives.geometry import all_of, projection
from vlp.objectives.requirements import require_image_views
from vlp.specs.fields import setting


@dataclass(frozen=True)
class BarlowTwins(Objective):
    """Redundancy reduction (Zbontar et al. 2021, eq. 1), on embeddings that are not normalised.

    ``sum_i (1 - C_ii)^2 + lambda sum_{i != j} C_ij^2``, C the correlation of dimension i of one view with dimension j of
    the other over the rows of all processes. Needs one further view: ``data.views``.

    Args:
        off_diagonal: lambda.
    """

    min_rows: ClassVar[int] = 2

    off_diagonal: float = setting(5e-3, least=0)

    def validate(self, experiment: Experiment) -> None:
        require_image_views(experiment, "BarlowTwins")
        if experiment.micro_batch_size < 2:
            raise UserError("BarlowTwins needs the correlations of a batch; make data.batch_size at least 2")

    def __call__(self, f: Forward) -> Tensor:
        # Correlations are no means over rows, so every process computes the loss of all rows.
        x, y = all_of(f, "images", projection)
        return barlow_twins_loss(x, y, self.off_diagonal)


@in_float32
def barlow_twins_loss(x: Tensor, y: Tensor, off_diagonal: float, eps: float = 1e-5) -> Tensor:
    """Compute Barlow Twins' loss of two views, (M, E) each. ``eps`` is that of the published code's BatchNorm."""

    def standardized(z: Tensor) -> Tensor:
        return (z - z.mean(0)) / (z.var(0, correction=0) + eps).sqrt()

    correlation = standardized(x).mT @ standardized(y) / len(x)  # (E, E), eq. 2
    on = (1 - correlation.diagonal()).square().sum()
    off = correlation.square().sum() - correlation.diagonal().square().sum()
    return check_finite(on + off_diagonal * off, x=x, y=y)
