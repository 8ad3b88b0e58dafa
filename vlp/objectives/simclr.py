"""SimCLR: two views of an image find each other among all views of the batch (Chen et al. 2020).

B rows of a bundle, M rows of all processes and micro-batches, E embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlp.config import Experiment
from vlp.forward import Forward
from vlp.losses.softmax import info_nce
from vlp.objectives.base import Objective
from vlp.objectives.geometry import all_of, sides_of
from vlp.objectives.requirements import require_image_views
from vlp.specs.fields import setting


@dataclass(frozen=True)
class SimClr(Objective):
    """NT-Xent (Chen et al. 2020, eq. 1): each of 2M views is a query whose only positive is its other view.

    ``-1/2M sum_i log(exp(z_i . z_j(i) / T) / sum_{k != i} exp(z_i . z_k / T))``. Both views pass the tower in one batch,
    as published, so a BatchNorm computes statistics over both: those of one process, where the paper's are those of all.
    Needs one further view: ``data.views``. An image that occurs twice in a batch counts as two images, as published.

    Args:
        temperature: T; the paper's best for ImageNet is 0.1 with large batches, 0.5 for CIFAR-10.
    """

    min_rows: ClassVar[int] = 2

    temperature: float = setting(0.1, above=0)

    def validate(self, experiment: Experiment) -> None:
        require_image_views(experiment, "SimClr")

    def __call__(self, f: Forward) -> Tensor:
        queries = torch.cat([view.embed for view in sides_of(f, "images")])  # (2B, E)
        keys = torch.cat(all_of(f, "images"))  # (2M, E)
        total = len(keys) // 2
        image = torch.arange(2 * total, device=keys.device) % total  # (2M,) image of each key, by its row in the batch
        own = torch.cat([f.all.rows, f.all.rows + total])  # (2B,) position of each query among the keys
        others = torch.ones(len(own), len(keys), dtype=torch.bool, device=keys.device).scatter_(1, own[:, None], False)
        return info_nce(queries, keys, 1 / self.temperature, image[own], image, allowed=others)
