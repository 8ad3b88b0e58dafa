"""Text assignment: to which of two images does this text belong, or to neither? Pre-trains the twin layers of ALBEF's NLVR2.

B rows of a bundle, M rows among which other images are sampled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlp.config import Experiment
from vlp.errors import UserError
from vlp.forward import Forward, Gathered, Scope
from vlp.losses.classification import one_hot, softmax_cross_entropy
from vlp.objectives.base import Objective
from vlp.objectives.hard_negatives import detached_cosines, gather_encodings, sample_hard_negatives
from vlp.objectives.requirements import require_image, require_text
from vlp.specs.fields import setting


@dataclass(frozen=True)
class TextAssignment(Objective):
    """Cross-entropy of three answers: the text's image is shown first, second, or not at all (Li et al. 2021, appendix A).

    The other images are sampled with probability softmax(cosine of images / temperature) from the candidates that show another
    image; two of them are different rows. With a single other image, the text's image is always shown. Without any it is
    shown twice, which teaches nothing.

    Args:
        temperature: The published one; it is not learned.
        neither: Share of texts whose image is not shown. The published answers are equally frequent.
        candidates: Rows that can be sampled: of this process ("local"), as published, or of all processes ("global").
    """

    min_rows: ClassVar[int] = 2

    temperature: float = setting(0.07, above=0)
    neither: float = setting(1 / 3, least=0, most=1)
    candidates: Scope = "local"

    @property
    def row_scope(self) -> Scope:
        return self.candidates

    def validate(self, experiment: Experiment) -> None:
        require_image(experiment, "TextAssignment")
        require_text(experiment, "TextAssignment")
        model = experiment.model
        if not model.assignment or model.num_images != 2:
            raise UserError("TextAssignment needs a head on twins; set model.assignment=true and model.fusion.images=2")

    def __call__(self, f: Forward) -> Tensor:
        candidates = f.scope(self.candidates)
        images, labels = self.sample(f, candidates)
        shown = tuple(self._projected(f, candidates, rows) for rows in images)
        return softmax_cross_entropy(f.model.assign(shown, f.text), one_hot(labels, 3))

    def sample(self, f: Forward, candidates: Gathered) -> tuple[Tensor, Tensor]:
        """Sample the images shown with each text.

        Returns:
            (2, B) positions among the candidates, and (B,) labels: 0 or 1 where the text's image is shown, 2 without it.
        """
        own, ids = candidates.rows, candidates.image_id
        similarity = detached_cosines(f.image.embed, candidates.image) / self.temperature  # (B, M)
        others = f.batch.image_id[:, None] != ids
        first = sample_hard_negatives(similarity, others)
        further = others & (torch.arange(len(ids), device=ids.device) != first[:, None])
        second = sample_hard_negatives(similarity, further)
        labels = (torch.rand(len(own), device=own.device) < 0.5).long()
        without = (torch.rand(len(own), device=own.device) < self.neither) & further.any(1)
        labels = labels.masked_fill(without, 2)
        first = torch.where(others.any(1), first, own)
        images = [torch.where(labels == 0, own, first), torch.stack([first, own, second]).gather(0, labels[None])[0]]
        return torch.stack(images), labels

    def _projected(self, f: Forward, candidates: Gathered, rows: Tensor) -> Any:
        if candidates.is_own_rows:
            return f.projected[rows]
        patches = f.image.fusible.shape[1]
        return f.model.project(gather_encodings(candidates, lambda bundle: bundle.image, rows, patches))
