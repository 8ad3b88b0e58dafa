"""Classification: fine-tuning on classes, of pictures, texts or both: entailment, NLVR2, VQA as one of many answers, ImageNet.

The model has ``classify(f) -> (B, C)`` logits, see `vlp.models.albef`.

B rows, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from vlp.config import Experiment
from vlp.errors import UserError
from vlp.forward import Forward
from vlp.losses.classification import one_hot, sigmoid_cross_entropy, softmax_cross_entropy
from vlp.objectives.needs import need_momentum


@dataclass(frozen=True)
class Classification:
    """Cross-entropy of the model's ``classify`` with the batch's labels, or with its soft targets where it has these.

    ``1/B sum_i [(1 - a) CE(logits_i, y_i) + a CE(logits_i, p_i)]``, p the momentum encoder's answer (ALBEF's distillation).

    Args:
        loss: "softmax" = one class is true; "bce" = each class is true or not by itself, summed over classes (VLMo's VQA).
        distill: a; ALBEF's is 0.4. Above 0 it needs the momentum encoder.
        ramp_epochs: over which a grows linearly from 0; ALBEF's VQA has 1, its visual entailment none.
        label_smoothing: share of the true target spread evenly over all classes; of "softmax" alone.
    """

    supports_grad_cache: ClassVar[bool] = True  # no row depends on another: see vlp.training.grad_cache
    weight: float = 1.0
    loss: Literal["softmax", "bce"] = "softmax"
    distill: float = 0.0
    ramp_epochs: float = 0.0
    label_smoothing: float = 0.0

    def validate(self, experiment: Experiment) -> None:
        """Raises UserError for what is missing."""
        if getattr(experiment.model, "classes", None) is None:
            raise UserError("Classification needs a classifier; set model.classes to the number of classes")
        for name, share in (("distill", self.distill), ("label_smoothing", self.label_smoothing)):
            if not 0 <= share <= 1:
                raise UserError(f"{name} of Classification is {share:g}; it is a share of the targets, from 0 to 1")
        if self.label_smoothing and self.loss == "bce":
            raise UserError("label_smoothing is of loss='softmax'; set it to 0")
        if self.distill:
            need_momentum(experiment, "distill in Classification")

    def __call__(self, f: Forward) -> Tensor:
        logits = f.model.classify(f)
        targets = f.batch.targets
        if targets is None:
            targets = one_hot(f.batch.labels, logits.shape[1])
        teacher = f.momentum.model.classify(f.momentum) if self.distill else None
        distill = self.distill * f.context.ramp(self.ramp_epochs)
        if self.loss == "bce":
            return sigmoid_cross_entropy(logits, targets, teacher, distill)
        return softmax_cross_entropy(logits, targets, teacher, distill, self.label_smoothing)
