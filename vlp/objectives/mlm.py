"""Masked language modelling, for any model that predicts masked tokens (`Model.masked_text`).

A single tower reads the masked text. A fusion model also reads ``f.image``, which the step computes once. The momentum encoder's
bundle goes through the teacher's method, so that the teacher reads its own encoding of the image. The positions are an
argument, so a model runs its vocabulary head, and whatever of its last layer it can, only there.

B texts, L tokens, M predicted positions, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vlp.config import Experiment
from vlp.errors import UserError
from vlp.forward import Bundle, Forward, Scope
from vlp.losses.masked import IGNORED, masked_cross_entropy
from vlp.objectives.distillation import DistilledObjective
from vlp.objectives.masking import TextMasking
from vlp.objectives.requirements import require_text


@dataclass(frozen=True)
class MaskedText(DistilledObjective):
    """MLM (Devlin et al. 2019, sec. 3.1), optionally with momentum distillation (ALBEF, Li et al. 2021, eq. 7).

    ``1/M sum_i [(1 - a) CE(logits_i, token_i) + a CE(logits_i, softmax(teacher's logits_i))]``. Of several views, the first
    is masked. If no token of the batch is masked, the loss and its gradient are 0.

    Args:
        distill: a; the momentum encoder reads the same masked text.
        masking: Which tokens are masked, and what replaces them.
        mean_over: Tokens that the mean is over: of all processes ("global"), so that the gradient is that of one process
            with the whole batch, or of each process ("local"), as published.
    """

    supports_split_backward: ClassVar[bool] = True

    masking: TextMasking = TextMasking()
    mean_over: Scope = "global"

    def validate(self, experiment: Experiment) -> None:
        super().validate(experiment)
        require_text(experiment, "masked language modelling")
        if not experiment.model.mlm:
            raise UserError("masked language modelling needs a head for it; set model.mlm=true")
        self.masking.validate("masking")

    def __call__(self, f: Forward) -> Tensor:
        masked = f.masked(self.masking)
        logits = f.model.masked_text(f, masked.input_ids, masked.positions)  # (M, V)
        teacher = None
        if self.distill:
            teacher = f.momentum.model.masked_text(f.momentum, masked.input_ids, masked.positions)
        count = f.scope(self.mean_over).gather(self._num_predicted).float().mean()
        return masked_cross_entropy(logits, masked.labels, teacher, self.teacher_share(f), count)

    def _num_predicted(self, f: Bundle) -> Tensor:
        return (f.masked(self.masking).labels != IGNORED).sum()[None]  # (1,)
