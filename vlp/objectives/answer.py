"""Answers and captions, token by token: language modelling with a decoder that reads an image, or an image and a question.

Models offer `Model.answer` and `Model.caption`.

B questions, n answers, T predicted tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vlp.config import Experiment
from vlp.data.reading.annotated import Annotated
from vlp.errors import UserError
from vlp.forward import Forward, Scope
from vlp.losses.masked import masked_cross_entropy
from vlp.objectives.distillation import DistilledObjective
from vlp.objectives.requirements import require_image, require_text


@dataclass(frozen=True)
class AnswerGeneration(DistilledObjective):
    """VQA by generating the answer (ALBEF, Li et al. 2021, sec. 4.3).

    ``1/B sum_n w_n sum_t [(1 - a) CE(logits_nt, token_nt) + a CE(logits_nt, softmax(teacher's logits_nt))]`` over all answers
    n of the batch and their tokens t, including the final ``[SEP]``. The momentum encoder reads the same answers.
    """

    def validate(self, experiment: Experiment) -> None:
        super().validate(experiment)
        require_image(experiment, "AnswerGeneration")
        require_text(experiment, "AnswerGeneration")
        _require_decoder(experiment, "AnswerGeneration", "fusion")
        if not all(isinstance(source, Annotated) and source.answers for source in experiment.data.train):
            raise UserError("AnswerGeneration needs answers; set data.train=(Annotated(..., answers=FIELD),)")

    def __call__(self, f: Forward) -> Tensor:
        answers = f.batch.answers
        predicted = f.model.answer(f, answers)  # logits (T, V)
        teacher = f.momentum.model.answer(f.momentum, answers).logits if self.distill else None
        weight = answers.weight[predicted.text]  # (T,)
        count = weight.new_full((), float(len(f.batch)))
        share = self.teacher_share(f)
        return masked_cross_entropy(predicted.logits, predicted.labels, teacher, share, count, weight)


@dataclass(frozen=True)
class Captioning(DistilledObjective):
    """Captioning: cross-entropy of each token of a caption given the image and the tokens before it.

    Args:
        mean_over: Tokens that the mean is over: of all processes ("global"), so that the gradient is that of one process
            with the whole batch, or of each process ("local").
    """

    mean_over: Scope = "global"

    def validate(self, experiment: Experiment) -> None:
        super().validate(experiment)
        require_image(experiment, "Captioning")
        require_text(experiment, "Captioning")
        _require_decoder(experiment, "Captioning", "image")
        if experiment.data.add_sep is False:
            raise UserError("Captioning needs to know where a caption ends; set data.add_sep=true")

    def __call__(self, f: Forward) -> Tensor:
        predicted = f.model.caption(f)  # logits (T, V)
        teacher = f.momentum.model.caption(f.momentum).logits if self.distill else None
        counts = f.scope(self.mean_over).gather(lambda bundle: bundle.batch.attention_mask[:, 1:].sum()[None])
        share = self.teacher_share(f)
        return masked_cross_entropy(predicted.logits, predicted.labels, teacher, share, counts.float().mean())


def _require_decoder(experiment: Experiment, who: str, source: str) -> None:
    decoder = experiment.model.decoder
    if decoder is None or decoder.source != source:
        raise UserError(f"{who} needs a decoder; set model.decoder=Decoder(source={source!r})")
