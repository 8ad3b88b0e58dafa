"""Text assignment: to which of two pictures does this text belong, or to neither? What ALBEF pre-trains NLVR2's twins with.

The model has ``assign(f, images) -> (B, 3)``, see `vlp.models.albef`.

B rows of this process.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlp.config import Experiment
from vlp.errors import UserError
from vlp.forward import Forward
from vlp.losses.classification import one_hot, softmax_cross_entropy
from vlp.losses.inputs import in_float32
from vlp.objectives.hard_negatives import sample_hard_negatives
from vlp.objectives.needs import need_image, need_text


@dataclass(frozen=True)
class TextAssignment:
    """Cross-entropy of three answers (Li et al. 2021, sec. 4 and appendix A): the text's picture comes first, or second beside
    another one, or not at all, beside two others.

    Others are drawn in proportion to ``softmax(cosine of pictures / temperature)``, from the rows of this process that show
    another picture; two of them are different rows. Where there is one other alone, the text's picture always comes; where
    there is none it comes twice, which teaches nothing.

    Args:
        temperature: the published one; it is no parameter.
        none: share of texts whose picture does not come. The published answers are equally frequent.
    """

    weight: float = 1.0
    temperature: float = 0.07
    none: float = 1 / 3

    def validate(self, experiment: Experiment) -> None:
        """Raises UserError for what is missing."""
        need_image(experiment, "TextAssignment")
        need_text(experiment, "TextAssignment")
        model = experiment.model
        if not getattr(model, "assignment", False) or model.fusion.images != 2:
            raise UserError("TextAssignment needs a head on twins; set model.assignment=true and model.fusion.images=2")
        if self.temperature <= 0 or not 0 <= self.none <= 1:
            raise UserError(
                f"TextAssignment has temperature={self.temperature:g} and none={self.none:g}; "
                "give a positive number, and a share from 0 to 1"
            )

    def __call__(self, f: Forward) -> Tensor:
        images, labels = self.draw(f)
        return softmax_cross_entropy(f.model.assign(f, images), one_hot(labels, 3))

    def draw(self, f: Forward) -> tuple[Tensor, Tensor]:
        """(2, B) images that each text is shown, and (B,) where its own is: 0, 1, or 2 = it is not there."""
        index, rows = f.batch.image_id, torch.arange(len(f.batch), device=f.batch.image_id.device)
        similarity, others = _cosines(f.image.embed) / self.temperature, index[:, None] != index
        first = sample_hard_negatives(similarity, others)
        further = others & (rows != first[:, None])
        second = sample_hard_negatives(similarity, further)
        labels = (torch.rand(len(rows), device=rows.device) < 0.5).long()
        labels[(torch.rand(len(rows), device=rows.device) < self.none) & further.any(1)] = 2
        first = torch.where(others.any(1), first, rows)
        images = [torch.where(labels == 0, rows, first), torch.stack([first, rows, second]).gather(0, labels[None])[0]]
        return torch.stack(images), labels


@in_float32
def _cosines(embed: Tensor) -> Tensor:
    return embed.detach() @ embed.detach().T
