"""Losses by distance and the N-pair loss as objectives, of images with texts or of two views.

A query's keys are the rows of the other side of all processes and micro-batches. Keys with the query's image id are its
positives.

B rows of a bundle, M rows of all processes and micro-batches, E embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vlp.config import Experiment
from vlp.errors import UserError
from vlp.forward import Forward
from vlp.losses.npair import n_pair_loss, tuplet_loss
from vlp.losses.pairwise import contrastive_loss, mined_triplet_loss
from vlp.objectives.base import Objective
from vlp.objectives.geometry import Sides, all_of, pooled, require_sides, sides_of
from vlp.specs.fields import setting


@dataclass(frozen=True)
class Triplet(Objective):
    """Hinge loss of triplets mined in the batch, mean over all triplets (FaceNet, Schroff et al. 2015, sec. 3).

    Args:
        mining: "semi_hard" takes the nearest negative that is farther than the positive and within the margin, "hardest"
            the farthest positive and the nearest negative.
    """

    min_rows: ClassVar[int] = 2

    margin: float = setting(0.2, least=0)
    mining: Literal["semi_hard", "hardest"] = "semi_hard"
    sides: Sides = "images"

    def validate(self, experiment: Experiment) -> None:
        require_sides(experiment, "Triplet", self.sides)

    def __call__(self, f: Forward) -> Tensor:
        # The number of triplets differs between processes, so every process computes the mean over all of them.
        x, y = all_of(f, self.sides)
        mined = (f.all.image_id, f.all.image_id, self.margin, self.mining)
        return (mined_triplet_loss(x, y, *mined) + mined_triplet_loss(y, x, *mined)) / 2


@dataclass(frozen=True)
class PairContrast(Objective):
    """Contrastive loss of pairs: pull matches together, push others apart (Hadsell et al. 2006, eq. 4).

    Args:
        num_others: Keys that each row is paired with besides its own: those of the next rows of the whole batch, whose
            order is random.
    """

    min_rows: ClassVar[int] = 2

    margin: float = setting(1.0, least=0)
    num_others: int = setting(1, least=1)
    sides: Sides = "images"

    def validate(self, experiment: Experiment) -> None:
        require_sides(experiment, "PairContrast", self.sides)
        rows = experiment.micro_batch_size
        if self.num_others >= rows:
            raise UserError(
                f"PairContrast.num_others is {self.num_others}; a micro-batch of {rows} has 1 to {rows - 1} other rows"
            )

    def __call__(self, f: Forward) -> Tensor:
        x, y = sides_of(f, self.sides)
        all_x, all_y = all_of(f, self.sides)
        return (self._loss(f, x.embed, all_y) + self._loss(f, y.embed, all_x)) / 2

    def _loss(self, f: Forward, queries: Tensor, keys: Tensor) -> Tensor:
        steps = torch.arange(self.num_others + 1, device=queries.device)
        key = ((f.all.rows[:, None] + steps) % len(keys)).flatten()  # (B * (1 + num_others),)
        query = torch.arange(len(queries), device=queries.device).repeat_interleave(len(steps))
        matches = f.batch.image_id[query] == f.all.image_id[key]
        return contrastive_loss(queries[query], keys[key], matches, self.margin)


@dataclass(frozen=True)
class Tuplet(Objective):
    """(N+1)-tuplet loss: each row has its own positive and N negatives of its own (Sohn 2016, sec. 3.1).

    Reads the pooled states of the towers, like `NPair`. The negatives are the keys of the next N rows of the whole batch,
    whose order is random. A negative that shows the same image is excluded.

    Args:
        num_negatives: N.
        l2: Weight of the penalty on the squared norms.
    """

    min_rows: ClassVar[int] = 2

    num_negatives: int = setting(16, least=1)
    l2: float = setting(0.002, least=0)
    sides: Sides = "images"

    def validate(self, experiment: Experiment) -> None:
        require_sides(experiment, "Tuplet", self.sides)
        rows = experiment.micro_batch_size
        if self.num_negatives >= rows:
            raise UserError(
                f"Tuplet.num_negatives is {self.num_negatives}; a micro-batch of {rows} has 1 to {rows - 1} other rows"
            )

    def __call__(self, f: Forward) -> Tensor:
        x, y = map(pooled, sides_of(f, self.sides))  # (B, D) each
        keys = f.all.gather(lambda bundle: pooled(sides_of(bundle, self.sides)[1]))  # (M, D)
        steps = torch.arange(1, self.num_negatives + 1, device=x.device)
        negative = (f.all.rows[:, None] + steps) % len(keys)  # (B, N)
        allowed = f.all.image_id[negative] != f.batch.image_id[:, None]
        square_norm = (x.float().square().sum(1) + y.float().square().sum(1)).mean() / 2
        return tuplet_loss(x, y, keys[negative], allowed) + self.l2 / 2 * square_norm


@dataclass(frozen=True)
class NPair(Objective):
    """Multi-class N-pair loss: the positives of other rows are the negatives, by inner products (Sohn 2016, sec. 3.2).

    Reads the pooled states of the towers, which must have equal widths, instead of unit-norm embeddings. The model has
    head "none", or another objective that uses the head. Gradient flows to both sides; the first side is the query.

    Args:
        l2: Weight of the penalty on the squared norms.
    """

    min_rows: ClassVar[int] = 2

    l2: float = setting(0.002, least=0)
    sides: Sides = "images"

    def validate(self, experiment: Experiment) -> None:
        require_sides(experiment, "NPair", self.sides)

    def __call__(self, f: Forward) -> Tensor:
        # Penalty and softmax are over all rows, so every process computes the whole.
        x, y = all_of(f, self.sides, pooled)  # (M, D) each
        return n_pair_loss(x, y, self.l2)
