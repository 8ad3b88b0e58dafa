"""Masked language modelling on any model that can say what stood at a masked place.

The model has one method for it, ``masked_text(f, input_ids, positions) -> (M, V)``: a single tower reads the masked text, a
fusion model also looks at ``f.image``, which the step has computed already. The momentum encoder's own bundle goes through
the same method of the teacher, so that it looks at the teacher's picture. Since the positions are an argument, a model
runs its vocabulary head, and whatever of its last layer it can, at those alone.

B texts, L tokens, M predicted positions, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from vlp.config import Experiment
from vlp.errors import UserError
from vlp.forward import Forward
from vlp.losses.masked import IGNORED, masked_cross_entropy
from vlp.objectives.masking import TextMasking
from vlp.objectives.needs import need_momentum, need_text


@dataclass(frozen=True)
class MaskedText:
    """MLM (Devlin et al. 2019, sec. 3.1), with momentum distillation where asked for (ALBEF, Li et al. 2021, eq. 7).

    ``1/M sum_i [(1 - a) CE(logits_i, token_i) + a CE(logits_i, softmax(teacher's logits_i))]``. Of several views the first
    is masked. Where no token of the batch is masked, the loss and its gradient are 0.

    Args:
        masking: which tokens are masked, and what they become.
        distill: a; ALBEF's is 0.4. Above 0 it needs the momentum encoder, which reads the same masked text.
        ramp_epochs: over which a grows linearly from 0; ALBEF's is 1.
        mean_over: the tokens of "all" processes, so that the gradient is that of one process with the whole batch, or of
            each "process", as published.
    """

    supports_grad_cache: ClassVar[bool] = True  # see vlp.training.grad_cache
    supports_split_backward: ClassVar[bool] = True  # see vlp.training.split_backward
    weight: float = 1.0
    masking: TextMasking = TextMasking()
    distill: float = 0.0
    ramp_epochs: float = 0.0
    mean_over: Literal["all", "process"] = "all"

    def validate(self, experiment: Experiment) -> None:
        need_text(experiment, "masked language modelling")
        if not getattr(experiment.model, "mlm", False):
            raise UserError("masked language modelling needs a head for it; set model.mlm=true")
        self.masking.check("masking")
        if not 0 <= self.distill <= 1:
            raise UserError(f"distill is {self.distill:g}; it is the teacher's share of the targets, from 0 to 1")
        if self.distill:
            need_momentum(experiment, "distill in masked language modelling")

    def __call__(self, f: Forward) -> Tensor:
        masked = f.masked(self.masking)
        logits = f.model.masked_text(f, masked.input_ids, masked.positions)
        teacher = None
        if self.distill:
            teacher = f.momentum.model.masked_text(f.momentum, masked.input_ids, masked.positions)
        distill = self.distill * f.context.ramp(self.ramp_epochs)
        return masked_cross_entropy(logits, masked.labels, teacher, distill, self._count(f))

    def _count(self, f: Forward) -> Tensor:
        """() predicted tokens of a micro-batch, on average over those that ``mean_over`` names."""
        counts = f.gathered(
            lambda micro_batch: (micro_batch.masked(self.masking).labels != IGNORED).sum()[None], self.mean_over
        )
        return counts.float().mean()
