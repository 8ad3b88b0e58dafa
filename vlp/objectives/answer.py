"""Answers, and captions, word by word: language modelling on a decoder that looks at a picture, or at a picture and a question.

The model has ``answer(f, answers) -> Predicted`` and ``caption(f) -> Predicted``, see `vlp.models.albef`.

B questions, n answers, T predicted tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vlp.config import Experiment
from vlp.data.reading.annotated import Annotated
from vlp.errors import UserError
from vlp.forward import Forward
from vlp.losses.masked import masked_cross_entropy
from vlp.objectives.needs import need_image, need_momentum, need_text


@dataclass(frozen=True)
class AnswerGeneration:
    """VQA by writing (ALBEF, Li et al. 2021, sec. 4.3): ``1/B sum_n w_n sum_t [(1 - a) CE(logits_nt, token_nt) + a CE(logits_nt,
    softmax(teacher's logits_nt))]`` over all answers n of the batch and their tokens t, the ``[SEP]`` at the end among them.

    Args:
        distill: a; ALBEF's is 0.4. Above 0 it needs the momentum encoder, which reads the same answers.
        ramp_epochs: over which a grows linearly from 0; ALBEF's is 1.
    """

    supports_grad_cache: ClassVar[bool] = True  # no row depends on another: see vlp.training.grad_cache
    weight: float = 1.0
    distill: float = 0.0
    ramp_epochs: float = 0.0

    def validate(self, experiment: Experiment) -> None:
        """Raises UserError for what is missing."""
        need_image(experiment, "AnswerGeneration")
        need_text(experiment, "AnswerGeneration")
        _need_decoder(experiment, "AnswerGeneration", "fusion")
        if not all(isinstance(source, Annotated) and source.answers for source in experiment.data.train):
            raise UserError("AnswerGeneration needs answers; set data.train=(Annotated(..., answers=FIELD),)")
        _check_distill(experiment, self.distill, "AnswerGeneration")

    def __call__(self, f: Forward) -> Tensor:
        answers = f.batch.answers
        predicted = f.model.answer(f, answers)
        teacher = f.momentum.model.answer(f.momentum, answers).logits if self.distill else None
        weight = answers.weight[predicted.text]
        count = torch.tensor(float(len(f.batch)), device=weight.device)
        distill = self.distill * f.context.ramp(self.ramp_epochs)
        return masked_cross_entropy(predicted.logits, predicted.labels, teacher, distill, count, weight)


@dataclass(frozen=True)
class Captioning:
    """A picture's caption by writing: cross-entropy of each token with those before it given, distilled as in `AnswerGeneration`.

    Args:
        distill: share of the momentum encoder's targets.
        ramp_epochs: over which it grows linearly from 0.
        mean_over: the tokens of "all" processes, so that the gradient is that of one process with the whole batch, or of
            each "process".
    """

    supports_grad_cache: ClassVar[bool] = True  # see vlp.training.grad_cache
    weight: float = 1.0
    distill: float = 0.0
    ramp_epochs: float = 0.0
    mean_over: Literal["all", "process"] = "all"

    def validate(self, experiment: Experiment) -> None:
        """Raises UserError for what is missing."""
        need_image(experiment, "Captioning")
        need_text(experiment, "Captioning")
        _need_decoder(experiment, "Captioning", "image")
        if experiment.data.add_sep is False:
            raise UserError("Captioning needs to know where a caption ends; set data.add_sep=true")
        _check_distill(experiment, self.distill, "Captioning")

    def __call__(self, f: Forward) -> Tensor:
        predicted = f.model.caption(f)
        teacher = f.momentum.model.caption(f.momentum).logits if self.distill else None
        counts = f.gathered(lambda micro_batch: micro_batch.batch.attention_mask[:, 1:].sum()[None], self.mean_over)
        distill = self.distill * f.context.ramp(self.ramp_epochs)
        return masked_cross_entropy(predicted.logits, predicted.labels, teacher, distill, counts.float().mean())


def _need_decoder(experiment: Experiment, who: str, source: str) -> None:
    decoder = getattr(experiment.model, "decoder", None)
    if decoder is None or decoder.source != source:
        raise UserError(f"{who} needs layers that write; set model.decoder=Decoder(source={source!r})")


def _check_distill(experiment: Experiment, distill: float, who: str) -> None:
    if not 0 <= distill <= 1:
        raise UserError(f"distill of {who} is {distill:g}; it is the teacher's share of the targets, from 0 to 1")
    if distill:
        need_momentum(experiment, f"distill in {who}")
