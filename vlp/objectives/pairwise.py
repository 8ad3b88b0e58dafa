"""Losses by distance and the N-pair loss as objectives, of pictures with texts or of two views.

The keys are the rows of the other side of all processes; a key with the query's picture index is its positive.

B rows of this process, M rows of all processes, E embedding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vlp.config import Experiment
from vlp.distributed import gather, gather_with_gradient, rank, world_size
from vlp.errors import UserError
from vlp.forward import Forward
from vlp.losses.npair import n_pair_loss
from vlp.losses.pairwise import contrastive_loss, hardest_triplets, semi_hard_triplets, triplet_loss
from vlp.objectives.geometry import Sides, need_sides, sides_of


def both_ways(f: Forward, sides: Sides, loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Mean of ``loss`` of (B, E) queries and (M, E) keys over the two directions."""
    x, y = (side.embed for side in sides_of(f, sides))
    return (loss(x, gather_with_gradient(y)) + loss(y, gather_with_gradient(x))) / 2


@dataclass(frozen=True)
class Triplet:
    """Triplets mined in the batch, the mean over all of them (FaceNet, Schroff et al. 2015, sec. 3).

    Args:
        mining: "semi_hard", the nearest negative that is farther than the positive and within the margin, or "hardest".
    """

    weight: float = 1.0
    margin: float = 0.2
    mining: Literal["semi_hard", "hardest"] = "semi_hard"
    sides: Sides = "images"

    def validate(self, experiment: Experiment) -> None:
        """Raises UserError where the sides are missing."""
        need_sides(experiment, "Triplet", self.sides)

    def __call__(self, f: Forward) -> Tensor:
        ids, key_ids = f.batch.image_id, gather(f.batch.image_id)

        def loss(queries: Tensor, keys: Tensor) -> Tensor:
            if self.mining == "hardest":
                anchor, positive, negative = hardest_triplets(queries, keys, ids, key_ids)
            else:
                anchor, positive, negative = semi_hard_triplets(queries, keys, ids, key_ids, self.margin)
            # processes find different numbers of triplets: the mean over processes is the mean over all triplets
            count = queries.new_tensor([len(anchor)])
            share = count / gather(count).mean().clamp(min=1 / world_size())
            return share.squeeze() * triplet_loss(queries[anchor], keys[positive], keys[negative], self.margin)

        return both_ways(f, self.sides, loss)


@dataclass(frozen=True)
class PairContrast:
    """Each row with its own key and with some others, drawn together and pushed apart (Hadsell et al. 2006, eq. 4).

    Args:
        others: keys besides the own one: those of the next so many rows of the whole batch, whose order is random.
    """

    weight: float = 1.0
    margin: float = 1.0
    others: int = 1
    sides: Sides = "images"

    def validate(self, experiment: Experiment) -> None:
        """Raises UserError where the sides are missing, or the batch is too small."""
        need_sides(experiment, "PairContrast", self.sides)
        rows = experiment.data.batch_size // experiment.train.accumulation
        if not 1 <= self.others < rows:
            raise UserError(
                f"PairContrast.others is {self.others}; a micro-batch of {rows} has 1 to {rows - 1} other rows"
            )

    def __call__(self, f: Forward) -> Tensor:
        ids, key_ids = f.batch.image_id, gather(f.batch.image_id)

        def loss(queries: Tensor, keys: Tensor) -> Tensor:
            place = rank() * len(queries) + torch.arange(len(queries), device=queries.device)
            steps = torch.arange(self.others + 1, device=queries.device)
            key = ((place[:, None] + steps) % len(keys)).flatten()  # (B * (1 + others),)
            query = place.sub(place[0]).repeat_interleave(len(steps))
            return contrastive_loss(queries[query], keys[key], ids[query] == key_ids[key], self.margin)

        return both_ways(f, self.sides, loss)


@dataclass(frozen=True)
class NPair:
    """Every other row's positive is a negative, by inner products that are not normalised (Sohn 2016, sec. 3.2).

    Takes the towers' pooled states, which must have one width, not the unit-norm embeddings: the model has head "none",
    or another objective that uses the head. Gradient flows to both sides; the first one asks.

    Args:
        l2: weight of the penalty on the squared norms.
    """

    weight: float = 1.0
    l2: float = 0.002
    sides: Sides = "images"

    def validate(self, experiment: Experiment) -> None:
        """Raises UserError where the sides are missing."""
        need_sides(experiment, "NPair", self.sides)

    def __call__(self, f: Forward) -> Tensor:
        # the penalty and the softmax are over all rows, so every process computes the whole
        x, y = (gather_with_gradient(side.tokens[:, 0]) for side in sides_of(f, self.sides))
        return n_pair_loss(x, y, self.l2)
