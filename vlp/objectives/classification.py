"""Classification of images, texts or pairs: entailment, NLVR2, VQA over a list of answers, ImageNet (`Model.classify`).

B rows, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from vlp.config import Experiment
from vlp.errors import UserError
from vlp.forward import Forward
from vlp.losses.classification import one_hot, sigmoid_cross_entropy, softmax_cross_entropy
from vlp.objectives.distillation import DistilledObjective
from vlp.objectives.requirements import require_labels
from vlp.specs.fields import setting


@dataclass(frozen=True)
class Classification(DistilledObjective):
    """Cross-entropy of the model's logits with the labels of the batch, or with its soft targets if it has them.

    ``1/B sum_i [(1 - a) CE(logits_i, y_i) + a CE(logits_i, p_i)]``, p the momentum encoder's prediction.

    Args:
        loss: "softmax" for one true class; "bce" judges each class independently, summed over classes (VLMo's VQA).
        distill: a.
        ramp_epochs: Epochs over which a grows linearly from 0; ALBEF's VQA has 1, its visual entailment 0.
        label_smoothing: Share of the true target spread evenly over all classes; only for "softmax".
    """

    loss: Literal["softmax", "bce"] = "softmax"
    label_smoothing: float = setting(0.0, least=0, most=1)

    def validate(self, experiment: Experiment) -> None:
        super().validate(experiment)
        if experiment.model.classes is None:
            raise UserError("Classification needs a classifier; set model.classes to the number of classes")
        require_labels(experiment, "Classification", soft=True)
        if self.label_smoothing and self.loss == "bce":
            raise UserError("label_smoothing is of loss='softmax'; set it to 0")

    def __call__(self, f: Forward) -> Tensor:
        logits = f.model.classify(f)  # (B, C)
        targets = f.batch.targets
        if targets is None:
            targets = one_hot(f.batch.labels, logits.shape[1])
        teacher = f.momentum.model.classify(f.momentum) if self.distill else None
        if self.loss == "bce":
            return sigmoid_cross_entropy(logits, targets, teacher, self.teacher_share(f))
        return softmax_cross_entropy(logits, targets, teacher, self.teacher_share(f), self.label_smoothing)
