"""SimCLR: two views of a picture find each other among all views of the batch (Chen et al. 2020).

B rows of this process, M rows of all processes, E embedding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlp.config import Experiment
from vlp.distributed import gather_with_gradient, rank
from vlp.forward import Forward
from vlp.losses.softmax import info_nce
from vlp.objectives.needs import need_image_views


@dataclass(frozen=True)
class SimClr:
    """NT-Xent (Chen et al. 2020, eq. 1): 2M views, each a query whose only positive is its other view.

    ``-1/2M sum_i log(exp(z_i . z_j(i) / T) / sum_{k != i} exp(z_i . z_k / T))``. Both views go through the tower in one
    batch, as published, so a BatchNorm mixes them: those of one process, where the paper's has the statistics of all.
    Needs one further view: ``data.views``. A picture that is twice in a batch counts as two, as published.

    Args:
        temperature: T; the paper's best for ImageNet is 0.1 with large batches, 0.5 for CIFAR-10.
    """

    weight: float = 1.0
    temperature: float = 0.1

    def validate(self, experiment: Experiment) -> None:
        """Raises UserError unless there are two views of each picture."""
        need_image_views(experiment, "SimClr")

    def __call__(self, f: Forward) -> Tensor:
        queries = torch.cat([view.embed for view in f.images])
        keys = torch.cat([gather_with_gradient(view.embed) for view in f.images])
        rows, total = len(f.batch), len(keys) // 2
        picture = torch.arange(2 * total, device=keys.device) % total  # of each key, by its place in the whole batch
        own = rank() * rows + torch.arange(rows, device=keys.device)
        own = torch.cat([own, own + total])  # place of each query among the keys
        others = torch.ones(len(own), len(keys), dtype=torch.bool, device=keys.device).scatter_(1, own[:, None], False)
        return info_nce(queries, keys, 1 / self.temperature, picture[own], picture, allowed=others)
